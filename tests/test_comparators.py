"""The U-Net in its two forms, and the door through which experiments get a network."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from covidsev.comparators import MODELS, UNET_STAGES, UNet, build_network, scale_stages
from covidsev.config import ConfigError, GeometryError
from covidsev.infnet import InfNet, count_parameters
from covidsev.losses import infnet_loss


@cache
def on_meta(kind: str, **options) -> UNet:
    with torch.device("meta"):
        return UNet(kind, **options).eval()


def gflop(network: torch.nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 1, side, side, device="meta"))
    return counter.get_total_flops() / 1e9


def test_size_of_both_forms():
    assert count_parameters(on_meta("classic")) == 31_036_481
    assert count_parameters(on_meta("small")) == 2_457_457
    assert 1.1 < gflop(on_meta("small"), 160) < 1.2
    assert 150 < gflop(on_meta("classic"), 352) < 200


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(sorted(UNET_STAGES)),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_output_has_the_size_of_the_input(kind, rows, columns, batch):
    net = on_meta(kind, width=0.25)
    x = torch.empty(batch, 1, net.multiple * rows, net.multiple * columns, device="meta")
    outputs = net(x)
    assert outputs.s_3.shape == x.shape
    assert outputs.s_g is outputs.s_5 is outputs.s_4 is outputs.edge is None


@pytest.mark.parametrize("kind", sorted(UNET_STAGES))
def test_every_parameter_learns_and_evaluation_is_deterministic(kind):
    torch.manual_seed(0)
    net, x = UNet(kind, width=0.125), torch.rand(2, 1, 64, 64)
    mask = (x > 0.5).float()
    infnet_loss(net.train()(x), mask).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters())
    net.eval()
    with torch.inference_mode():
        whole, again, alone = net(x).s_3, net(x).s_3, net(x[:1]).s_3
    assert torch.equal(whole, again)
    torch.testing.assert_close(whole[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(UNET_STAGES))
def test_the_first_logits_are_moderate(kind):
    """Large first logits would start the training in the flat part of the sigmoid."""
    torch.manual_seed(0)
    logits = UNet(kind, width=0.5).train()(torch.rand(2, 1, 96, 96)).s_3
    assert logits.detach().abs().max() < 20


@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (1, 2, 64, 64), (64, 64)])
def test_other_input_is_refused(shape):
    with pytest.raises(GeometryError):
        UNet("small", width=0.25)(torch.zeros(shape))


@pytest.mark.parametrize("width", [0, -1, 0.001])
def test_networks_without_channels_are_refused(width):
    with pytest.raises(ConfigError, match="no channels"):
        UNet("small", width=width)
    with pytest.raises(ConfigError, match="no channels"):
        scale_stages((8,), width / 10)


def test_build_network():
    assert isinstance(build_network("infnet", "small", "scratch"), InfNet)
    small, classic = (build_network("unet", backbone, "scratch") for backbone in ("small", "res2net50"))
    assert (small.multiple, classic.multiple) == (32, 16)
    assert MODELS == ("infnet", "unet")


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (("unett", "small", "scratch"), "unet"),
        (("infnet", "smal", "scratch"), "small"),
        (("unet", "resnet5", "scratch"), "resnet50"),
        (("infnet", "small", "scrath"), "scratch"),
        (("unet", "small", "imagenet"), "no pretrained weights"),
    ],
)
def test_misspelt_rows_are_refused_with_a_hint(wrong, hint):
    with pytest.raises(ConfigError, match=hint):
        build_network(*wrong)


def test_a_unet_takes_no_weights_file(tmp_path):
    with pytest.raises(ConfigError, match="no pretrained weights"):
        build_network("unet", "small", "scratch", tmp_path / "weights.pth")
