"""Lungs without weights: against the phantom's truth, with what goes wrong, and on real slices where there are some."""
import csv
import hashlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from covidsev.core import (CheckpointError, ChecksumError, ConfigError, CovidSevError, GeometryError, IntensityError,
                             MissingExtraError)
from covidsev.severity.lungs import (LungMask, LungSegmentationError, check_lungs, check_sides, cut_ends, complete_lungs,
                                     engine_lungs, find_lungs, from_planes, given_lungs, grow, otsu, plane_sizes,
                                     segment_lungs, shrink, split_lungs, to_planes, verify_weights)
from covidsev.method.metrics import dice
from covidsev.data.phantom import phantom_slice, phantom_volume, to_uint8


def canonical(array: np.ndarray) -> np.ndarray:
    """A phantom array (Z, H, W) in RAS+ order."""
    return np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1])


@pytest.fixture(scope="module")
def patient():
    """(HU, lungs, infection, spacing, airways) of a phantom with subpleural consolidation."""
    one = phantom_volume(5, (24, 128, 128), ggo_fraction=0.1, consolidation_fraction=0.12, subpleural=1.0)
    return canonical(one.hu), canonical(one.lungs), canonical(one.labels > 0), one.spacing_mm[::-1], canonical(one.airways)


@pytest.fixture(scope="module")
def found(patient):
    hu, _, infection, spacing, _ = patient
    return segment_lungs(hu, spacing, infection=infection)


def test_both_lungs_are_found_and_repaired(patient, found):
    _, lungs, infection, _, _ = patient
    assert dice(found.labels == 1, lungs == 1) > 0.97 and dice(found.labels == 2, lungs == 2) > 0.97
    assert dice(found.raw > 0, lungs > 0) < dice(found.labels > 0, lungs > 0) - 0.03
    true, without, repaired = (((infection & (mask > 0)).sum() / (mask > 0).sum()) for mask in (lungs, found.raw, found.labels))
    assert abs(repaired - true) < 0.01 < 0.05 < true - without
    assert 0.05 < found.repair_fraction < 0.25 and found.warnings == [] and found.lr_split == "components"


def test_inputs_stay_as_they_are_and_results_repeat(patient, found):
    hu, _, infection, spacing, _ = patient
    before = [hashlib.sha256(array.tobytes()).hexdigest() for array in (hu, infection)]
    again = segment_lungs(np.asfortranarray(hu), spacing, infection=infection.astype(np.float32))
    assert np.array_equal(again.labels, found.labels) and again.record() == found.record()
    assert [hashlib.sha256(array.tobytes()).hexdigest() for array in (hu, infection)] == before


def test_a_mirrored_patient_has_mirrored_lungs(patient, found):
    hu, _, infection, spacing, _ = patient
    mirrored = segment_lungs(hu[::-1], spacing, infection=infection[::-1]).labels[::-1]
    assert dice(mirrored == 1, found.labels == 2) > 0.99 and dice(mirrored == 2, found.labels == 1) > 0.99


def test_padding_far_below_air_changes_little(patient, found):
    hu, _, infection, spacing, _ = patient
    padded = hu.copy()
    padded[:3], padded[-3:] = -2048, -2048
    assert dice(segment_lungs(padded, spacing, infection=infection).labels > 0, found.labels > 0) > 0.999


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("unit", ["HU", "grey"])
def test_single_slices(seed, unit):
    one = phantom_slice(seed, 160, consolidation_fraction=0.08, subpleural=1.0)
    image = one.hu if unit == "HU" else to_uint8(one.hu)
    mask = segment_lungs(image, one.spacing_mm if unit == "HU" else None, unit, infection=one.labels > 0)
    assert dice(mask.labels == 1, one.lungs == 1) > 0.95 and dice(mask.labels == 2, one.lungs == 2) > 0.95
    assert mask.labels.shape == one.hu.shape and mask.labels.dtype == np.uint8


def test_a_grey_stack_has_no_litres(patient):
    hu, lungs, infection, spacing, _ = patient
    mask = segment_lungs(to_uint8(hu), None, "grey", infection=infection)
    assert dice(mask.labels > 0, lungs > 0) > 0.96 and not [note for note in mask.warnings if "litre" in note or " L" in note]


