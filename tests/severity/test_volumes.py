"""Prediction on volumes: what a user gets is what was measured, on the voxels of the input, and never without weights."""

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from covidsev.method.unets import build_network
from covidsev.core import CheckpointError, ConfigError, GeometryError
from covidsev.data.datasets import SliceSet, for_display
from covidsev.method.export import ModelInfo, save_model
from covidsev.method.inference import predict_slices
from covidsev.method.losses import SideOutputs
from covidsev.method.multiclass import MultiClassUNet
from covidsev.data.phantom import phantom_volume, to_uint8
from covidsev.core import sha256_file
from covidsev.data.scans import Scan, make_grid, read_scan, turn_picture, write_mask
from covidsev.severity.volumes import (SecondStage, Segmenter, as_volume, load_segmenter, lung_box, network_slices, segment,
                              segment_scan, training_view)


class Bright(nn.Module):
    """Positive where a slice is brighter than middle grey: a network whose answer is known."""

    def forward(self, images):
        return SideOutputs(None, None, None, 100 * (images - 0.5), None)


class Corner(nn.Module):
    """Positive in the quarter at the start of rows and columns of a training slice."""

    def forward(self, images):
        side = images.shape[-1]
        half = torch.arange(side) < side // 2
        return SideOutputs(None, None, None, torch.where(half[:, None] & half, 9.0, -9.0).expand(images.shape), None)


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


def test_the_masks_are_those_that_were_scored(scan, network, patient):
    """`predict_slices` made the numbers of the paper."""
    box = lung_box(patient["lungs"], patient["spacing"])
    for kind in ("real", "phantom"):
        pictures = list(network_slices(scan, box, kind))
        names = [str(k) for k in range(len(pictures))]
        slices = SliceSet("x", "unknown", names, pictures, [0 * one for one in pictures], names)
        maps = predict_slices(network, slices, 64)
        cut = float(np.median(maps[5]))
        expected = np.stack([turn_picture(for_display(one >= cut, kind)) for one in maps], axis=-1)
        found = segment_scan(scan, network, size=64, threshold=cut, kind=kind, box=box)
        assert found.dtype == np.uint8 and np.array_equal(found[box], expected) and 0.1 < expected.mean() < 0.9


def test_window_and_native_size(scan, patient):
    """A network that answers with its own input gives the windowed volume back: grey 127.5 is -600 HU."""
    found = segment_scan(scan, Bright(), size=64, threshold=0.5)
    assert np.array_equal(found, np.stack([to_uint8(patient["hu"][:, :, k]) > 127 for k in range(12)], axis=-1))
    other = segment_scan(scan, Bright(), size=64, threshold=0.5, window=(40.0, 400.0))
    assert np.array_equal(other, to_uint8(patient["hu"], 40, 400) > 127) and other.sum() < found.sum()
    coarse = segment_scan(scan, Bright(), size=32, threshold=0.5)
    assert coarse.shape == found.shape and np.mean(coarse == found) > 0.9


@pytest.mark.parametrize("kind, where", [("phantom", (np.s_[32:], np.s_[32:])), ("real", (np.s_[32:], np.s_[32:]))])
def test_training_orientation(scan, kind, where):
    """The first rows and columns of a training slice hold the patient's right (left on a screen) and the front."""
    found = segment_scan(scan, Corner(), size=64, threshold=0.5, kind=kind)
    expected = np.zeros_like(found)
    expected[where[0], where[1]] = 1
    assert np.array_equal(found, expected)


def test_real_training_slices_lie_like_this(data_root):
    """In COVID-SemiSeg the spine is in the right half of the array (as far as brightness can tell)."""
    from covidsev.data.datasets import load_covid_semiseg, spine_at_left

    slices = load_covid_semiseg(data_root, "test")
    assert sum(not spine_at_left(image) for image in slices.images) > 0.7 * len(slices)
    phantom = phantom_volume(seed=5, shape=(12, 64, 64)).hu[6]
    assert not spine_at_left(training_view(turn_picture(to_uint8(phantom)), "real"))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
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


