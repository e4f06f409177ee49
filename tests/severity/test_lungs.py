"""Lungs without weights: against the phantom's truth, with what goes wrong, and on real slices where there are some."""
import hashlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covidsev.core import (CheckpointError, ChecksumError, ConfigError, GeometryError, IntensityError,
                           MissingExtraError)
from covidsev.data.phantom import phantom_slice, phantom_volume, to_uint8
from covidsev.data.pictures import read_image, read_mask
from covidsev.data.sources import read_rows
from covidsev.method.metrics import dice
from covidsev.severity.lungs import (LungMask, LungSegmentationError, check_lungs, check_sides, complete_lungs,
                                     engine_lungs, given_lungs, otsu, plane_sizes, segment_lungs, split_lungs,
                                     to_planes, verify_weights)


def canonical(array: np.ndarray) -> np.ndarray:
    """A phantom array (Z, H, W) in RAS+ order."""
    return np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1])


@pytest.fixture(scope="module")
def patient():
    """(HU, lungs, infection, spacing, airways) of a phantom with subpleural consolidation."""
    one = phantom_volume(5, (24, 128, 128), ggo_fraction=0.1, consolidation_fraction=0.12, subpleural=1.0)
    hu, lungs, infection, airways = map(canonical, (one.hu, one.lungs, one.labels > 0, one.airways))
    return hu, lungs, infection, one.spacing_mm[::-1], airways


@pytest.fixture(scope="module")
def found(patient):
    hu, _, infection, spacing, _ = patient
    return segment_lungs(hu, spacing, infection=infection)


def test_both_lungs_are_found_and_repaired(patient, found):
    _, lungs, infection, _, _ = patient
    assert all(dice(found.labels == side, lungs == side) > 0.97 for side in (1, 2))
    assert dice(found.raw > 0, lungs > 0) < dice(found.labels > 0, lungs > 0) - 0.03
    true, without, repaired = (infection[mask > 0].mean() for mask in (lungs, found.raw, found.labels))
    assert abs(repaired - true) < 0.01 < 0.05 < true - without
    assert 0.05 < found.repair_fraction < 0.25 and found.warnings == [] and found.lr_split == "components"


def test_inputs_stay_as_they_are_and_results_repeat(patient, found):
    hu, _, infection, spacing, _ = patient
    before = hu.copy(), infection.copy()
    again = segment_lungs(np.asfortranarray(hu), spacing, infection=infection.astype(np.float32))
    assert np.array_equal(again.labels, found.labels) and again.record() == found.record()
    assert np.array_equal(hu, before[0]) and np.array_equal(infection, before[1])


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
    image, spacing = (one.hu, one.spacing_mm) if unit == "HU" else (to_uint8(one.hu), None)
    mask = segment_lungs(image, spacing, unit, infection=one.labels > 0)
    assert all(dice(mask.labels == side, one.lungs == side) > 0.95 for side in (1, 2))
    assert mask.labels.shape == one.hu.shape and mask.labels.dtype == np.uint8


def test_a_grey_stack_has_no_litres(patient):
    hu, lungs, infection, spacing, _ = patient
    mask = segment_lungs(to_uint8(hu), None, "grey", infection=infection)
    assert dice(mask.labels > 0, lungs > 0) > 0.96
    assert not [note for note in mask.warnings if "litre" in note or " L" in note]


def test_a_healthy_patient_needs_no_repair():
    one = phantom_volume(9, (24, 96, 96), ggo_fraction=0, consolidation_fraction=0)
    mask = segment_lungs(canonical(one.hu), one.spacing_mm[::-1], infection=canonical(one.labels > 0))
    assert mask.repair_fraction == 0 and np.array_equal(mask.labels, mask.raw)
    assert dice(mask.labels > 0, canonical(one.lungs) > 0) > 0.97


def test_the_windpipe_is_no_lung(patient):
    hu, lungs, _, spacing, airways = patient
    outside, lung = to_planes(airways) & (to_planes(lungs) == 0), to_planes(lungs) > 0
    found = to_planes(segment_lungs(hu, spacing).labels) > 0
    assert (found & outside).sum() < 0.2 * outside.sum() and (found & lung).sum() > 0.85 * lung.sum()


# the gates

def boxes(shape, *places):
    """Zeros with the numbers 1, 2, ... in boxes of rows and columns."""
    labels = np.zeros(shape, np.uint8)
    for number, (top, bottom, left, right) in enumerate(places, 1):
        labels[top:bottom, left:right] = number
    return labels