def test_a_healthy_patient_needs_no_repair():
    one = phantom_volume(9, (24, 96, 96), ggo_fraction=0, consolidation_fraction=0)
    empty = np.zeros(one.hu.shape, bool)
    mask = segment_lungs(canonical(one.hu), one.spacing_mm[::-1], infection=canonical(empty))
    assert mask.repair_fraction == 0 and np.array_equal(mask.labels, mask.raw)
    assert dice(mask.labels > 0, canonical(one.lungs) > 0) > 0.97


def test_growing_is_a_distance_below_a_radius():
    rng = np.random.default_rng(1)
    for radius, pixel in ((0.4, (1.0, 1.0)), (3.0, (1.0, 1.0)), (5.0, (0.7, 1.3)), (40.0, (1.0, 1.0))):
        mask = rng.random((9, 20, 31)) < 0.03
        far = np.stack([ndimage.distance_transform_edt(~one, sampling=pixel) for one in mask])
        assert np.array_equal(grow(mask, radius, pixel), far <= radius) and not grow(mask & False, radius).any()
        assert np.array_equal(shrink(~mask, radius, pixel), far > radius)


def test_the_windpipe_is_no_lung(patient):
    hu, lungs, _, spacing, airways = patient
    outside, lung = to_planes(airways) & (to_planes(lungs) == 0), to_planes(lungs) > 0
    found = to_planes(segment_lungs(hu, spacing).labels) > 0
    assert (found & outside).sum() < 0.2 * outside.sum() and (found & lung).sum() > 0.85 * lung.sum()


# the gates

def repair(labels, infection, image=None, body=None, spacing=(1.0, 1.0)):
    """Labels after the repair, and the added share."""
    image = np.full(labels.shape, 40.0) if image is None else image
    mask = LungMask(labels, labels, body=np.ones(labels.shape, bool) if body is None else body)
    found = complete_lungs(mask, image, spacing, infection=infection)
    return found.labels, found.repair_fraction


def test_what_is_not_near_a_lung_is_not_added(patient, found):
    hu, lungs, infection, spacing, _ = patient
    body = find_lungs(hu, spacing).body
    distant = np.zeros_like(infection)
    distant[54:66, 54:66, 0] = True  # below the lungs, in the liver
    rim = body & ~from_planes(shrink(to_planes(body), 10.0, plane_sizes(hu.shape, spacing)[:2]), 3)  # and the skin
    again = segment_lungs(hu, spacing, infection=infection | distant | rim)
    assert np.array_equal(again.labels, found.labels)


def test_bone_is_not_added():
    image = np.full((100, 100), 40.0)
    image[:, :10] = -1000
    image[30:70, 20:40], image[30:70, 60:80] = -850, -850
    image[30:70, 40:44], image[30:70, 80:84] = 500, 50  # beside the left edge of one lung bone, of the other consolidation
    labels = np.zeros((100, 100), np.uint8)
    labels[30:70, 20:40], labels[30:70, 60:80] = 1, 2
    repaired, fraction = repair(labels, (image == 500) | (image == 50), image)
    assert not repaired[30:70, 40:44].any() and (repaired[30:70, 80:84] == 2).all()
    assert fraction == pytest.approx(160 / 1760)


def test_a_piece_between_the_lungs_is_shared_by_distance():
    labels = np.zeros((60, 100), np.uint8)
    labels[12:48, 15:40], labels[12:48, 60:85] = 1, 2
    bridge = np.zeros((60, 100), bool)
    bridge[20:30, 40:60] = True
    repaired, _ = repair(labels, bridge)
    assert (repaired[20:30, 40:49] == 1).all() and (repaired[20:30, 51:60] == 2).all()


def test_repair_warns_and_then_refuses():
    labels = np.zeros((200, 200), np.uint8)
    labels[80:120, 20:40], labels[80:120, 150:170] = 1, 2
    infection = np.zeros((200, 200), bool)
    infection[80:120, 40:75] = True
    mask = LungMask(labels, labels, body=np.ones(labels.shape, bool))
    found = complete_lungs(mask, np.full(labels.shape, 40.0), (1.0, 1.0), infection=infection)
    assert 0.4 < found.repair_fraction < 0.7 and any(note.startswith("lung_repair_large") for note in found.warnings)
    with pytest.raises(LungSegmentationError, match="suspicious"):
        complete_lungs(mask, np.full(labels.shape, 40.0), (1.0, 1.0), infection=infection, strict=True)
    infection[20:180, 40:95] = True
    with pytest.raises(LungSegmentationError, match="more of the lung is guessed than found"):
        repair(labels, infection)


