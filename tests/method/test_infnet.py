"""Inf-Net: published counts and shapes, properties, and weights that are hostile, damaged or foreign."""

import hashlib
import os
import pickle
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covidsev.core import (CheckpointError, ChecksumError, ConfigError, CovidSevError,
                           DataMissingError, GeometryError)
from covidsev.method.infnet import (BACKBONES, IMAGENET_WEIGHTS, InfNet, ParallelPartialDecoder,
                                    ReceptiveFieldBlock, Res2Net50, ResNet50, ReverseAttention,
                                    check_fits, count_parameters, fetch_weights,
                                    initialise_backbone, load_published_checkpoint, load_weights,
                                    published_name, read_weights, reverse)
from covidsev.core import sha256_file

NAMES = ("s_g", "s_5", "s_4", "s_3", "edge")


@pytest.fixture(scope="module")
def small() -> InfNet:
    torch.manual_seed(0)
    return settle(InfNet("small"))


def settle(net: InfNet, side: int = 64) -> InfNet:
    """Let the normalisations see some data, so that evaluation differs from the initial state."""
    with torch.no_grad():
        net.train()(torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(1)))
    return net.eval()


def outputs_equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@cache
def on_meta(backbone: str) -> InfNet:
    """A network with shapes but no values, shared by the tests that only count."""
    with torch.device("meta"):
        return InfNet(backbone).eval()


# counts and shapes


@pytest.mark.parametrize("backbone, whole, part", [("res2net50", 31_072_721, 23_669_352),
                                                   ("resnet50", 30_911_401, 23_508_032)])
def test_published_parameter_counts(backbone, whole, part):
    net = on_meta(backbone)
    assert (count_parameters(net), count_parameters(net.backbone)) == (whole, part)


@pytest.mark.parametrize("inputs, count", [(512, 178_112), (1024, 260_032), (2048, 423_872)])
def test_receptive_field_block_counts(inputs, count):
    assert count_parameters(ReceptiveFieldBlock(inputs)) == count


def test_decoder_count_and_unnormalised_head():
    decoder = ParallelPartialDecoder()
    assert count_parameters(decoder) == 277_473
    assert decoder.head.bias is not None
    assert not any(name.endswith("conv.bias") for name, _ in decoder.named_parameters())


@pytest.mark.parametrize("backbone", ["res2net50", "resnet50"])
def test_stage_shapes_at_352(backbone):
    net, x = on_meta(backbone), torch.empty(2, 1, 352, 352, device="meta")
    pyramid = net.encode(x)
    assert [tuple(f.shape[1:]) for f in pyramid] == [(256, 88, 88), (512, 44, 44), (1024, 22, 22),
                                                     (2048, 11, 11)]
    made = net.decode(pyramid)
    assert {n: tuple(m.shape[1:]) for n, m in made._asdict().items()} == {"s_g": (1, 44, 44),
        "s_5": (1, 11, 11), "s_4": (1, 22, 22), "s_3": (1, 44, 44), "edge": (1, 88, 88)}
    assert all(m.shape == x.shape for m in net(x))


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), batch=st.integers(1, 3))
def test_any_multiple_of_the_stride_works(backbone, rows, columns, batch):
    net, kind = on_meta(backbone), BACKBONES[backbone]
    x = torch.empty(batch, 1, kind.strides[-1] * rows, kind.strides[-1] * columns, device="meta")
    outputs = net(x)
    assert outputs._fields == NAMES and all(m.shape == x.shape for m in outputs)


@pytest.mark.parametrize("shape", [(1, 1, 100, 96), (1, 1, 96, 100), (1, 3, 96, 96), (1, 96, 96),
                                   (1, 1, 8, 96), (0, 1, 96, 96), (1, 1, 0, 32)])
def test_other_input_is_refused(small, shape):
    with pytest.raises(GeometryError, match="expected"):
        small(torch.zeros(shape))


def test_bytes_are_refused(small):
    with pytest.raises(GeometryError, match="divide 8-bit values by 255"):
        small(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))


def test_the_large_networks_ask_for_32():
    with pytest.raises(GeometryError, match="multiples of 32"):
        on_meta("resnet50")(torch.empty(1, 1, 48, 48, device="meta"))


# properties


def test_deterministic_and_independent_of_the_batch(small):
    x = torch.rand(3, 1, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole, again, alone = small(x), small(x), small(x[1:2])
    assert outputs_equal(whole, again)
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, atol=1e-4, rtol=1e-4)