def repair(labels, infection, image=None, spacing=(1.0, 1.0), **options):
    """The lungs after the repair; all of the picture is body, of 40 HU where no image is given."""
    image = np.full(labels.shape, 40.0) if image is None else image
    mask = LungMask(labels, labels, body=np.ones(labels.shape, bool))
    return complete_lungs(mask, image, spacing, infection=infection, **options)


def test_what_is_not_near_a_lung_is_not_added(patient, found):
    hu, _, infection, spacing, _ = patient
    distant = infection.copy()
    distant[54:66, 54:66, 0] = True  # below the lungs, in the liver
    assert np.array_equal(segment_lungs(hu, spacing, infection=distant).labels, found.labels)


def test_bone_is_not_added():
    image = np.full((100, 100), 40.0)
    image[:, :10] = -1000
    image[30:70, 20:40], image[30:70, 60:80] = -850, -850
    image[30:70, 40:44], image[30:70, 80:84] = 500, 50  # beside the left edge of one lung bone, of the other consolidation
    labels = boxes((100, 100), (30, 70, 20, 40), (30, 70, 60, 80))
    repaired = repair(labels, (image == 500) | (image == 50), image)
    assert not repaired.labels[30:70, 40:44].any() and (repaired.labels[30:70, 80:84] == 2).all()
    assert repaired.repair_fraction == pytest.approx(160 / 1760)


def test_a_piece_between_the_lungs_is_shared_by_distance():
    labels = boxes((60, 100), (12, 48, 15, 40), (12, 48, 60, 85))
    repaired = repair(labels, boxes((60, 100), (20, 30, 40, 60)) > 0).labels
    assert (repaired[20:30, 40:49] == 1).all() and (repaired[20:30, 51:60] == 2).all()


def test_repair_warns_and_then_refuses():
    labels = boxes((200, 200), (80, 120, 20, 40), (80, 120, 150, 170))
    infection = boxes((200, 200), (80, 120, 40, 75)) > 0
    found = repair(labels, infection)
    assert 0.4 < found.repair_fraction < 0.7 and any(note.startswith("lung_repair_large") for note in found.warnings)
    pytest.raises(LungSegmentationError, repair, labels, infection, strict=True).match("suspicious")
    infection[20:180, 40:95] = True
    with pytest.raises(LungSegmentationError, match="more of the lung is guessed than found"):
        repair(labels, infection)


@given(st.integers(0, 2**32 - 1))
def test_repair_only_adds_and_only_infection_or_holes(seed):
    labels = boxes((50, 54), (13, 35, 11, 23), (13, 35, 31, 43))
    infection = np.random.default_rng(seed).random((50, 54)) < 0.2
    found = repair(labels, infection, spacing=(2.0, 2.0))
    repaired = found.labels
    assert (repaired[labels > 0] == labels[labels > 0]).all() and 0 <= found.repair_fraction < 0.7
    for row, column in np.argwhere((repaired > 0) & (labels == 0) & ~infection):  # a hole: closed in on four sides
        lung = repaired == repaired[row, column]
        assert all(part.any() for part in (lung[:row, column], lung[row:, column], lung[row, :column], lung[row, column:]))


# right and left

def two_blocks(gap: int) -> np.ndarray:
    mask = np.zeros((60, 40, 8), bool)
    mask[4:28, 5:35], mask[28 + gap:56, 5:35] = True, True
    return mask


def test_components_and_one_lung():
    labels, how = split_lungs(two_blocks(3))
    assert how == "components" and (labels[4:28, 5:35] == 2).all() and (labels[31:56, 5:35] == 1).all()
    one, how = split_lungs(labels == 1)
    assert how == "single" and np.array_equal(one, labels == 1)
    moved, how = split_lungs(labels == 1, midline=55.0)
    assert how == "single" and moved.max() == 2


def test_small_pieces_follow_the_nearer_lung():
    mask = two_blocks(4)
    mask[8:20, 37:39] = True
    labels, how = split_lungs(mask)
    assert how == "components" and (labels[8:20, 37:39] == 2).all()


def test_pictures_have_the_right_lung_on_their_left():
    lungs = boxes((40, 60), (5, 35, 4, 28), (5, 35, 32, 56))
    labels, how = split_lungs(lungs > 0)
    assert how == "components" and np.array_equal(labels, lungs)
    assert split_lungs(lungs == 1)[0].max() == 1 and split_lungs(lungs == 1, midline=2.0)[0].max() == 2