@pytest.mark.parametrize("shape", [(64, 64), (41, 97), (33, 150)])
def test_slices_of_any_aspect(network, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    scan = Scan(picture, "slice", "grey", "x", "0" * 64)
    found = segment_scan(scan, network, size=64, threshold=0.4, kind="phantom")
    assert found.shape == shape and found.dtype == np.uint8
    assert np.array_equal(segment_scan(scan, Bright(), size=max(shape), threshold=0.5, kind="real").shape, shape)


def test_slice_and_volume_agree(scan, network):
    plane = Scan(turn_picture(scan.hu[:, :, 6]).copy(), "slice", "HU", "x", "0" * 64)
    alone = segment_scan(plane, network, size=64, threshold=0.4)
    within = segment_scan(scan, network, size=64, threshold=0.4, batch_size=1)
    assert np.array_equal(as_volume(alone)[:, :, 0], within[:, :, 6])


def test_second_network_gets_the_first_ones_map(scan, network, patient):
    """A second network that repeats its prior: class 1 exactly where the prior is above one half."""

    class Echo(nn.Module):
        def forward(self, images, priors):
            from covidsev.method.multiclass import MultiClassOutputs

            assert ((255 * priors) % 1 < 1e-3).logical_or((255 * priors) % 1 > 1 - 1e-3).all()
            return MultiClassOutputs(torch.cat([0.5 - priors, priors - 0.5, priors - 9], 1))

    both = segment_scan(scan, Bright(), size=64, threshold=0.9, second=SecondStage(Echo(), 64))
    assert np.array_equal(both, segment_scan(scan, Bright(), size=64, threshold=0.5))


def test_box_and_margin(patient):
    lungs, spacing = patient["lungs"], patient["spacing"]
    box = lung_box(lungs, spacing, 0)
    assert (lungs[box] > 0).sum() == (lungs > 0).sum()
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        edge = (lungs > 0).any(axis=others)
        assert edge[box[axis].start] and edge[box[axis].stop - 1]
    wide = lung_box(lungs, spacing, 2 * spacing[0])
    assert (wide[0].start, wide[2]) == (box[0].start - 2, box[2])
    flat = lung_box(turn_picture(lungs[:, :, 6]), spacing[1::-1], 0)
    assert (lungs[:, :, 6:7][flat] > 0).sum() == (lungs[:, :, 6] > 0).sum()
    with pytest.raises(GeometryError, match="empty lung mask"):
        lung_box(np.zeros((40, 40)))


def test_crop_depends_on_what_the_network_was_trained_on(scan, patient):
    stand_in = Segmenter(Bright(), 64, 0.5, "phantom", (-600.0, 1500.0), "0" * 64)
    has_lung = (patient["lungs"] > 0).any(axis=(0, 1))
    whole = segment(scan, stand_in, patient["lungs"])
    assert whole[:, :, has_lung].any() and not whole[:, :, ~has_lung].any() and (~has_lung).any()
    box = lung_box(patient["lungs"], scan.spacing_mm)
    assert whole.sum() > whole[box].sum()  # the chest wall too
    cropped = segment(scan, Segmenter(Bright(), 64, 0.5, "real", (-600.0, 1500.0), "0" * 64), patient["lungs"])
    assert cropped[box].any() and cropped.sum() == cropped[box].sum()


def test_wrong_settings(scan):
    for threshold in (0.0, 1.0, 50):
        with pytest.raises(ConfigError, match="threshold is a probability"):
            segment_scan(scan, Bright(), size=64, threshold=threshold)
    with pytest.raises(ConfigError, match="did you mean 'phantom'"):
        segment_scan(scan, Bright(), size=64, threshold=0.5, kind="phantoms")


def test_inputs_stay_as_they_were(scan, network):
    before = scan.hu.copy()
    segment_scan(scan, network, size=64, threshold=0.4)
    assert np.array_equal(before, scan.hu)


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


def test_wrong_weights(tmp_path, network):
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


def test_one_bar_and_silence(monkeypatch, capfd):
    """A bar counts slices on the error stream; with COVIDSEV_QUIET nothing is printed."""
    scan = Scan(np.zeros((40, 40, 5), np.float32), "volume", "HU", "x", "0" * 64)
    for quiet, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("COVIDSEV_QUIET", quiet)
        monkeypatch.setenv("CI", "0")
        segment_scan(scan, Bright(), size=32, threshold=0.5)
        printed = capfd.readouterr()
        assert ("slices: " in printed.err and "/5" in printed.err) == shown and printed.out == ""