def test_channels_last_gives_the_same(small):
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    other = settle(InfNet("small")).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for a, b in zip(small(x), other(x)):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_the_seed_decides_and_the_constructor_sets_none():
    torch.manual_seed(5)
    first = InfNet("small").state_dict()
    after_first = torch.rand(1)
    torch.manual_seed(5)
    second = InfNet("small").state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first) and torch.equal(after_first, torch.rand(1))
    third = InfNet("small").state_dict()
    assert not torch.equal(first["backbone.stem.conv.weight"], third["backbone.stem.conv.weight"])


def test_gradients_reach_everything():
    torch.manual_seed(0)
    net, x = InfNet("small").train(), torch.rand(2, 1, 64, 64).requires_grad_()
    # (m + 1)^2, since of the square of a map normalised to the mean 0 the last bias has the gradient 0, give or take a bit
    sum((m + 1).square().mean() for m in net(x)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert x.grad.abs().sum() > 0


def test_levels_depend_on_what_the_equations_say(small):
    """S_g does not see f2; the edge sees nothing but f2."""
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        f = small.encode(x)
        maps, without_f2 = small.decode(f), small.decode(f._replace(f2=torch.zeros_like(f.f2)))
        without_f5 = small.decode(f._replace(f5=torch.zeros_like(f.f5)))
    assert torch.equal(maps.s_g, without_f2.s_g) and not torch.equal(maps.s_5, without_f2.s_5)
    assert torch.equal(maps.edge, without_f5.edge) and not torch.equal(maps.s_g, without_f5.s_g)


def test_reverse_attention_of_a_certain_map_is_zero():
    assert reverse(torch.full((1, 1, 4, 4), 200.0)).sum() == 0
    level = ReverseAttention(6, 5, 4).eval()
    f, certain, e = torch.randn(2, 6, 8, 8), torch.full((2, 1, 4, 4), 1e4), torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        assert torch.equal(level(f, certain, e), level(-f, certain, e))


@settings(max_examples=50, deadline=None)
@given(st.floats(-80, 80))
def test_reverse_is_the_complement(value):
    logit = torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(reverse(logit) + torch.sigmoid(logit), torch.ones((), dtype=torch.float64))


def test_width_after_the_receptive_fields_can_be_chosen():
    net = InfNet("small", channels=8)
    assert net.rfb_3.merge.conv.out_channels == 8
    assert count_parameters(net) < count_parameters(InfNet("small"))
    assert net(torch.rand(1, 1, 32, 32).expand(2, -1, -1, -1)).s_3.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("wrong", ["res2net", "ResNet50", "", None])
def test_unknown_backbones_are_refused(wrong):
    with pytest.raises(ConfigError, match="unknown backbone"):
        InfNet(wrong)


# weights


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    if zipped:
        torch.save({"weight": Hostile(canary)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Hostile(canary)}, protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        read_weights(path)
    with pytest.raises(CheckpointError, match="refused"):
        load_published_checkpoint(path, on_meta("small"))
    assert not canary.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert canary.exists()  # the trap itself works


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=300))
def test_noise_is_a_checkpoint_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_weights(path)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_cut_file_is_a_checkpoint_error(tmp_path, small, keep):
    path = tmp_path / "weights.pth"
    torch.save(small.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(3),
                                     {"state": {"a": torch.zeros(1)}}])
def test_other_content_is_a_checkpoint_error(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="no plain set of weights"):
        read_weights(path)


def test_a_missing_file_names_itself(tmp_path):
    with pytest.raises(CheckpointError, match="none.pth"):
        read_weights(tmp_path / "none.pth")