@pytest.mark.parametrize("thickness, how", [(2, "erosion"), (4, "erosion"), (12, "plane")])
def test_fused_lungs(thickness, how):
    mask = two_blocks(3)
    mask[28:31, 5:5 + thickness] = True
    labels, found = split_lungs(mask, (2.0, 2.0, 5.0))
    assert found == how and (labels[4:26, 5:35] == 2).all() and (labels[33:56, 5:35] == 1).all()
    assert np.array_equal(labels > 0, mask)
    assert (split_lungs(mask[::-1], (2.0, 2.0, 5.0))[0][::-1][4:26, 5:35] == 1).all()


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
    hu, lungs, _, spacing, _ = patient
    liver = phantom_slice(3, 128, level=1.0)
    for image, mm, given, words in ((np.where(lungs > 0, 30.0, hu), spacing, None, "no lung was found"),
                                    (hu, spacing, np.zeros_like(lungs), "empty"),
                                    (np.where(liver.lungs > 0, 40.0, liver.hu), liver.spacing_mm, None, "no lung")):
        pytest.raises(LungSegmentationError, segment_lungs, image, mm, lungs=given).match(words)


def test_values_and_units_that_cannot_be(patient):
    hu, _, _, spacing, _ = patient
    for values, unit, error, words in ((hu + 1024, "HU", IntensityError, "not Hounsfield units"),
                                       (hu, "hounsfield", ConfigError, "unit")):
        pytest.raises(error, segment_lungs, values, spacing, unit).match(words)


def names(notes: list[str]) -> set[str]:
    return {note.split(":")[0] for note in notes}


@pytest.mark.parametrize("expected, change", [
    ({"z_suspect"}, lambda lungs: lungs[:, :, ::-1]), ({"single_lung"}, lambda lungs: np.uint8(lungs == 1)),
    ({"lung_asymmetry"}, lambda lungs: np.where((lungs == 2) & (np.arange(128)[None, :, None] < 75), 0, lungs)),
    ({"lung_at_border"}, lambda lungs: lungs[np.flatnonzero((lungs > 0).any(axis=(1, 2)))[0]:]),
    ({"lung_area_jump"}, lambda lungs: lungs * (np.arange(24) != 12).astype(np.uint8)),
    ({"fov_truncated: the lungs reach the top slice"}, lambda lungs: lungs[:, :, :12]),
    ({"fov_truncated"}, lambda lungs: lungs[:, :, 8:]),  # cut off at the base, and then upside down
    ({"z_suspect", "fov_truncated"}, lambda lungs: lungs[:, :, 8:][:, :, ::-1])])
def test_each_warning(patient, expected, change):
    notes = check_lungs(change(patient[1]), patient[3])
    assert all(any(note.startswith(words) for note in notes) for words in expected)
    assert ("z_suspect" in names(notes)) == ("z_suspect" in expected)


def test_lungs_that_are_too_small_are_said(patient):
    _, lungs, _, spacing, _ = patient
    assert check_lungs(lungs, spacing) == []
    assert names(check_lungs(lungs, tuple(2.5 * mm for mm in spacing))) == {"lung_volume_implausible"}
    tiny = boxes((60, 40), (10, 14, 10, 14), (30, 34, 10, 14))
    assert names(check_lungs(tiny, body=np.ones((60, 40), bool))) == {"lung_area_implausible"}


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


@pytest.mark.parametrize("seed, margin", [(0, 99), (1, 99), (2, 99), (0, 2), (1, 2), (3, 2)])  # 2: cut to the lungs
def test_lungs_that_are_open_to_the_edge_of_a_cropped_figure_are_kept(seed, margin):
    one = phantom_slice(seed, 160)
    rows, columns = (np.flatnonzero(one.lungs.any(axis=axis)) for axis in (1, 0))
    side = 5 if margin > 2 else 3
    box = np.s_[max(0, rows[0] - margin):rows[-1] + margin, columns[0] + side:columns[-1] + 1 - side]
    figure, lungs = to_uint8(one.hu)[box], one.lungs[box]
    mask = segment_lungs(figure, None, "grey")  # no infection given
    assert all(dice(mask.labels == side, lungs == side) > 0.88 for side in (1, 2))
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
    assert np.array_equal(segment_lungs(hu, spacing, lungs=swapped, situs_inversus=True).labels, swapped)
    for given, options, words in ((swapped, {}, "right lung lies on patient's left"), (lungs[1:], {}, "differ in shape"),
                                  (lungs, {"situs_inversus": True}, "situs-inversus"),
                                  (np.where(lungs > 0, 3 * lungs, 0), {}, "--lobes")):
        pytest.raises(GeometryError, segment_lungs, hu, spacing, lungs=given, **options).match(words)


@pytest.mark.parametrize("shape, spacing, text", [((4, 4), (1.0,), "2 sizes"), ((4, 4, 4), (1.0, 1.0, 0.0), "3 sizes"),
                                                  ((4,), None, "neither a slice"), ((4, 4), (1.0, np.nan), "2 sizes")])