@given(st.integers(0, 2**32 - 1))
def test_repair_only_adds_and_only_infection_or_holes(seed):
    rng = np.random.default_rng(seed)
    labels = np.zeros((50, 54), np.uint8)
    labels[13:35, 11:23], labels[13:35, 31:43] = 1, 2
    infection = rng.random((50, 54)) < 0.2
    repaired, fraction = repair(labels, infection, spacing=(2.0, 2.0))
    assert (repaired[labels > 0] == labels[labels > 0]).all() and 0 <= fraction < 0.7
    added = (repaired > 0) & (labels == 0)
    rows, columns = np.nonzero(added & ~infection)  # holes only: closed in by one lung on four sides
    for row, column in zip(rows, columns, strict=True):
        lung = repaired == repaired[row, column]
        assert lung[:row, column].any() and lung[row:, column].any() and lung[row, :column].any() and lung[row, column:].any()


# right and left

def two_blocks(gap: int) -> np.ndarray:
    mask = np.zeros((60, 40, 8), bool)
    mask[4:28, 5:35], mask[28 + gap:56, 5:35] = True, True
    return mask


def test_components_and_one_lung():
    labels, how = split_lungs(two_blocks(3))
    assert how == "components" and (labels[4:28, 5:35] == 2).all() and (labels[31:56, 5:35] == 1).all()
    one, how = split_lungs(labels == 1)
    assert how == "single" and np.array_equal(one, np.where(labels == 1, 1, 0))
    moved, how = split_lungs(labels == 1, midline=55.0)
    assert how == "single" and moved.max() == 2


def test_small_pieces_follow_the_nearer_lung():
    mask = two_blocks(4)
    mask[8:20, 37:39] = True
    labels, how = split_lungs(mask)
    assert how == "components" and (labels[8:20, 37:39] == 2).all()


def test_pictures_have_the_right_lung_on_their_left():
    picture = np.zeros((40, 60), bool)
    picture[5:35, 4:28], picture[5:35, 32:56] = True, True
    labels, how = split_lungs(picture)
    assert how == "components" and (labels[5:35, 4:28] == 1).all() and (labels[5:35, 32:56] == 2).all()
    one, _ = split_lungs(picture & (np.arange(60) < 30))
    assert one.max() == 1 and split_lungs(picture & (np.arange(60) < 30), midline=2.0)[0].max() == 2


@pytest.mark.parametrize("thickness, how", [(2, "erosion"), (4, "erosion"), (12, "plane")])
def test_fused_lungs(thickness, how):
    mask = two_blocks(3)
    mask[28:31, 5:5 + thickness] = True
    labels, found = split_lungs(mask, (2.0, 2.0, 5.0))
    assert found == how and (labels[4:26, 5:35] == 2).all() and (labels[33:56, 5:35] == 1).all()
    assert np.array_equal(labels > 0, mask)
    again, _ = split_lungs(mask[::-1], (2.0, 2.0, 5.0))
    assert (again[::-1][4:26, 5:35] == 1).all()


def test_a_collapsed_lung_is_not_zero_but_missing(patient):
    hu, lungs, _, spacing, _ = patient
    collapsed = np.where(lungs == 2, 30.0, hu)
    mask = segment_lungs(collapsed, spacing)
    assert mask.lr_split == "single" and set(np.unique(mask.labels)) == {0, 1}
    assert any(note.startswith("single_lung: only the right") for note in mask.warnings)


def test_fused_lungs_are_said(patient):
    hu, lungs, _, spacing, _ = patient
    joined = hu.copy()
    level = int((lungs > 0).any(axis=(0, 1)).nonzero()[0].mean())
    plane = lungs[:, :, level]
    gaps = {row: (np.flatnonzero(plane[:, row] == 2).max(), np.flatnonzero(plane[:, row] == 1).min())
            for row in range(128) if {1, 2} <= set(plane[:, row])}
    row = min(gaps, key=lambda row: gaps[row][1] - gaps[row][0])
    joined[gaps[row][0] - 2:gaps[row][1] + 3, row:row + 2, level] = -850
    mask = segment_lungs(joined, spacing)
    assert mask.lr_split == "erosion" and any(note.startswith("lungs_fused") for note in mask.warnings)
    assert dice(mask.labels == 1, lungs == 1) > 0.85


