"""From weights to masks at native size, from scans to labels on their grid, and to files that nothing can spoil."""
import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional

from covidsev.core import (CheckpointError, ConfigError, MissingExtraError, NonFiniteError,
                           read_json, sha256_file, write_json)
from covidsev.data.datasets import SliceSet
from covidsev.data.phantom import phantom_volume, to_uint8
from covidsev.data.scans import Scan, read_scan, turn_picture, write_mask
from covidsev.data.volumes import make_grid
from covidsev.method import inference
from covidsev.method.inference import (MODEL_FORMAT, PARITY, ModelInfo, as_volume, card_path,
                                       export_run, iterate_logits, load_model, load_segmenter,
                                       lung_box, predict_slices, save_model, save_onnx, segment,
                                       segment_scan, slice_logits, training_view)
from covidsev.method.infnet import count_parameters
from covidsev.method.losses import SideOutputs
from covidsev.method.training import save_checkpoint, weights_hash
from covidsev.method.unets import MultiClassUNet, build_network

SIZE = 32
NAMES = ("infnet", "unet", "segnet", "multi")


class Watched(nn.Module):
    """A convolution with batch normalisation that notes how it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.calls = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), []
        self.norm.running_mean.fill_(0.2)

    def forward(self, images):
        logits = self.norm(self.conv(images))
        self.calls.append((len(images), logits.requires_grad))
        return SideOutputs(s_3=logits)


class Bright(nn.Module):
    """Positive where a slice is brighter than middle grey: a network whose answer is known."""

    def forward(self, images):
        return SideOutputs(s_3=100 * (images - 0.5))


class Corner(nn.Module):
    """Positive in the quarter at the start of rows and columns of a training slice."""

    def forward(self, images):
        half = torch.arange(images.shape[-1]) < images.shape[-1] // 2
        return SideOutputs(s_3=torch.where(half[:, None] & half, 9.0, -9.0).expand(images.shape))


def noise(count, size=16):
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(count)).to(torch.uint8)


def slice_set(images):
    names = [str(k) for k in range(len(images))]
    return SliceSet("x", "unknown", names, images, [0 * one for one in images], names)


# slices ------------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_by_the_batch_and_nothing_is_recorded_or_learnt():
    network, images = Watched().train(), noise(7)
    before = weights_hash(network)
    found = iterate_logits(network, images, batch_size=3)
    assert next(found).shape == (3, 1, 16, 16) and len(network.calls) == 1  # a batch is computed when it is asked for
    assert [len(one) for one in found] == [3, 1] and network.calls == [(3, False), (3, False), (1, False)]
    assert weights_hash(network) == before and not network.training


def as_tf32(x):
    """A float32 tensor with the ten bits of mantissa that a tensor core reads, rounded to nearest."""
    bits = x.detach().contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("model, backbone", [("unet", "small"), ("infnet", "res2net50")])
def test_evaluation_does_not_stop_where_convolutions_round_as_on_a_gpu(model, backbone, monkeypatch, tmp_path):
    torch.manual_seed(0)
    network, slices = build_network(model, backbone), slice_set([noise(1, 64)[0, 0].numpy()] * 2)
    network.train()(torch.rand(2, 1, 64, 64))
    exact, plain = predict_slices(network, slices, 64, precision="float32"), functional.conv2d
    rounded = []
    monkeypatch.setattr(functional, "conv2d", lambda x, w, *more, **named: (
        rounded.append(1), plain(as_tf32(x), as_tf32(w), *more, **named))[1])
    found = predict_slices(network, slices, 64, precision="float32")
    assert rounded and 0 < np.abs(np.subtract(found, exact)).max() < 0.2 and np.isfinite(found).all()
    one, near = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11]), [1.0, 1.0, 1 + 2**-9]
    assert as_tf32(one).tolist() == near  # ties go to the even neighbour


@given(st.integers(2, 12), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_native_maps_have_the_shape_and_stay_in_range(side, height, width, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    (native,) = predict_slices(Bright(), slice_set([picture]), side)
    assert native.shape == (height, width) and native.dtype == np.float32 and 0 <= native.min() <= native.max() <= 1


def test_maps_come_back_in_order_with_logits_resized_before_the_sigmoid():
    shapes = [(40, 60), (64, 33), (32, 32), (100, 50)]
    images = [np.zeros(shape, np.uint8) for shape in shapes]
    for number, image in enumerate(images):
        image[: image.shape[0] // 2, : image.shape[1] // (number + 1)] = 255
    maps = predict_slices(Bright(), slice_set(images), 32, batch_size=3, precision="float32")
    assert [found.shape for found in maps] == shapes
    assert all(((found > 0.5) == (image > 127)).mean() > 0.95 for found, image in zip(maps, images, strict=True))
    logits = slice_logits(Bright(), slice_set(images), 32, precision="float32")
    for one, found in zip(logits, maps):
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-one.astype(float))), atol=1e-6)
    steep = slice_set([np.repeat(np.array([[117, 138]], np.uint8), 2, axis=0)])
    (two,) = slice_logits(Bright(), steep, 2, precision="float32")
    (wide,) = inference.predict_slices(Bright(), steep, 2, precision="float32", temperature=4.0)
    np.testing.assert_allclose(wide, 1 / (1 + np.exp(-two / 4)), rtol=1e-5)


@pytest.mark.parametrize("stacks", [(noise(2).float(),), (noise(2)[:, 0],), (noise(2).expand(2, 3, 16, 16),),
                                    (noise(2), noise(2).float()), (noise(2), noise(1)), (noise(2), noise(2, 32))])
def test_images_and_priors_that_are_not_grey_bytes_are_refused(stacks):
    with pytest.raises(ConfigError, match="not uint8"):
        list(iterate_logits(Watched(), *stacks))
    assert list(iterate_logits(Watched(), noise(1)[:0])) == []


# scans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patient():
    phantom = phantom_volume(seed=5, shape=(12, 64, 64), ggo_fraction=0.2)
    return {name: np.asfortranarray(getattr(phantom, name)[:, ::-1, ::-1].transpose(2, 1, 0))
            for name in ("hu", "lungs", "labels")} | {"spacing": tuple(phantom.spacing_mm[::-1])}


@pytest.fixture(scope="module")
def scan(patient):
    grid = make_grid(patient["hu"].shape, np.diag([*patient["spacing"], 1.0]))
    return Scan(patient["hu"], "volume", "HU", "phantom", "0" * 64, grid.canonical_affine, patient["spacing"],
                orientation="RAS", grid=grid)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return build_network("infnet", "small").eval()


def test_window_and_native_size(scan, patient):
    """A network that answers with its own input gives the windowed volume back: grey 127.5 is -600 HU."""
    found = segment_scan(scan, Bright(), size=64, threshold=0.5)
    assert np.array_equal(found, np.stack([to_uint8(patient["hu"][:, :, k]) > 127 for k in range(12)], axis=-1))
    other = segment_scan(scan, Bright(), size=64, threshold=0.5, window=(40.0, 400.0))
    assert np.array_equal(scan.hu, patient["hu"])
    assert np.array_equal(other, to_uint8(patient["hu"], 40, 400) > 127) and other.sum() < found.sum()
    coarse = segment_scan(scan, Bright(), size=32, threshold=0.5)
    assert coarse.shape == found.shape and np.mean(coarse == found) > 0.9


@pytest.mark.parametrize("kind", ["phantom", "real"])
def test_training_orientation(scan, kind):
    """The first rows and columns of a training slice hold the patient's right (left on a screen) and the front."""
    found = segment_scan(scan, Corner(), size=64, threshold=0.5, kind=kind)
    assert found[32:, 32:].all() and found.sum() == found[32:, 32:].size


