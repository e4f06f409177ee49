"""Inf-Net: published counts and shapes, properties, and weights that are hostile, damaged or foreign."""

import hashlib
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from hypothesis import given, settings, strategies as st

from covidsev.core import CheckpointError, ChecksumError, GeometryError, sha256_file
from covidsev.method.infnet import (BACKBONES, InfNet, ResNet50, count_parameters, fetch_weights,
                                    initialise_backbone, load_weights, read_weights)

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


@cache
def on_meta(backbone: str) -> InfNet:
    """A network with shapes but no values, shared by the tests that only count."""
    with torch.device("meta"):
        return InfNet(backbone).eval()


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


def test_the_large_networks_ask_for_32():
    with pytest.raises(GeometryError, match="multiples of 32"):
        on_meta("resnet50")(torch.empty(1, 1, 48, 48, device="meta"))


# properties


def test_channels_last_gives_the_same(small):
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    other = settle(InfNet("small")).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for a, b in zip(small(x), other(x)):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_levels_depend_on_what_the_equations_say(small):
    """S_g does not see f2; the edge sees nothing but f2."""
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        f = small.encode(x)
        maps, without_f2 = small.decode(f), small.decode(f._replace(f2=torch.zeros_like(f.f2)))
        without_f5 = small.decode(f._replace(f5=torch.zeros_like(f.f5)))
    assert torch.equal(maps.s_g, without_f2.s_g) and not torch.equal(maps.s_5, without_f2.s_5)
    assert torch.equal(maps.edge, without_f5.edge) and not torch.equal(maps.s_g, without_f5.s_g)


def test_width_after_the_receptive_fields_can_be_chosen():
    net = InfNet("small", channels=8)
    assert net.rfb_3.merge.conv.out_channels == 8
    assert count_parameters(net) < count_parameters(InfNet("small"))
    assert net(torch.rand(1, 1, 32, 32).expand(2, -1, -1, -1)).s_3.shape == (2, 1, 32, 32)


# weights


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


def test_missing_and_surplus_keys(small):
    state = dict(small.state_dict())
    state["surplus"] = state.pop("decoder.head.bias")
    with pytest.raises(CheckpointError, match=r"1 missing \(decoder.head.bias\); 1 unexpected \(surplus\)"):
        load_weights(InfNet("small"), state)
    old = {name: v for name, v in small.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_weights(InfNet("small"), old)  # files from before the counters existed
    with pytest.raises(CheckpointError, match="remove the prefix 'module.'"):
        load_weights(small, {f"module.{name}": value for name, value in small.state_dict().items()})


# ImageNet weights


def imagenet_like(folder: Path, kind: type, classes: int = 10) -> Path:
    """A file such as the real one: the backbone with a classifier, named by its own hash."""
    state = kind().state_dict() | {"fc.weight": torch.zeros(classes, 2048), "fc.bias": torch.zeros(classes)}
    torch.save(state, folder / "raw.pth")
    return (folder / "raw.pth").rename(folder / f"any-{sha256_file(folder / 'raw.pth')[:8]}.pth")


def test_imagenet_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    path = imagenet_like(tmp_path, ResNet50)
    net, wanted = InfNet("resnet50", init="imagenet", weights_path=path), read_weights(path)
    assert all(torch.equal(v, wanted[n]) for n, v in net.backbone.state_dict().items())
    assert net.init_record == {"init": "imagenet", "file": path.name, "sha256": sha256_file(path)}
    with pytest.raises(CheckpointError, match="another network"):
        InfNet("res2net50", init="imagenet", weights_path=path)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ChecksumError, match="not the one its name says"):
        initialise_backbone(net.backbone, "resnet50", "imagenet", path)


def test_a_wrong_download_does_not_stay(tmp_path):
    """A page in place of the file is refused, removed, and not found again by the next try."""
    source, cache = tmp_path / "resnet50-0676ba61.pth", tmp_path / "cache"
    source.write_bytes(b"<html>not found</html>")
    server, address = serve(tmp_path)
    with server:
        for _ in range(2):
            with pytest.raises(ChecksumError, match="0676ba61"):
                fetch_weights("resnet50", cache, f"{address}/{source.name}")
            assert not list(cache.glob("*.pth"))
        good = tmp_path / f"any-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
        good.write_bytes(b"weights")
        assert fetch_weights("resnet50", cache, f"{address}/{good.name}").read_bytes() == good.read_bytes()
        server.shutdown()
    assert fetch_weights("resnet50", cache, f"{address}/{good.name}").parent == cache  # found there: the server is gone


def serve(folder: Path):
    """A quiet web server for one folder on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