# what is no lung, and what is suspicious

def test_no_lung_is_an_error_and_never_a_zero(patient):
    hu, lungs, infection, spacing, _ = patient
    with pytest.raises(LungSegmentationError, match="no lung was found"):
        segment_lungs(np.where(lungs > 0, 30.0, hu), spacing)
    with pytest.raises(LungSegmentationError, match="empty"):
        segment_lungs(hu, spacing, lungs=np.zeros_like(lungs))
    liver = phantom_slice(3, 128, level=1.0)
    with pytest.raises(LungSegmentationError, match="no lung"):
        segment_lungs(np.where(liver.lungs > 0, 40.0, liver.hu), liver.spacing_mm)
    assert issubclass(LungSegmentationError, CovidSevError)


def test_values_that_are_no_hu(patient):
    hu, _, _, spacing, _ = patient
    with pytest.raises(IntensityError, match="not Hounsfield units"):
        segment_lungs(hu + 1024, spacing)
    with pytest.raises(ConfigError, match="unit"):
        segment_lungs(hu, spacing, "hounsfield")


def names(notes: list[str]) -> set[str]:
    return {note.split(":")[0] for note in notes}


def test_each_warning(patient):
    _, lungs, _, spacing, _ = patient
    assert check_lungs(lungs, spacing) == []
    assert names(check_lungs(lungs[:, :, ::-1], spacing)) == {"z_suspect"}
    assert names(check_lungs(lungs, tuple(2.5 * mm for mm in spacing))) == {"lung_volume_implausible"}
    assert "single_lung" in names(check_lungs(np.where(lungs == 1, 1, 0).astype(np.uint8), spacing))
    small = np.where((lungs == 2) & (np.arange(128)[None, :, None] < 75), 0, lungs).astype(np.uint8)
    assert "lung_asymmetry" in names(check_lungs(small, spacing))
    across = np.flatnonzero((lungs > 0).any(axis=(1, 2)))
    assert "lung_at_border" in names(check_lungs(lungs[across[0]:], spacing))
    jump = lungs.copy()
    jump[:, :, 12] = 0
    assert "lung_area_jump" in names(check_lungs(jump, spacing))
    cut = check_lungs(lungs[:, :, :12], spacing)
    assert any(note == "fov_truncated: the lungs reach the top slice" for note in cut)
    turned = check_lungs(lungs[:, :, 8:][:, :, ::-1], spacing)  # cut off at the base, and upside down
    assert {"z_suspect", "fov_truncated"} <= names(turned) and "z_suspect" not in names(check_lungs(lungs[:, :, 8:], spacing))
    body = np.ones((60, 40), bool)
    tiny = np.zeros((60, 40), np.uint8)
    tiny[10:14, 10:14], tiny[30:34, 10:14] = 1, 2
    assert names(check_lungs(tiny, body=body)) == {"lung_area_implausible"}


def test_a_few_pixels_in_the_last_slice_cut_nothing_off(patient):
    assert cut_ends([3, 100, 50, 3]) == [] and cut_ends([4, 100, 0]) == ["bottom"] and cut_ends([0, 9, 100]) == ["top"]
    _, lungs, _, spacing, _ = patient
    first = np.flatnonzero(lungs.any(axis=(0, 1)))[0]
    part = lungs[:, :, first + 1:].copy()
    rows, columns = np.nonzero(part[:, :, 0])
    part[rows[20:], columns[20:], 0] = 0
    assert "fov_truncated" not in names(check_lungs(part, spacing))


@pytest.mark.parametrize("inverted", [False, True])
def test_sides_that_change_in_a_band_of_slices_are_put_right(patient, inverted):
    _, lungs, _, spacing, _ = patient
    lungs = np.where(lungs > 0, 3 - lungs, 0).astype(np.uint8) if inverted else lungs
    band = lungs.copy()
    band[:, :, 9:14] = np.where(band[:, :, 9:14] > 0, 3 - band[:, :, 9:14], 0)
    found = given_lungs(band, spacing, situs_inversus=inverted)
    assert np.array_equal(found.labels, lungs) and found.warnings == [
        "sides_swapped: the given lung mask changed right and left in 5 slices; put right"]
    assert given_lungs(lungs, spacing, situs_inversus=inverted).warnings == []