def test_real_training_slices_lie_like_this(data_root):
    """In COVID-SemiSeg the spine is in the right half of the array (as far as brightness can tell)."""
    from covidsev.data.datasets import load_covid_semiseg, spine_at_left

    slices = load_covid_semiseg(data_root, "test")
    assert sum(not spine_at_left(image) for image in slices.images) > 0.7 * len(slices)
    phantom = phantom_volume(seed=5, shape=(12, 64, 64)).hu[6]
    assert not spine_at_left(training_view(turn_picture(to_uint8(phantom)), "real"))


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL"])
def test_any_storage_order_gives_the_same_mask_on_its_own_grid(tmp_path, scan, network, codes):
    start, end = (nibabel.orientations.axcodes2ornt(axes) for axes in ("RAS", codes))
    image = nibabel.Nifti1Image(scan.hu.astype(np.int16), scan.affine)
    stored = image.as_reoriented(nibabel.orientations.ornt_transform(start, end))
    stored.to_filename(tmp_path / "scan.nii.gz")
    found = read_scan(tmp_path / "scan.nii.gz")
    mask = segment_scan(found, network, size=64, threshold=0.4)
    assert np.array_equal(mask, segment_scan(scan, network, size=64, threshold=0.4))
    write_mask(tmp_path / "mask.nii.gz", mask, found)
    written = nibabel.load(tmp_path / "mask.nii.gz")
    assert written.shape == stored.shape and np.allclose(written.affine, stored.affine, atol=1e-5)
    assert np.array_equal(nibabel.as_closest_canonical(written).get_fdata(), mask)