def test_another_architecture_lists_five_of_each_and_changes_nothing(small):
    before = {n: v.clone() for n, v in small.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(small, on_meta("resnet50").state_dict(), "other.pth")
    text = str(caught.value)
    assert ("missing (" in text and "unexpected (" in text and "of another shape (" in text
            and "other.pth" in text)
    assert text.count("backbone.stem") <= 5 and "backbone.conv1.weight" in text
    assert caught.value.exit_code == 5
    assert all(torch.equal(before[n], v) for n, v in small.state_dict().items())


def test_missing_and_surplus_keys(small):
    state = dict(small.state_dict())
    state["surplus"] = state.pop("decoder.head.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder.head.bias\); 1 unexpected \(surplus\)"):
        load_weights(InfNet("small"), state)
    counters = [n for n in small.state_dict() if n.endswith("num_batches_tracked")]
    old = {n: v for n, v in small.state_dict().items() if n not in counters}
    load_weights(InfNet("small"), old)  # files from before the counters existed
    with pytest.raises(CheckpointError, match="remove the prefix 'module.'"):
        load_weights(small, {f"module.{name}": value for name, value in small.state_dict().items()})
    check_fits({"a": torch.zeros(2)}, {"a": torch.ones(2)})


# ImageNet weights


def imagenet_like(folder: Path, kind: type, classes: int = 10) -> Path:
    """A file such as the real one: the backbone with a classifier, named by its own hash."""
    state = kind().state_dict() | {"fc.weight": torch.zeros(classes, 2048), "fc.bias": torch.zeros(classes)}
    torch.save(state, folder / "raw.pth")
    return (folder / "raw.pth").rename(folder / f"any-{sha256_file(folder / 'raw.pth')[:8]}.pth")


@pytest.mark.parametrize("backbone, kind", [("resnet50", ResNet50), ("res2net50", Res2Net50)])
def test_imagenet_weights_from_a_file(tmp_path, backbone, kind):
    torch.manual_seed(0)
    path = imagenet_like(tmp_path, kind)
    net = InfNet(backbone, init="imagenet", weights_path=path)
    wanted = read_weights(path)
    assert all(torch.equal(v, wanted[n]) for n, v in net.backbone.state_dict().items())
    assert net.init_record == {"init": "imagenet", "file": path.name, "sha256": sha256_file(path)}
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ChecksumError, match="not the one its name says"):
        initialise_backbone(net.backbone, backbone, "imagenet", path)


def test_a_renamed_file_is_held_against_the_known_digits(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ChecksumError, match="0676ba61"):
        InfNet("resnet50", init="imagenet", weights_path=path)


def test_weights_of_the_other_backbone_are_refused(tmp_path):
    path = imagenet_like(tmp_path, ResNet50)
    with pytest.raises(CheckpointError, match="another network"):
        InfNet("res2net50", init="imagenet", weights_path=path)


def test_contradictory_settings_are_refused(tmp_path):
    for options in ({"init": "imagenet"}, {"weights_path": tmp_path / "w.pth"},
                    {"init": "imagenet", "weights_path": tmp_path / "w.pth"}):
        with pytest.raises(ConfigError):
            InfNet("small", **options)
    with pytest.raises(ConfigError, match="did you mean 'scratch'"):
        InfNet("small", init="scrach")
    assert InfNet("small").init_record == {"init": "scratch"}


def test_no_network_names_address_and_place(tmp_path):
    with pytest.raises(DataMissingError) as caught:
        fetch_weights("resnet50", tmp_path, "http://127.0.0.1:9/resnet50-0676ba61.pth")
    text = str(caught.value)
    assert "127.0.0.1:9" in text and "by hand" in text and "weights_path" in text and "scratch" in text
    assert not list(tmp_path.glob("*.pth"))


def test_a_wrong_download_does_not_stay(tmp_path):
    """A page in place of the file is refused, removed, and not found again by the next try."""
    source = tmp_path / "resnet50-0676ba61.pth"
    source.write_bytes(b"<html>not found</html>")
    server, address = serve(tmp_path)
    with server:
        cache = tmp_path / "cache"
        for _ in range(2):
            with pytest.raises(ChecksumError, match="0676ba61"):
                fetch_weights("resnet50", cache, f"{address}/{source.name}")
            assert not list(cache.glob("*.pth"))
        good = tmp_path / f"any-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
        good.write_bytes(b"weights")
        assert fetch_weights("resnet50", cache, f"{address}/{good.name}").read_bytes() == good.read_bytes()
        server.shutdown()
    # found there, the server is gone
    assert (fetch_weights("resnet50", cache, f"{address}/{good.name}").parent == cache)