@pytest.mark.parametrize("seed", range(3))
def test_lungs_that_are_open_to_the_edge_of_a_cropped_figure_are_kept(seed):
    one = phantom_slice(seed, 160)
    columns = np.flatnonzero(one.lungs.any(axis=0))
    figure, lungs = (array[:, columns[0] + 5:columns[-1] - 4] for array in (to_uint8(one.hu), one.lungs))
    mask = segment_lungs(figure, None, "grey")
    assert dice(mask.labels == 1, lungs == 1) > 0.88 and dice(mask.labels == 2, lungs == 2) > 0.88  # no infection given
    assert "lung_at_border" in names(mask.warnings)
    with pytest.raises(LungSegmentationError):  # the air around a patient is no lung
        segment_lungs(np.where(one.body, 120, 0).astype(np.uint8), None, "grey")


def test_given_lungs_are_split_checked_and_repaired(patient):
    hu, lungs, infection, spacing, _ = patient
    one = segment_lungs(hu, spacing, lungs=lungs > 0)
    assert np.array_equal(one.labels, lungs) and one.method == "given" and one.lr_split == "components"
    healthy = np.where(infection, 0, lungs).astype(np.uint8)  # as a mask that leaves the disease out
    mended = segment_lungs(hu, spacing, lungs=healthy, infection=infection)
    assert dice(mended.labels > 0, lungs > 0) > 0.98 > dice(healthy > 0, lungs > 0)
    swapped = np.where(lungs > 0, 3 - lungs, 0).astype(np.uint8)
    with pytest.raises(GeometryError, match="right lung lies on patient's left.*"):
        segment_lungs(hu, spacing, lungs=swapped)
    assert np.array_equal(segment_lungs(hu, spacing, lungs=swapped, situs_inversus=True).labels, swapped)
    with pytest.raises(GeometryError, match="situs-inversus"):
        check_sides(lungs, situs_inversus=True)
    with pytest.raises(GeometryError, match="differ in shape"):
        segment_lungs(hu, spacing, lungs=lungs[1:])
    with pytest.raises(GeometryError, match="--lobes"):
        segment_lungs(hu, spacing, lungs=np.where(lungs > 0, 3 * lungs, 0))


@pytest.mark.parametrize("shape, spacing, text", [((4, 4), (1.0,), "2 sizes"), ((4, 4, 4), (1.0, 1.0, 0.0), "3 sizes"),
                                                  ((4,), None, "neither a slice"), ((4, 4), (1.0, np.nan), "2 sizes")])
def test_sizes_that_do_not_fit(shape, spacing, text):
    with pytest.raises(GeometryError, match=text):
        plane_sizes(shape, spacing)


def test_otsu_splits_two_peaks():
    rng = np.random.default_rng(0)
    grey = np.concatenate([rng.normal(60, 8, 4000), rng.normal(190, 15, 6000)])
    assert 90 < otsu(grey) < 150
    assert otsu(np.full(10, 7)) == 7  # one value: nothing to split, and no warning


# engines

@pytest.fixture()
def weights(tmp_path) -> Path:
    import torch

    torch.save({"weight": torch.zeros(3)}, tmp_path / "plain.pth")
    digest = hashlib.sha256((tmp_path / "plain.pth").read_bytes()).hexdigest()
    return (tmp_path / "plain.pth").rename(tmp_path / f"unet-{digest[:8]}.pth")


def stand_in(monkeypatch, patient, relabel):
    """lungmask as it would answer: its own order of axes, its own numbers; returns the options that it was given."""
    seen = {}
    hu, lungs = patient[:2]

    class LMInferer:
        def __init__(self, **options):
            seen.update(options)

        def apply(self, array):
            assert np.array_equal(array, hu.T[:, ::-1, ::-1])  # planes upwards, rows to the back, columns to the left
            return relabel(lungs.T[:, ::-1, ::-1])
    monkeypatch.setitem(sys.modules, "lungmask", types.SimpleNamespace(LMInferer=LMInferer))
    return seen