@pytest.mark.parametrize("shape", [(64, 64), (33, 150)])
def test_slices_of_any_aspect(network, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    scan = Scan(picture, "slice", "grey", "x", "0" * 64)
    for kind in ("phantom", "real"):
        found = segment_scan(scan, network, size=64, threshold=0.4, kind=kind)
        assert found.shape == shape and found.dtype == np.uint8


def test_slice_and_volume_agree(scan, network):
    plane = Scan(turn_picture(scan.hu[:, :, 6]).copy(), "slice", "HU", "x", "0" * 64)
    alone = segment_scan(plane, network, size=64, threshold=0.4)
    within = segment_scan(scan, network, size=64, threshold=0.4, batch_size=1)
    assert np.array_equal(as_volume(alone)[:, :, 0], within[:, :, 6])


def test_box_and_margin(patient):
    lungs, spacing = patient["lungs"], patient["spacing"]
    box = lung_box(lungs, spacing, 0)
    assert (lungs[box] > 0).sum() == (lungs > 0).sum()
    assert all((lungs > 0).take((side.start, side.stop - 1), axis).any(axis=tuple({0, 1, 2} - {axis})).all()
               for axis, side in enumerate(box))
    wide = lung_box(lungs, spacing, 2 * spacing[0])
    assert (wide[0].start, wide[2]) == (box[0].start - 2, box[2])
    flat = lung_box(turn_picture(lungs[:, :, 6]), spacing[1::-1], 0)
    assert (lungs[:, :, 6:7][flat] > 0).sum() == (lungs[:, :, 6] > 0).sum()


def test_wrong_settings(scan):
    for threshold, kind, words in ((0.0, "real", "threshold is a probability"), (50, "real", "threshold is a probability"),
                                   (0.5, "phantoms", "did you mean 'phantom'")):
        with pytest.raises(ConfigError, match=words):
            segment_scan(scan, Bright(), size=64, threshold=threshold, kind=kind)


def info(task="single", kind="phantom", **more):
    task_part = {"model": "infnet", "backbone": "small"} if task == "single" else {"model": "multi", "form": "small"}
    return ModelInfo(**{"task": task, "size": 64, "data_kind": kind, "window": (-600.0, 1500.0), **task_part, **more})


def test_from_a_file_of_weights(tmp_path, network, scan):
    path = save_model(tmp_path / "single.safetensors", network, info(threshold=0.37))
    loaded = load_segmenter(path)
    assert (loaded.size, loaded.threshold, loaded.kind, loaded.sha256) == (64, 0.37, "phantom", sha256_file(path))
    assert load_segmenter(path, threshold=0.6).threshold == 0.6
    assert np.array_equal(segment(scan, loaded), segment_scan(scan, network, size=64, threshold=0.37, kind="phantom"))
    torch.manual_seed(2)
    multi = save_model(tmp_path / "multi.safetensors", MultiClassUNet("small"), info("multi"))
    both = load_segmenter(path, multi)
    assert both.second.size == 64 and both.record()["second_sha256"] == sha256_file(multi)
    assert set(np.unique(segment(scan, both))) <= {0, 1, 2}


def test_wrong_weights_never_give_a_prediction(tmp_path, network):
    """Row 43: without weights, with a checkpoint, with another task, with another hash: never a prediction."""
    with pytest.raises(ConfigError, match="(?s)prediction needs trained weights.*--weights FILE.*--infection MASK"):
        load_segmenter(None)
    (tmp_path / "best.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="(?s)checkpoint of a training run.*covidsev export"):
        load_segmenter(tmp_path / "best.pt")
    path = save_model(tmp_path / "single.safetensors", network, info())
    with pytest.raises(ConfigError, match="trained for another task"):
        load_segmenter(path, path)
    real = save_model(tmp_path / "multi.safetensors", MultiClassUNet("small"), info("multi", "real"))
    with pytest.raises(ConfigError, match="slices of two kinds"):
        load_segmenter(path, real)
    with pytest.raises(CheckpointError):
        load_segmenter(path, sha256="0" * 64)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError):
        load_segmenter(path)


# files -------------------------------------------------------------------------------------------------------------


def describe(name: str, **changes) -> ModelInfo:
    """What a file says about a small network of one of the four kinds."""
    kind = ({"task": "multi", "form": "small"} if name == "multi" else
            {"task": "single", "backbone": "small", "threshold": 0.4})
    return ModelInfo(**{**kind, "model": name, "size": SIZE, "data": "phantom", "data_kind": "phantom", **changes})


def network_of(name: str, seed: int = 0) -> torch.nn.Module:
    """A small network whose batch normalisation has seen something, so that a lost buffer would show."""
    torch.manual_seed(seed)
    network = MultiClassUNet("small") if name == "multi" else build_network(name, "small", "scratch")
    network(*inputs(name, 4))
    return network.eval()


def inputs(name: str, n: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.rand(n, 1, SIZE, SIZE, generator=generator) for _ in range(1 + (name == "multi")))


def answer(network: torch.nn.Module, name: str) -> torch.Tensor:
    with torch.inference_mode():
        outputs = network(*inputs(name))
    return outputs.logits if name == "multi" else outputs.s_3


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    return {name: network_of(name) for name in NAMES}


@pytest.fixture(scope="module")
def saved(networks, tmp_path_factory):
    """A weights file of the U-Net, and its bytes."""
    path = save_model(tmp_path_factory.mktemp("saved") / "unet.safetensors", networks["unet"], describe("unet"))
    return path, path.read_bytes()


def with_entry(content: bytes, change) -> bytes:
    """The file with its description changed by `change`, otherwise sound."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    metadata = header["__metadata__"]
    entry = json.loads(metadata["covidsev"])
    change(entry, metadata)
    if "covidsev" in metadata:
        metadata["covidsev"] = json.dumps(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length:]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_equal(name, networks, tmp_path):
    info = describe(name, window=(-600, 1500), seed=3, slices={"train": 5}, metrics={"test/dice": 1 / 3},
                    metrics_n={"test/dice": 7}, prior="priors/infnet-seed0" if name == "multi" else None)
    path, before = save_model(tmp_path / "x.safetensors", networks[name], info), torch.get_rng_state()
    loaded, said = load_model(path, sha256=sha256_file(path).upper())
    assert said == info and not loaded.training and torch.equal(before, torch.get_rng_state())
    assert torch.equal(answer(loaded, name), answer(networks[name], name))
    assert weights_hash(loaded) == weights_hash(networks[name])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.md", "x.safetensors"]


def test_bytes_repeat_in_another_process_that_has_no_onnx_loaded(saved, tmp_path):
    """Hash seeds and memory layout must not reach the file; the extra is loaded when it is needed only."""
    code = ("import sys; from covidsev.method.inference import *\n"
            "network, info = load_model(sys.argv[1])\n"
            "import torch; network = network.to(memory_format=torch.channels_last)\n"
            "save_model(sys.argv[2], network, info)\n"
            "print(*sorted({'onnx', 'onnxruntime'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, saved[0], tmp_path / "y.safetensors"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert (tmp_path / "y.safetensors").read_bytes() == saved[1]


class Canary:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch file"])
def test_a_pickle_in_disguise_is_refused_and_does_not_run(zipped, tmp_path):
    path, canary = tmp_path / "weights.safetensors", tmp_path / "canary"
    torch.save({"x": Canary(canary)}, path) if zipped else path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="PyTorch checkpoint" if zipped else "run code"):
        load_model(path)
    assert not canary.exists()


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("where", [0.0, 0.7, 1.0])
def test_one_flipped_bit_of_the_weights_is_found(saved, where, tmp_path):
    path, content = tmp_path / "x.safetensors", saved[1]
    first = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(flip(content, first + int(where * (len(content) - first - 1))))
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize("make, words", [
    (lambda c: c[:7], "7 bytes"), (lambda c: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (lambda c: b"\xff" * 64, "not a weights file"), (lambda c: c + b"more", "not a weights file"),
    (lambda c: struct.pack("<Q", 2) + b"[]" + c, "not a weights file"),
    (lambda c: struct.pack("<Q", 40_000) + b"[" * 40_000, "not a weights file"),
    (lambda c: struct.pack("<Q", 24) + b'{"__metadata__": [1, 2]}', "do not say what they are"),
    (lambda c: struct.pack("<Q", 19) + b'{"__metadata__": 7}', "do not say what they are"),
], ids=["seven bytes", "LFS pointer", "huge length", "appended", "list", "deep", "metadata list", "metadata number"])
def test_damaged_files_are_refused(saved, make, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(make(saved[1]))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_pipe_or_a_device_is_not_read_for_ever(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(CheckpointError, match="not a regular file"):
            load_model(path)


def test_a_missing_file_and_a_missing_device(saved, tmp_path):
    with pytest.raises(CheckpointError, match="covidsev export"):
        load_model(tmp_path / "nothing.safetensors")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not there"):
            load_model(saved[0], device="cuda")


@pytest.mark.parametrize("change, words", [
    (lambda e, m: m.pop("covidsev"), "do not say what they are"),
    (lambda e, m: e.pop("info"), "do not say what they are"), (lambda e, m: e.pop("sha256"), "do not say what they are"),
    (lambda e, m: e.update(format="covidsev-model-9"), MODEL_FORMAT), (lambda e, m: e["info"].update(extra=1), "extra"),
    (lambda e, m: e["info"].pop("size"), "size"),
    (lambda e, m: e["info"].update(window=[float("nan"), 1500]), "window"), (lambda e, m: e["info"].update(threshold=3), "threshold"),
    (lambda e, m: e["info"].update(threshold="high"), "cannot be used"), (lambda e, m: e["info"].update(model="vit"), "vit"),
    (lambda e, m: e["info"].update(backbone="../../x"), "not a weights file"),
    (lambda e, m: e["info"].update(threshold=0.1), "changed after they were written"),
    (lambda e, m: e["info"].update(size=64), "changed after they were written"),
    (lambda e, m: e["info"].update(model="segnet"), "another network"),
    (lambda e, m: e["info"].update(task="multi", model="multi", form="small", backbone=None), "another network"),
])
def test_a_description_that_does_not_fit_is_refused(saved, change, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_entry(saved[1], change))
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_weights_that_are_no_numbers_do_not_leave(tmp_path):
    network = network_of("unet")
    network.head.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="head.bias"):
        save_model(tmp_path / "x.safetensors", network, describe("unet"))
    assert not list(tmp_path.iterdir())


def test_the_code_of_the_card_runs(saved, monkeypatch):
    monkeypatch.chdir(saved[0].parent)
    code = card_path(saved[0]).read_text().partition("```python")[2].partition("```")[0]
    names = {"slices": inputs("unet")[0]}
    exec(code, names)
    assert names["logits"].shape == (3, 1, SIZE, SIZE)


# ------------------------------------------------------------------ from a run


@pytest.fixture
def run(tmp_path, networks):
    """A run folder as the runner publishes it, and its checkpoint where the runner puts it."""
    folder = tmp_path / "results" / "smoke" / "train_single" / "unet-seed0"
    folder.mkdir(parents=True)
    rows = ["subset,metric,value,n", "test,dice,0.25,12", "test,pooled_dice,0.5,12", "val,dice,0.75,6", "test,iou,1.0,12",
            "test_without_shared_scans,dice,,12"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    parts = {name: {"n": n, "sha256": "0"} for name, n in {"train": 24, "val": 6, "test": 12}.items()}
    write_json(folder / "run.json", {
        "run": "train_single/unet-seed0", "key": "ab" * 32,
        "network": {"model": "unet", "parameters": count_parameters(networks["unet"])},
        "parameters": {"data": "phantom", "size": SIZE, "seed": 0, "profile": "smoke", "row": "unet", "backbone": "small"},
        "data": {"kind": "phantom", "splits": parts}, "outputs": {"metrics.csv": sha256_file(folder / "metrics.csv")}})
    checkpoint = tmp_path / "checkpoints" / "smoke" / "train_single" / "unet-seed0" / "abababababab" / inference.WEIGHTS_FILE
    checkpoint.parent.mkdir(parents=True)
    save_checkpoint(checkpoint, {"weights": networks["unet"].state_dict(), "epoch": 1, "value": 0.1})
    return folder, checkpoint


def change(folder, values):
    write_json(folder / "run.json", {**read_json(folder / "run.json"), **values})


def test_a_run_becomes_a_file_with_its_own_numbers(run, networks, tmp_path):
    path = export_run(run[0], None, tmp_path / "out")
    network, info = load_model(path)
    assert path.name == "smoke-unet-seed0.safetensors"  # profile, row, seed
    assert weights_hash(network) == weights_hash(networks["unet"])
    assert (info.threshold, info.size, info.slices) == (0.5, SIZE, {"train": 24, "val": 6, "test": 12})
    assert info.metrics == {"test/dice": 0.25, "test/pooled_dice": 0.5} and info.metrics_n["test/dice"] == 12
    assert info.source_sha256 == sha256_file(run[1]) and info.run_key == "ab" * 32
    assert "| test | dice | 0.2500 | 12 |" in card_path(path).read_text()
    assert export_run(run[0], run[1], tmp_path / "named.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("values, error, words", [
    ({"run": "pretext/x-seed0"}, ConfigError, "no network that can be exported"),
    ({"parameters": {}}, ConfigError, "not complete"),
    ({"key": "cd" * 32, "parameters": {"profile": "cpu", "row": "unet", "seed": 2}}, ConfigError,
     "reproduce --profile cpu --only train_single --row unet --seed 2 --force"),
    ({"network": {"model": "unet", "parameters": 5}}, CheckpointError, "another network"),
    ({"network": {"model": "segnet"}}, CheckpointError, "another network"),
])
def test_runs_that_do_not_fit_are_refused(run, values, error, words, tmp_path):
    change(run[0], values)
    with pytest.raises(error, match=words):
        export_run(run[0], None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    run[1].write_bytes(run[1].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        export_run(run[0], None, tmp_path / "out")


def test_a_folder_of_covidsev_train(run, tmp_path):
    """It has no run name and no key, and its checkpoints lie below it."""
    record = read_json(run[0] / "run.json")
    write_json(run[0] / "run.json", {name: value for name, value in record.items() if name not in ("run", "key")})
    (run[0] / "checkpoints").mkdir()
    for name in (inference.WEIGHTS_FILE, f"{inference.WEIGHTS_FILE}.sha256"):
        run[1].with_name(name).rename(run[0] / "checkpoints" / name)
    assert load_model(export_run(run[0], None, tmp_path / "out"))[1].threshold == 0.5


# ------------------------------------------------------------------ ONNX


@pytest.mark.parametrize("name", ["infnet", "segnet", "multi"])  # the U-Net in the notebook
def test_onnx_answers_as_the_network_does(name, networks, tmp_path):
    pytest.importorskip("onnxruntime")
    info, path = describe(name), tmp_path / "x.onnx"
    parity = save_onnx(path, networks[name], info)
    assert parity.difference <= PARITY and parity.pixels == 4 * SIZE * SIZE
    session = pytest.importorskip("onnxruntime").InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert ModelInfo(**json.loads(session.get_modelmeta().custom_metadata_map["covidsev"])) == info
    for n in (1, 5):  # any number of slices, also ones that were not tried when the file was made
        given = inputs(name, n)
        with torch.inference_mode():
            ours = inference.logits_of(networks[name](*given)).numpy()
        theirs = session.run(None, {key: x.numpy() for key, x in zip(("image", "prior"), given)})[0]
        assert np.abs(theirs - ours).max() <= PARITY * max(1, np.abs(ours).max())


def test_without_the_extra_the_message_says_how_to_get_it(networks, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"covidsev\[export\]"):
        save_onnx(tmp_path / "x.onnx", networks["unet"], describe("unet"))
    assert not list(tmp_path.iterdir())


def test_an_info_cannot_lie_about_its_kind():
    for changes in ({"task": "both"}, {"model": "infnett"}, {"size": 0}, {"size": 3.5}, {"backbone": None}, {"form": "small"},
                    {"window": (1.0,)}, {"window": (float("nan"), 1500)}, {"window": (0, 0)}, {"threshold": -0.1}, {"threshold": float("nan")}):
        with pytest.raises(ConfigError):
            dataclasses.replace(describe("unet"), **changes)