def serve(folder: Path):
    """A quiet web server for one folder on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_known_weight_files():
    assert {k: w.name for k,
            w in IMAGENET_WEIGHTS.items()} == {"res2net50": "res2net50_v1b_26w_4s-3cf99910.pth",
                                               "resnet50": "resnet50-0676ba61.pth"}


# the published Inf-Net's checkpoint


def conv_bn_names(prefix: str) -> set[str]:
    return {f"{prefix}.conv.weight", *(f"{prefix}.bn.{n}" for n in ("weight", "bias",
            "running_mean", "running_var", "num_batches_tracked"))}


def decoder_names() -> set[str]:
    """Every decoder name of the published code, listed from its module names and not through our table."""
    layers = [f"ra4_conv{k}" for k in range(1, 6)] + [f"{b}_conv{k}" for b in ("ra3", "ra2", "edge")
                                                      for k in range(1, 5)]
    layers += [f"ParDec.{n}" for n in (*(f"conv_upsample{k}" for k in range(1, 6)), "conv_concat2",
                                       "conv_concat3", "conv4")]
    for rfb in ("rfb2_1", "rfb3_1", "rfb4_1"):
        layers += [f"{rfb}.branch0.0", f"{rfb}.conv_cat", f"{rfb}.conv_res",
                   *(f"{rfb}.branch{b}.{k}" for b in (1, 2, 3) for k in range(4))]
    return set().union(*map(conv_bn_names, layers)) | {"ParDec.conv5.weight", "ParDec.conv5.bias"}


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_every_decoder_name_is_translated(backbone):
    names = [published_name(n) for n in on_meta(backbone).state_dict()]
    assert len(set(names)) == len(names)
    assert {n for n in names if not n.startswith("resnet.")} == decoder_names()


def test_published_shapes_of_some_tensors():
    shapes = {published_name(n): tuple(v.shape) for n, v in on_meta("res2net50").state_dict().items()}
    assert shapes["rfb2_1.branch0.0.conv.weight"] == (32, 512, 1, 1)
    assert shapes["rfb4_1.branch3.3.conv.weight"] == (32, 32, 3, 3)
    assert shapes["ra4_conv2.conv.weight"] == (256, 320, 5,
                                               5) and shapes["ra4_conv5.conv.weight"] == (1, 256, 1,
        1)
    assert shapes["ra2_conv1.conv.weight"] == (64, 512, 1,
                                               1) and shapes["ra3_conv4.conv.weight"] == (1, 64, 3,
        3)
    assert shapes["ParDec.conv_concat2.conv.weight"] == (64, 64, 3,
                                                         3) and shapes["ParDec.conv5.weight"] == (1,
        96, 1, 1)
    assert shapes["resnet.conv1.6.weight"] == (64, 32, 3, 3) and shapes["resnet.layer1.0.convs.2.weight"] == (
        26,
        26,
        3,
        3,
    )
    assert shapes["resnet.layer4.0.downsample.1.weight"] == (2048, 1024, 1, 1)


def published_state(net: InfNet, prefix: str = "") -> dict[str, torch.Tensor]:
    state = {prefix + published_name(n): v for n, v in net.state_dict().items()}
    return state | {f"{prefix}resnet.fc.weight": torch.zeros(10, 2048),
                    f"{prefix}resnet.fc.bias": torch.zeros(10)}


def test_published_checkpoint_round_trip_at_full_size(tmp_path):
    torch.manual_seed(0)
    net, path = settle(InfNet("res2net50")), tmp_path / "Inf-Net.pth"
    torch.save(published_state(net, "module."), path)
    other = InfNet("res2net50").eval()
    assert load_published_checkpoint(path, other) == ["resnet.fc.weight", "resnet.fc.bias"]
    x = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        assert outputs_equal(net(x), other(x))
    assert other.init_record["init"] == "published" and other.init_record["sha256"] == sha256_file(path)


def test_published_checkpoint_is_strict(tmp_path, small):
    path, state = tmp_path / "Inf-Net.pth", published_state(small)
    state["ra9_conv1.conv.weight"] = state.pop("ra2_conv1.conv.weight")
    torch.save(state, path)
    target = InfNet("small")
    before = [p.clone() for p in target.parameters()]
    with pytest.raises(
        CheckpointError, match=r"missing \(ra2_conv1.conv.weight\).*unexpected \(ra9_conv1.conv.weight\)"
    ):
        load_published_checkpoint(path, target)
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters())) and target.init_record == {
        "init": "scratch"
    }


def test_our_own_names_are_not_taken_for_published_ones(tmp_path, small):
    path = tmp_path / "ours.pth"
    torch.save(small.state_dict(), path)
    with pytest.raises(CheckpointError, match="missing"):
        load_published_checkpoint(path, InfNet("small"))


def test_every_error_is_ours_and_says_what_to_do(tmp_path):
    with pytest.raises(CovidSevError) as caught:
        InfNet("resnet50", init="imagenet", weights_path=tmp_path / "none.pth")
    assert "no such weights file" in str(caught.value)