def test_lungmask_answers_in_our_order(monkeypatch, patient, weights):
    seen = stand_in(monkeypatch, patient, lambda lungs: lungs.copy())
    mask = engine_lungs("lungmask", patient[0], patient[3], weights=weights)
    assert np.array_equal(mask.labels, patient[1]) and mask.kind == "lungs" and len(mask.weights_sha256) == 64
    assert seen["modelpath"] == str(weights) and seen["force_cpu"] and seen["modelname"] == "R231"


def test_swapped_answers_of_an_engine_are_refused(monkeypatch, patient, weights):
    stand_in(monkeypatch, patient, lambda lungs: np.where(lungs > 0, 3 - lungs, 0))
    with pytest.raises(GeometryError, match="right lung lies on patient's left"):
        engine_lungs("lungmask", patient[0], patient[3], weights=weights)


def test_weights_are_verified_before_anything_is_loaded(monkeypatch, patient, weights, tmp_path):
    stand_in(monkeypatch, patient, lambda lungs: lungs)
    hu, _, _, spacing, _ = patient
    for given, error, text in [
            ({"weights": weights, "sha256": "00" * 32}, ChecksumError, "other weights"),
            ({"weights": tmp_path / "none-00000000.pth"}, ConfigError, "not there"), ({}, ConfigError, "--lung-weights"),
            ({"weights": weights, "model": "R232"}, ConfigError, "R231"),
            ({"weights": weights, "device": "cuda:99"}, ConfigError, "cuda:99")]:
        with pytest.raises(error, match=text):
            engine_lungs("lungmask", hu, spacing, **given)
    unnamed = tmp_path / "weights.pth"
    unnamed.write_bytes(weights.read_bytes())
    with pytest.raises(ConfigError, match="SHA-256"):
        verify_weights(unnamed)
    assert verify_weights(unnamed, verify_weights(weights)) == verify_weights(weights)
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ChecksumError):
        verify_weights(weights)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_that_run_code_are_refused(monkeypatch, patient, tmp_path):
    import torch

    stand_in(monkeypatch, patient, lambda lungs: lungs)
    path, canary = tmp_path / "evil.pth", tmp_path / "canary"
    torch.save({"weight": Canary(canary)}, path)
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        engine_lungs("lungmask", patient[0], patient[3], weights=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert not canary.exists()


def test_engines_that_are_not_there(monkeypatch, patient, weights, tmp_path):
    for name in ("lungmask", "totalsegmentator", "totalsegmentator.python_api"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match="covidsev.ct"):
        engine_lungs("lungmask", patient[0], weights=weights)
    make_home(tmp_path)
    with pytest.raises(MissingExtraError, match="pip install TotalSegmentator"):
        engine_lungs("totalsegmentator", patient[0], weights=tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'lungmask'"):
        engine_lungs("lungmsk", patient[0])
    with pytest.raises(GeometryError, match="needs a volume"):
        engine_lungs("lungmask", np.zeros((50, 50)), weights=weights)


def make_home(home: Path) -> None:
    model = home / "nnunet" / "results" / "Dataset297_total" / "fold_0"
    model.mkdir(parents=True)
    (model / "checkpoint_final.pth").write_bytes(b"weights")


def test_totalsegmentator_by_name_and_without_a_network(monkeypatch, patient, tmp_path):
    hu, lungs, _, spacing, _ = patient
    numbers = {"lung_upper_lobe_left": 30, "lung_lower_lobe_left": 31, "lung_upper_lobe_right": 7,
               "lung_middle_lobe_right": 8, "lung_lower_lobe_right": 9, "liver": 5}  # not those of any version
    calls = []

    def refuse(*arguments, **options):
        raise AssertionError("a network was asked")

    def run(image, output, **options):
        import nibabel

        api.download_pretrained_weights(297)
        api.send_usage_stats({})
        calls.append((options, os.environ["TOTALSEG_HOME_DIR"]))
        answer = np.where(lungs == 1, numbers["lung_lower_lobe_right"], np.where(lungs == 2, numbers["lung_upper_lobe_left"], 5))
        return nibabel.Nifti1Image(answer.astype(np.uint8), image.affine)

    api = types.SimpleNamespace(totalsegmentator=run, download_pretrained_weights=refuse, send_usage_stats=refuse)
    names = types.SimpleNamespace(class_map={"total": {number: name for name, number in numbers.items()}})
    monkeypatch.setitem(sys.modules, "totalsegmentator", types.SimpleNamespace(python_api=api, map_to_binary=names))
    monkeypatch.setitem(sys.modules, "totalsegmentator.python_api", api)
    monkeypatch.setitem(sys.modules, "totalsegmentator.map_to_binary", names)
    with pytest.raises(ConfigError, match="Dataset297 are not there"):
        engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path)
    make_home(tmp_path)
    mask = engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path)
    assert mask.kind == "lobes" and np.array_equal(mask.labels, np.choose(lungs, (0, 3, 4)))
    assert calls[0][0]["fast"] and calls[0][1] == str(tmp_path) and "TOTALSEG_HOME_DIR" not in os.environ
    assert api.send_usage_stats is refuse and api.download_pretrained_weights is refuse  # put back
    with pytest.raises(ChecksumError):
        engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path, sha256="00")
    assert engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path, sha256=mask.weights_sha256).labels.any()
    del names.class_map["total"][7]
    with pytest.raises(LungSegmentationError, match="names its lobes differently"):
        engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path)


