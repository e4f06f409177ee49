"""The U-Net and COVID-SegNet in their two forms, and the door through which experiments get a network."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings, strategies as st

from covidsev.method.multiclass import multiclass_loss
from covidsev.method.unets import (FORMS as MULTI_FORMS, SEGNET_STAGES, UNET_STAGES, MultiClassUNet,
                                   SegNet, UNet, UShape, build_network)
from covidsev.core import ConfigError, GeometryError
from covidsev.method.losses import infnet_loss


FORMS = [(UNet, kind) for kind in UNET_STAGES] + [(SegNet, kind) for kind in SEGNET_STAGES]


@cache
def on_meta(network: type[UShape], kind: str, **options) -> UShape:
    with torch.device("meta"):
        return network(kind, **options).eval()


@settings(max_examples=12, deadline=None)
@given(form=st.sampled_from(FORMS), rows=st.integers(1, 5), columns=st.integers(1, 5),
       batch=st.integers(1, 3))
def test_output_has_the_size_of_the_input(form, rows, columns, batch):
    net = on_meta(*form, width=0.25)
    x = torch.empty(batch, 1, net.multiple * rows, net.multiple * columns, device="meta")
    outputs, half = net(x), 2 if form[1] == "small" else 1
    assert outputs.s_3.shape == x.shape
    assert outputs.s_g is outputs.s_5 is outputs.s_4 is outputs.edge is None
    features = net.features(x)
    assert features.shape == (batch, net.head.in_channels, x.shape[2] // half, x.shape[3] // half)


@pytest.mark.parametrize("network, kind", FORMS)
def test_the_last_layer_is_a_convolution_called_head_and_nothing_comes_after_it(network, kind):
    """What the pretext relies on when it swaps the head."""
    torch.manual_seed(0)
    net, x = network(kind, width=0.25).eval(), torch.rand(1, 1, 64, 32)
    assert isinstance(net.head, torch.nn.Conv2d)
    assert list(net.state_dict())[-2:] == ["head.weight", "head.bias"]
    with torch.inference_mode():
        before = net.features(x)
        net.head.weight.zero_()
        net.head.bias.fill_(3)
        assert torch.equal(net(x).s_3, torch.full_like(x, 3)) and torch.equal(net.features(x), before)


@pytest.mark.parametrize("network, kind", FORMS)
def test_the_first_logits_are_moderate(network, kind):
    """Large first logits would start the training in the flat part of the sigmoid."""
    torch.manual_seed(0)
    logits = network(kind, width=0.5).train()(torch.rand(2, 1, 96, 96)).s_3
    assert logits.detach().abs().max() < 20


@pytest.mark.parametrize("network, kind", FORMS)
def test_a_batch_of_one_trains(network, kind):
    torch.manual_seed(0)
    net, x = network(kind, width=0.25).train(), torch.rand(1, 1, 64, 64)
    infnet_loss(net(x), (x > 0.5).float()).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("shape", [(1, 1, 40, 64), (1, 2, 64, 64), (64, 64), (0, 1, 64, 64)])
@pytest.mark.parametrize("network", [UNet, SegNet])
def test_other_input_is_refused(network, shape):
    net = network("small", width=0.25)
    for call in (net, net.features):
        with pytest.raises(GeometryError):
            call(torch.zeros(shape))


def test_a_unet_takes_no_weights_file(tmp_path):
    with pytest.raises(ConfigError, match="no pretrained weights"):
        build_network("unet", "small", "scratch", tmp_path / "weights.pth")


# two inputs, three classes ------------------------------------------------------------------------------------------


def pair(batch: int = 1, side: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, side, side, generator=generator), torch.rand(batch, 1, side, side, generator=generator)


def random_labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@cache
def multi_on_meta(kind: str) -> MultiClassUNet:
    with torch.device("meta"):
        return MultiClassUNet(kind).eval()


@pytest.fixture(scope="module")
def small() -> MultiClassUNet:
    torch.manual_seed(0)
    net = MultiClassUNet("small")
    with torch.no_grad():  # so that the normalisations have seen something
        net.train()(*pair(2, seed=1))
    return net.eval()


@pytest.mark.parametrize("kind", MULTI_FORMS)
@pytest.mark.parametrize("height, width", [(352, 352), (96, 160)])
def test_logits_at_the_input_size(kind, height, width):
    x = torch.empty(2, 1, height, width, device="meta")
    assert multi_on_meta(kind)(x, x).logits.shape == (2, 3, height, width)


def test_batch_does_not_matter_in_eval_mode(small):
    image, prior = pair(3)
    with torch.inference_mode():
        together, alone = small(image, prior).logits, small(image[1:2], prior[1:2]).logits
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_half_precision_learns(small):
    image, prior = pair(2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = small(image, prior).logits
        loss = multiclass_loss(logits, random_labels(2, 1, 64, 64), 2.0)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize("change, words", [
    (lambda x, p: (x, p[0]), "do not fit"), (lambda x, p: (x, p.expand(-1, 3, -1, -1)), "do not fit"),
    (lambda x, p: (x, (255 * p).to(torch.uint8)), "uint8"), (lambda x, p: (x[:0], p[:0]), "fit the strides"),
    (lambda x, p: (x.expand(-1, 3, -1, -1), p), "grey slices")])
def test_bad_input(small, change, words):
    with pytest.raises(GeometryError, match=words):
        small(*change(*pair()))