def test_sizes_that_do_not_fit(shape, spacing, text):
    pytest.raises(GeometryError, plane_sizes, shape, spacing).match(text)


def test_otsu_of_one_value_splits_nothing_and_warns_not():
    assert otsu(np.full(10, 7)) == 7


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
    hu, lungs, _, spacing, _ = patient
    seen = stand_in(monkeypatch, patient, lambda lungs: lungs.copy())
    mask = engine_lungs("lungmask", hu, spacing, weights=weights)
    assert np.array_equal(mask.labels, lungs) and mask.kind == "lungs" and len(mask.weights_sha256) == 64
    assert seen["modelpath"] == str(weights) and seen["force_cpu"] and seen["modelname"] == "R231"
    stand_in(monkeypatch, patient, lambda lungs: np.where(lungs > 0, 3 - lungs, 0))
    with pytest.raises(GeometryError, match="right lung lies on patient's left"):
        engine_lungs("lungmask", hu, spacing, weights=weights)


def test_weights_are_verified_before_anything_is_loaded(monkeypatch, patient, weights, tmp_path):
    stand_in(monkeypatch, patient, lambda lungs: lungs)
    unnamed = tmp_path / "weights.pth"
    unnamed.write_bytes(weights.read_bytes())
    assert verify_weights(unnamed, verify_weights(weights)) == verify_weights(weights)
    altered = tmp_path / "altered" / weights.name
    altered.parent.mkdir()
    altered.write_bytes(weights.read_bytes() + b"x")
    for given, error, text in [
            ({"weights": weights, "sha256": "00" * 32}, ChecksumError, "other weights"),
            ({"weights": altered}, ChecksumError, "other weights"), ({"weights": unnamed}, ConfigError, "SHA-256"),
            ({"weights": tmp_path / "none-00000000.pth"}, ConfigError, "not there"),
            ({"weights": weights, "model": "R232"}, ConfigError, "R231"),
            ({"weights": weights, "device": "cuda:99"}, ConfigError, "cuda:99")]:
        pytest.raises(error, engine_lungs, "lungmask", patient[0], patient[3], **given).match(text)


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
    monkeypatch.setitem(sys.modules, "totalsegmentator.python_api", None)
    make_home(tmp_path)
    with pytest.raises(MissingExtraError, match="pip install TotalSegmentator"):
        engine_lungs("totalsegmentator", patient[0], weights=tmp_path)
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
    pytest.raises(ChecksumError, engine_lungs, "totalsegmentator", hu, spacing, weights=tmp_path, sha256="00")
    assert engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path, sha256=mask.weights_sha256).labels.any()
    del names.class_map["total"][7]
    with pytest.raises(LungSegmentationError, match="names its lobes differently"):
        engine_lungs("totalsegmentator", hu, spacing, weights=tmp_path)


# real slices

def real_slices(data_root: Path):
    """Every sixteenth slice of the 20-case set that has a CT, upright: CT, lungs, infection.

    The rule for grey pictures was chosen on the slices 0, 4, 8, ... of this order; these are 2, 18, 34, ..."""
    root = data_root / "covid19-ct-seg-slices"
    if not root.is_dir():
        pytest.skip("needs the slices of the 20-case set in the data folder")
    cases = {row["file"]: row["case_inferred"] for _, row in read_rows(root / "slices.csv")}
    for path in sorted((root / "ct").iterdir())[2::16]:
        arrays = read_image(path), read_mask(root / "lungs" / path.name), read_mask(root / "covid" / path.name)
        yield [array[::-1].copy() if cases[path.name].startswith("radiopaedia") else array for array in arrays]


def test_real_slices(data_root):
    """Real, sharpened 8-bit slices with expert masks; the bounds are loose."""
    found = []
    for ct, lungs, infection in real_slices(data_root):
        try:
            found.append(dice(segment_lungs(ct, None, "grey", infection=infection).labels > 0, lungs))
        except LungSegmentationError:
            found.append(None)
    missed = found.count(None)
    assert len(found) - missed > 20 and missed < 0.1 * len(found)
    assert np.median([each for each in found if each is not None]) > 0.9


def test_sides_of_real_masks(data_root):
    """Expert lung masks of real slices: the two largest pieces are told apart as right and left of the picture."""
    split = [split_lungs(lungs) for _, lungs, _ in real_slices(data_root)]
    for labels, how in split:
        if how == "components":
            check_sides(labels)
    assert [how for _, how in split].count("components") > 0.7 * len(split)