# real slices

def real_slices(root: Path):
    """Every eighth slice of the 20-case set that has a CT, upright: name, case, CT, lungs, infection.

    The rule for grey pictures was chosen on the slices 0, 4, 8, ... of this order; these are 2, 10, 18, ..."""
    from covidsev.data.pictures import read_image, read_mask

    cases = {row["file"]: row["case_inferred"] for row in csv.DictReader(open(root / "slices.csv", encoding="utf-8"))}
    for path in sorted((root / "ct").iterdir())[2::8]:
        arrays = read_image(path), read_mask(root / "lungs" / path.name), read_mask(root / "covid" / path.name)
        upside_down = cases[path.name].startswith("radiopaedia")
        yield path.name, cases[path.name], *(array[::-1].copy() if upside_down else array for array in arrays)


def test_real_slices(data_root):
    """Real, sharpened 8-bit slices with expert masks. The numbers are printed (pytest -s); the bounds are loose."""
    root = data_root / "covid19-ct-seg-slices"
    if not root.is_dir():
        pytest.skip("needs the slices of the 20-case set in the data folder")
    rows, missed = [], 0
    for _, case, ct, lungs, infection in real_slices(root):
        try:
            mask = segment_lungs(ct, None, "grey", infection=infection)
        except LungSegmentationError:
            missed += 1
            continue
        share = [100 * (infection & one).sum() / one.sum() for one in (lungs, mask.raw > 0, mask.labels > 0)]
        rows.append([case.startswith("corona"), dice(mask.raw > 0, lungs), dice(mask.labels > 0, lungs), *share])
    numbers = np.array(rows, float)
    for name, chosen in (("coronacases", numbers[:, 0] == 1), ("radiopaedia", numbers[:, 0] == 0)):
        part = numbers[chosen]
        print(f"\n{name}: {len(part)} slices, Dice mean {part[:, 1].mean():.3f} without and {part[:, 2].mean():.3f} with "
              f"repair, median {np.median(part[:, 2]):.3f}, above 0.9 {np.mean(part[:, 2] > 0.9):.0%}; mean absolute error "
              f"of PO {np.abs(part[:, 4] - part[:, 3]).mean():.1f} without, {np.abs(part[:, 5] - part[:, 3]).mean():.1f} "
              "with, in percentage points", end="")
    print(f"; no lung found in {missed}")
    assert len(rows) > 40 and np.median(numbers[:, 2]) > 0.9 and missed < 0.1 * len(rows)


def test_sides_of_real_masks(data_root):
    """Expert lung masks of real slices: the two largest pieces are told apart as right and left of the picture."""
    root = data_root / "covid19-ct-seg-slices"
    if not root.is_dir():
        pytest.skip("needs the slices of the 20-case set in the data folder")
    how = []
    for _, _, _, lungs, _ in real_slices(root):
        labels, found = split_lungs(lungs)
        how.append(found)
        if found == "components":
            check_sides(labels)
    print({name: how.count(name) for name in set(how)})
    assert how.count("components") > 0.7 * len(how)
