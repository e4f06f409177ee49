"""The 20 regions and every score: golden numbers, properties that hold for any lungs, and bad input."""

import json
import tracemalloc
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from covidsev.core import ConfigError, GeometryError, IntensityError, MaskError, read_json, write_json
from covidsev.data.phantom import phantom_volume
from covidsev.data.scans import Scan, turn_picture
from covidsev.data.volumes import make_grid
from covidsev.severity.lungs import LungSegmentationError
from covidsev.severity.score import (
    LOBE_OF_REGION, SECTORS, RegionGeometry, count_regions, drop_fragments, extent_score, fill_lobes, fractions,
    lobe_score, mosmed_class, pan_score, partition_regions, peripheral_zone, score_scan, severity, sum_scores)

MIRRORED = {region: (region + 9) % 20 + 1 for region in range(1, 21)}  # 1 <-> 11, ..., 10 <-> 20


@st.composite
def lung_masks(draw):
    """Any two sets of voxels, the right one (label 1) where X is larger."""
    inside = draw(arrays(bool, array_shapes(min_dims=3, max_dims=3, min_side=4, max_side=10)))
    inside[0, 0, 0] = inside[-1, -1, -1] = True
    side = np.where(np.arange(len(inside)) >= len(inside) // 2, 1, 2).astype(np.uint8)
    return inside * side[:, None, None]


@st.composite
def lungs_and_infection(draw):
    """Lungs, and an infection anywhere."""
    lungs = draw(lung_masks())
    return lungs, draw(arrays(bool, lungs.shape))


def ras(array):
    """An array of the phantom, (Z, H, W), as RAS+ (X, Y, Z)."""
    return array.T[::-1, ::-1]


@pytest.fixture(scope="module")
def patient():
    """A phantom in RAS+: lungs, lobes, labels, infection, hu, spacing_mm."""
    phantom = phantom_volume(5, (30, 96, 96), ggo_fraction=0.2, consolidation_fraction=0.08)
    found = {name: ras(getattr(phantom, name)) for name in ("lungs", "lobes", "labels", "hu")}
    return {**found, "infection": found["labels"] > 0, "spacing_mm": tuple(map(float, phantom.spacing_mm[::-1]))}


@pytest.fixture(scope="module")
def result(patient):
    return score(patient)


def score(patient, **changes):
    """`severity` of the phantom with all it has, or with changes."""
    given = {name: patient[name] for name in ("infection", "lungs", "hu", "labels", "spacing_mm")} | changes
    return severity(given.pop("infection"), given.pop("lungs"), **given)


def slice_levels(lungs):
    """Height, apex to base, of every slice in the right and the left lung: (2, Z), NaN outside."""
    levels = np.full((2, lungs.shape[2]), np.nan)
    for row, lung in zip(levels, (1, 2)):
        inside = np.flatnonzero((lungs == lung).any((0, 1)))
        n = inside[-1] - inside[0] + 1
        row[inside[0]:inside[-1] + 1] = ((2 * np.arange(n) + 1) / (2 * n))[::-1]
    return levels


def smooth_lungs(shape):
    """Two lung-like bodies on a grid of any size: ellipsoids with a hollow for the heart."""
    x, y, z = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in shape), indexing="ij", sparse=True)
    across = (np.abs(x) - 0.5) / 0.45
    above, below = np.maximum(z - 0.1, 0) / 0.85, np.minimum(z - 0.1, 0) / 1.02
    inside = across**2 + (y / 0.9) ** 2 + above**2 + below**4 < 1
    heart = (x / 0.4) ** 2 + ((y - 0.3) / 0.5) ** 2 + ((z + 0.4) / 0.5) ** 2 < 1
    return (inside & ~heart) * np.where(x > 0, 1, 2).astype(np.uint8)


# the partition ----------------------------------------------------------------------------------------------


def test_golden_scores():
    lungs = np.zeros((97, 61, 101), np.uint8)
    lungs[53:94], lungs[3:44] = 1, 2
    infection = np.zeros(lungs.shape, bool)
    infection[:, :20, :50] = True
    result = severity(infection, lungs, allow_truncated=True)
    for name in ("score", "score_strict"):
        assert {r["id"]: r[name] for r in result.regions if r[name]} == {6: 1, 7: 1, 9: 1, 10: 2,
                                                                         16: 1, 17: 1, 19: 1, 20: 2}
    assert (result.ct_ss, result.ct_ss_strict, result.severe) == (10, 10, False)


@given(lung_masks())
def test_every_lung_voxel_has_one_region_of_its_side(lungs):
    """Property 1."""
    ids = partition_regions(lungs)
    assert ids.dtype == np.uint8 and ids.shape == lungs.shape
    assert np.array_equal(ids > 0, lungs > 0)
    assert np.array_equal((ids + 9) // 10, lungs)  # 1..10 right, 11..20 left


@given(lung_masks(), st.integers(0, 2**32 - 1))
def test_every_lobe_voxel_has_a_region_of_its_lobe(lungs, seed):
    """Property 1, with lobe masks: any lobes of the right side."""
    rng = np.random.default_rng(seed)
    lobes = np.choose(lungs, (0, rng.integers(1, 4, lungs.shape), rng.integers(4, 6, lungs.shape))).astype(np.uint8)
    assert np.array_equal(LOBE_OF_REGION[partition_regions(lungs, lobes)], lobes)


@given(lung_masks())
def test_mirrored_lungs_have_mirrored_regions(lungs):
    """Property 2: all regions exactly; middle lobe and lingula, which are cut differently, as wholes."""
    ids, other = partition_regions(lungs), partition_regions(np.choose(lungs[::-1], (0, 2, 1)))[::-1]
    mirrored = np.array([0] + [MIRRORED[region] for region in range(1, 21)])[ids]
    merged = np.arange(21)
    merged[[5, 15]] = 4, 14
    assert np.array_equal(merged[mirrored], merged[other])


def test_all_48_orientations_of_a_file_give_the_same_regions(patient):
    """Property 3: stored in any order and direction, brought to RAS+ by the affine, and brought back."""
    lungs, lobes = patient["lungs"], patient["lobes"]
    expected, by_lobes = partition_regions(lungs), partition_regions(lungs, lobes)
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, axes] * signs * (0.7, 0.9, 5.0)
        grid = make_grid(tuple(lungs.shape[axis] for axis in axes), affine)
        stored, stored_lobes = (np.ascontiguousarray(grid.stored(array)) for array in (lungs, lobes))
        assert np.array_equal(grid.stored(partition_regions(grid.canonical(stored))), grid.stored(expected))
        if signs == (1, -1, 1):
            again = partition_regions(grid.canonical(stored), grid.canonical(stored_lobes))
            assert np.array_equal(again, by_lobes)


@settings(max_examples=8)
@given(spacing_mm=st.tuples(*[st.floats(0.1, 20)] * 3))
def test_spacing_moves_no_border(patient, result, spacing_mm):
    """Property 3: any positive zooms."""
    lungs, infection = patient["lungs"], patient["infection"]
    other = severity(infection, lungs, spacing_mm=spacing_mm)
    assert other.regions == result.regions
    assert other.lung_ml == pytest.approx(np.count_nonzero(lungs) * np.prod(spacing_mm) / 1000)


def test_a_slice_of_known_height_has_the_regions_of_its_volume(patient):
    """Property 4, for every slice, as a volume of one slice and as a picture."""
    lungs = patient["lungs"]
    ids, levels = partition_regions(lungs), slice_levels(lungs)
    for k in np.flatnonzero(lungs.any((0, 1))):
        z = np.where(np.isnan(levels[:, k]), 0.5, levels[:, k])
        assert np.array_equal(partition_regions(lungs[..., [k]], z=z), ids[..., [k]])
        assert np.array_equal(partition_regions(turn_picture(lungs[..., k]), z=z), turn_picture(ids[..., k]))


@pytest.mark.parametrize("step, limit", [((2, 2, 2), 0.005), ((1, 1, 5), 0.02)])
def test_resampling_hardly_moves_the_shares_of_the_regions(step, limit):
    """Property 5."""
    fine, coarse = (smooth_lungs(shape) for shape in ((160, 120, 150), tuple(np.array((160, 120, 150)) // step)))
    shares = [count_regions(partition_regions(lungs), lungs > 0)[0] / np.count_nonzero(lungs) for lungs in (fine, coarse)]
    assert 0 < np.abs(shares[0] - shares[1]).max() < limit


def test_planes_give_lobes_of_the_right_size():
    """On smooth lungs the five lobes come near those of supine CT (33/17/49 % right, 50/50 % left)."""
    lobes = LOBE_OF_REGION[partition_regions(smooth_lungs((120, 100, 120)))]
    right, left = np.split(np.bincount(lobes.ravel())[1:].astype(float), [3])
    right, left = right / right.sum(), left / left.sum()
    assert np.abs([*right, *left] - np.array((0.334, 0.174, 0.494, 0.498, 0.500))).max() < 0.06
    assert right[0] + right[1] == pytest.approx(left[0])  # the oblique plane is the same on both sides


@given(lung_masks(), st.floats(0.02, 0.98))
def test_ties_do_not_depend_on_rounding(lungs, z):
    """A border moved by much less than a voxel moves nothing."""
    moved = replace(RegionGeometry(), apex=0.18 + 2e-16, superior=0.55 - 2e-16, oblique=(10.0, 7.0, 9.0 + 2e-15))
    assert np.array_equal(partition_regions(lungs), partition_regions(lungs, geometry=moved))
    plane = lungs[..., [0]]
    if plane.any():
        assert np.array_equal(partition_regions(plane, z=z), partition_regions(plane, geometry=moved, z=(z, z)))


def test_the_middle_of_a_voxel_on_the_fissure_belongs_to_the_lower_lobe():
    """10 z + 7 y = 9 is met exactly by z = 0.55, y = 0.5: 10 slices, 7 rows."""
    lungs = np.zeros((8, 7, 10), np.uint8)
    lungs[4:], lungs[:3] = 1, 2
    ids = partition_regions(lungs)
    assert set(LOBE_OF_REGION[ids[4:, 3, 4]]) == {3}
    assert set(LOBE_OF_REGION[ids[4:, 4, 4]]) == {2}  # the next row to the front
    assert set(ids[4:, 0, 4]) <= {7, 9, 10}  # z = 0.55 is not below 0.55: no longer superior


# scores -----------------------------------------------------------------------------------------------------


@given(lungs_and_infection(), st.integers(0, 2**32 - 1))
def test_more_infection_never_scores_less(case, seed):
    """Property 6."""
    lungs, infection = case
    more = infection | (np.random.default_rng(seed).random(lungs.shape) < 0.2)
    a, b = (severity(mask, lungs, allow_truncated=True) for mask in (infection, more))
    for parts, names in (("regions", ("fraction", "score", "score_strict")), ("lobes", ("pan", "lss"))):
        for small, large in zip(getattr(a, parts), getattr(b, parts)):
            assert not small["n_vox"] or all(small[name] <= large[name] for name in names)
    for name in ("po", "po_right", "po_left", "partial", "partial_strict", "mosmed_class", "mosmed_class_both"):
        assert getattr(a, name) <= getattr(b, name)


def test_bounds_of_every_score(patient):
    """Property 7."""
    lungs, hu = patient["lungs"], patient["hu"]
    healthy, full = (severity(mask, lungs, hu=hu) for mask in (lungs * 0, np.ones(lungs.shape)))
    for name, most in {"ct_ss": 40, "ct_ss_strict": 40, "po": 1.0, "pan25": 25, "lss20": 20, "tss20": 20,
                       "mosmed_class": 4, "mosmed_class_both": 4, "severe": True, "bilateral": True}.items():
        assert (getattr(healthy, name), getattr(full, name)) == (0, most)
    dense = severity(lungs > 0, lungs, hu=np.where(lungs > 0, -200, -1000))
    assert (dense.pho, dense.lhos20, dense.ggo_share, dense.consolidation_share) == (1.0, 20, 0.0, 1.0)
    assert (healthy.pho, healthy.lhos20) == (0.0, 0)


@given(st.integers(1, 10**7), st.sampled_from((0.001, 0.005, 0.01, 0.02, 0.05)))
def test_the_floor_is_exact_for_any_size(n_vox, floor):
    """Property 8, against whole numbers: f >= p/1000 is 1000 n >= p N, and one half is 2; without a floor one voxel
    is 1."""
    per_mille = round(1000 * floor)
    for n_inf in {0, 1, n_vox * per_mille // 1000, -(-n_vox * per_mille // 1000), n_vox // 2, -(-n_vox // 2)}:
        strict = 0 if not n_inf else 1 if 2 * n_inf < n_vox else 2
        fraction, = fractions([n_inf], [n_vox])
        assert extent_score(fraction) == strict
        assert extent_score(fraction, floor) == (strict if 1000 * n_inf >= per_mille * n_vox else 0)


def test_pan_tss_and_mosmed_at_their_edges():
    below, above = np.nextafter, lambda value: np.nextafter(value, 1)
    edges = [(0.0, 0, 0, 0), (above(0.0), 1, 1, 1), (below(0.05, 0), 1, 1, 1), (0.05, 2, 1, 1),
             (0.25, 2, 1, 2), (above(0.25), 3, 2, 2), (below(0.5, 0), 3, 2, 2), (0.5, 4, 2, 3),
             (above(0.5), 4, 3, 3), (0.75, 4, 3, 4), (above(0.75), 5, 4, 4), (1.0, 5, 4, 4)]
    for value, pan, lobe, mosmed in edges:
        assert (pan_score(value), lobe_score(value), mosmed_class(value)) == (pan, lobe, mosmed)



@given(lungs_and_infection())
def test_regions_add_up_to_lobes_and_lungs(case):
    """Property 9."""
    lungs, infection = case
    result = severity(infection, lungs)
    n_lung, n_inf = np.count_nonzero(lungs), np.count_nonzero(infection & (lungs > 0))
    for parts in (result.regions, result.lobes):
        assert (sum(p["n_vox"] for p in parts), sum(p["n_inf"] for p in parts)) == (n_lung, n_inf)
    assert result.po == n_inf / n_lung <= 1
    for lung, share in ((1, result.po_right), (2, result.po_left)):
        assert share == infection[lungs == lung].mean()


@given(st.lists(st.sampled_from((None, 0, 1, 2)), min_size=20, max_size=20))
def test_bounds_hold_whatever_the_unobserved_regions_are(scores):
    sums = sum_scores(scores)
    low, high = (sum(fill if score is None else score for score in scores) for fill in (0, 2))
    assert sums.bounds == (low, high) and sums.n_observed == 20 - scores.count(None)
    assert sums.severe == (True if low >= 20 else False if high <= 19 else None)
    assert sums.total == (low if low == high and None not in scores else None)


# purity -----------------------------------------------------------------------------------------------------


def test_inputs_stay_as_they_were(patient):
    """Property 10."""
    arrays_in = [patient[name].copy() for name in ("infection", "lungs", "hu", "labels", "lobes")]
    arrays_in[1][0, 0, 0], arrays_in[4][50, 50, 12] = 2, 0  # a fragment to drop, and perhaps a gap to fill
    before = [array.copy() for array in arrays_in]
    for array in arrays_in:
        array.setflags(write=False)
    infection, lungs, hu, labels, lobes = arrays_in
    severity(infection, lungs, hu=hu, labels=labels, lobes=lobes, spacing_mm=patient["spacing_mm"])
    severity(infection[::-1], lungs[::-1], situs_inversus=True)
    assert all(np.array_equal(array, copy) for array, copy in zip(arrays_in, before))


@pytest.mark.parametrize("dtype", [bool, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_memory_layout_do_not_matter(patient, result, dtype, order):
    """Property 10: the same result to the last bit."""
    changes = {name: np.array(patient[name], dtype=kind, order=order) for name, kind in
               {"infection": dtype, "lungs": np.float64 if dtype is bool else dtype, "labels": np.int64,
                "hu": np.int16 if dtype is bool else np.float64}.items()}
    assert score(patient, **changes) == result
    wide = np.repeat(patient["infection"], 2, axis=0)[::2]  # a view with steps
    assert score(patient, infection=wide) == result


@pytest.mark.parametrize("n, warned", [(0.2, False), (1.0, True)])
def test_infection_outside_the_lungs_changes_one_number(patient, result, n, warned):
    """Property 11, and row 25: above 20 % there is a warning with the value."""
    infection = patient["infection"].copy()
    n_inside = np.count_nonzero(infection & (patient["lungs"] > 0))
    n_outside = int(n * n_inside)
    infection[tuple(np.argwhere(patient["lungs"] == 0)[:n_outside].T)] = True
    other = score(patient, infection=infection)
    assert other.outside_fraction == 1 - n_inside / (n_inside + n_outside)
    before, after = result.to_dict(), other.to_dict()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"outside_fraction"} | ({"warnings"} if warned else set())
    assert ("infection_outside_lung: 50.0%" in " ".join(other.warnings)) == warned


# measures ---------------------------------------------------------------------------------------------------


def test_measures_against_their_definitions(patient, result):
    lungs, infection, hu, labels = (patient[name] for name in ("lungs", "infection", "hu", "labels"))
    ml = np.prod(patient["spacing_mm"]) / 1000
    lesion = infection & (lungs > 0)
    values = hu[lesion].astype(float)
    assert result.pho == np.count_nonzero(values >= -200) / np.count_nonzero(lungs)
    assert result.mean_hu == pytest.approx(values.mean()) and result.sd_hu == pytest.approx(values.std())
    assert result.ggo_share == np.count_nonzero(labels == 1) / lesion.sum() == 1 - result.consolidation_share
    shares = [np.mean(values < cut) for cut in (-200, -300)]
    assert [result.ggo_share_hu_200, result.ggo_share_hu_300] == shares
    assert result.lesion_mass_g == pytest.approx(((values.clip(-1000, 200) + 1000) / 1000 * ml).sum())
    assert result.lesion_ml == pytest.approx(lesion.sum() * ml)
    assert result.lung_ml == pytest.approx(result.lung_right_ml + result.lung_left_ml)
    right, left = lesion[lungs == 1].sum(), lesion[lungs == 2].sum()
    assert result.laterality == (right - left) / (right + left)
    assert 0 < result.largest_lesion_ml <= result.lesion_ml and result.lesion_count >= 1
    assert result.mosmed_class == mosmed_class(max(result.po_right, result.po_left))
    assert result.pan25 == sum(lobe["pan"] for lobe in result.lobes)


def test_lhos_uses_the_steps_of_lss_on_dense_lesions(patient):
    lungs, lobes = patient["lungs"], patient["lobes"]
    hu = np.where(lobes == 3, -100, np.where(lobes == 5, -199.5, -700.0))
    hu[..., ::2] = np.where(lobes[..., ::2] == 5, -700, hu[..., ::2])  # about half of the left lower lobe
    result = severity(lungs > 0, lungs, lobes=lobes, hu=hu)
    assert result.lhos20 == 4 + lobe_score(float(np.mean(hu[lobes == 5] >= -200))) and result.lss20 == 20


def test_unknown_hu_are_left_out_and_counted(patient):
    lungs, infection, hu = patient["lungs"], patient["infection"], patient["hu"].astype(np.float32)
    lesion = infection & (lungs > 0)
    hu[(np.arange(hu.shape[0]) % 3 == 0)] = np.nan
    known = np.isfinite(hu)
    result = severity(infection, lungs, hu=hu)
    assert result.n_hu_excluded == np.count_nonzero(~known & (lungs > 0)) > 0
    assert result.mean_hu == pytest.approx(hu[lesion & known].mean(dtype=float))
    assert result.pho == np.count_nonzero(hu[lesion & known] >= -200) / np.count_nonzero(known & (lungs > 0))
    only = severity(infection, lungs, hu=np.where(lesion, np.nan, hu))
    assert only.mean_hu is None and only.not_computed["mean_hu"] == "no lesion voxel has a known value"


def test_a_windowed_picture_has_hu_and_a_grey_one_has_none(patient):
    hu, infection, lungs = (turn_picture(patient[name][..., 15]) for name in ("hu", "infection", "lungs"))
    scan = Scan(np.clip(hu, -1000, -300).astype(np.float32), "slice", "HU", "p", "0" * 64, window=(-650.0, 700.0),
                warnings=["read_me: twice"])
    known = (hu > -1000) & (hu < -300)
    result = score_scan(scan, infection, lungs)
    assert result.n_hu_excluded == np.count_nonzero(~known & (lungs > 0)) > 0
    assert result.mean_hu == pytest.approx(scan.hu[known & infection & (lungs > 0)].mean())
    assert (result.warnings[0], result.input["window"], result.method) == (
        "read_me: twice", [-650.0, 700.0], "slice-quadrant")
    plain = score_scan(replace(scan, unit="grey", window=None), infection, lungs)
    for name in ("pho", "mean_hu", "ggo_share", "lesion_mass_g", "n_hu_excluded", "ggo_source"):
        assert getattr(plain, name) is None and plain.not_computed[name] == "no HU calibration"


def test_the_peripheral_zone_is_a_rim():
    radius = np.hypot(*np.ogrid[-60:61, -60:61])
    disc = (radius <= 60).astype(np.uint8)
    zone = peripheral_zone(disc)
    assert zone.shape == disc.shape and not zone[radius < 39].any() and zone[(radius > 42) & (disc > 0)].all()
    stretched = peripheral_zone(disc, (2.0, 0.5))  # rows close together: the nearest way out is up or down
    assert stretched[6, 60] and not stretched[60, 50] and stretched[60, 1]
    lungs = np.stack([disc, disc, 0 * disc], axis=-1)
    assert np.array_equal(peripheral_zone(lungs, (1, 1))[..., 1], zone) and not peripheral_zone(lungs)[..., 2].any()


def test_rim_and_core_lesions_have_peripheral_shares_1_and_0(patient):
    lungs = patient["lungs"]
    zone = peripheral_zone(lungs)
    rim, core = (severity(mask & (lungs > 0), lungs) for mask in (zone, ~zone))
    assert (rim.peripheral_share, core.peripheral_share) == (1.0, 0.0)
    assert rim.peripheral_lung_share == core.peripheral_lung_share == rim.po


# what may be reported ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(patient):
    """One result for each kind of input."""
    lungs, infection, levels = patient["lungs"], patient["infection"], slice_levels(patient["lungs"])
    part, one = np.s_[..., 10:18], np.s_[..., [15]]
    pictures = [turn_picture(array[..., 15]) for array in (infection, lungs)]
    return {"geometric": score(patient), "lobes": score(patient, lobes=patient["lobes"]),
            "no extras": severity(infection, lungs), "stack": severity(infection, lungs, approximate_z=True),
            "labels only": severity(None, lungs, labels=patient["labels"]),
            "no lesion": score(patient, infection=0 * lungs, labels=None),
            "right lung": severity(infection, np.where(lungs == 1, lungs, 0)),
            "left lung": severity(infection, np.where(lungs == 2, lungs, 0), hu=patient["hu"]),
            "cut off": severity(infection[part], lungs[part], spacing_mm=(1, 1, 5)),
            "slice": severity(infection[one], lungs[one], z=levels[:, 15], hu=patient["hu"][one]),
            "slice-quadrant": severity(infection[one], lungs[one], spacing_mm=(1, 1, 5)),
            "picture": severity(*pictures, spacing_mm=(1, 2))}


def test_every_none_has_a_reason(results):
    for name, result in results.items():
        missing = {key for key, value in result.to_dict().items() if value is None} - {"case_id"}
        assert missing == set(result.not_computed), name


def test_a_ct_ss_is_given_only_where_20_regions_are_seen(results):
    whole = {"geometric", "lobes", "no extras", "stack", "labels only", "no lesion"}
    assert {name for name, result in results.items() if result.ct_ss is not None} == whole
    for name in ("geometric", "lobes"):
        assert results[name].bounds == (results[name].ct_ss,) * 2
    assert [results[name].method for name in ("slice", "picture", "cut off", "stack")] == [
        "slice", "slice-quadrant", "geometric", "geometric"]
    assert results["stack"].approximate_z
    assert results["stack"].not_computed["lesion_ml"] == "the spacing of the voxels is not known"


def test_a_slice_gives_bounds_and_no_verdict(results, patient):
    result = results["slice"]
    assert 2 <= result.n_observed <= 11 and result.partial_max == 2 * result.n_observed
    assert result.bounds == (result.partial, result.partial + 2 * (20 - result.n_observed))
    assert result.severe is None and "both sides" in result.not_computed["severe"]
    assert len(result.unobserved) == 20 - result.n_observed
    assert all(result.regions[number - 1]["score"] is None for number in result.unobserved)
    assert (result.lesion_ml, result.pan25, result.mosmed_class) == (None, None, None)


def test_a_slice_of_unknown_height_gets_sectors(results):
    result = results["slice-quadrant"]
    assert [sector["name"] for sector in result.sectors] == list(SECTORS)
    assert result.slice_extent_score == sum(sector["score"] for sector in result.sectors) <= 16
    assert (result.partial, result.bounds, result.n_observed, len(result.unobserved)) == (None, None, 0, 20)
    assert result.po == results["slice"].po == results["picture"].po
    for name in ("sectors", "po_right", "po_left"):
        assert getattr(result, name) == getattr(results["picture"], name)


def test_lungs_that_are_cut_off_are_scored_only_on_demand(patient, results):
    result, part = results["cut off"], np.s_[..., 10:18]
    assert (result.ct_ss, result.bounds, result.severe, result.pan25) == (None,) * 4
    assert result.partial is not None and "cut off" in result.not_computed["ct_ss"]
    allowed = severity(patient["infection"][part], patient["lungs"][part], allow_truncated=True)
    assert (allowed.partial, allowed.regions) == (result.partial, result.regions)
    assert allowed.ct_ss == (allowed.partial if allowed.n_observed == 20 else None)
    for each in (result, allowed):
        assert any(text.startswith("fov_truncated") for text in each.warnings)


def test_results_are_plain_and_survive_json(results, tmp_path):
    def is_plain(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return type(value) in (type(None), bool, int, float, str, list, dict, tuple) and all(map(is_plain, parts))

    for result in results.values():
        plain = result.to_dict()
        assert is_plain(plain)
        assert json.loads(json.dumps(plain, allow_nan=False))["schema"] == "covidsev.severity/1"
        write_json(tmp_path / "result.json", plain)
        assert read_json(tmp_path / "result.json")["regions"] == plain["regions"]
    asked = ("case_id method geometry ct_ss ct_ss_strict min_fraction severe threshold regions unobserved po po_left "
             "po_right lobes lesion_ml lung_ml pho mean_hu pan25 lss20 tss20 mosmed_class bilateral warnings input "
             "software model")
    assert set(asked.split()) <= set(plain)
    assert set("id name lobe n_vox n_inf fraction score score_strict".split()) == set(plain["regions"][0])


def test_a_row_holds_single_values_only(results):
    columns = {tuple(result.row()) for result in results.values()}
    assert len(columns) == 1  # one table for all kinds of patients
    row = results["slice"].row()
    assert (row["low"], row["high"]) == results["slice"].bounds
    assert not [name for name, value in row.items() if isinstance(value, (list, dict, tuple))]
    assert sum(name.startswith("region_") for name in row) == 20


def test_min_fraction_is_checked_and_recorded(patient):
    lungs, infection = patient["lungs"], patient["infection"]
    assert severity(infection, lungs, min_fraction=0).ct_ss == severity(infection, lungs).ct_ss_strict
    assert severity(infection, lungs, min_fraction=0.05).to_dict()["min_fraction"] == 0.05


# bad input --------------------------------------------------------------------------------------------------


def test_an_empty_infection_is_valid(results):
    """Row 23."""
    result = results["no lesion"]
    assert [getattr(result, name) for name in "ct_ss po pho lesion_ml lesion_count".split()] == [0] * 5
    for name in ("mean_hu", "ggo_share", "laterality", "peripheral_share", "outside_fraction"):
        assert result.not_computed[name] == "there is no lesion in the lungs"


def test_one_lung_is_scored_and_the_other_is_unknown(results):
    """Row 26."""
    for name, side, other in (("right lung", "right", "left"), ("left lung", "left", "right")):
        result = results[name]
        assert any(text.startswith(f"single_lung: only a {side} lung") for text in result.warnings)
        assert getattr(result, f"po_{other}") is None and getattr(result, f"po_{side}") == result.po
        assert (result.ct_ss, result.bilateral, result.mosmed_class, result.laterality) == (None,) * 4
        assert result.bounds == (result.partial, result.partial + 20)
        assert all(region["score"] is None for region in result.regions if region["lobe"].startswith(other))


ALONE = {"hu": None, "labels": None, "spacing_mm": None}


@pytest.mark.parametrize("error, words, change", [
    (LungSegmentationError, "no lung", lambda p: {"lungs": 0 * p["lungs"]}),
    (LungSegmentationError, "no lung", lambda p: {**ALONE, "infection": np.zeros((64, 64)), "lungs": np.zeros((64, 64))}),
    (MaskError, "does not say which lung is which(.|\n)*split_lungs", lambda p: {"lungs": p["lungs"] > 0}),
    (MaskError, "both lungs have one label(.|\n)*only label 1", lambda p: {"lungs": np.uint8(p["lungs"] > 0)}),
    (MaskError, r"lung mask holds unexpected values(.|\n)*3 \(\d+\)(.|\n)*2 left lung",
     lambda p: {"lungs": np.where(p["lungs"] == 2, 3, p["lungs"])}),
    *((MaskError, "lung mask holds unexpected values",  # what a cast to 8 bits would hide
       lambda p, wrong=wrong: {"lungs": np.where(p["lungs"] == 1, wrong, p["lungs"].astype(float))})
      for wrong in (257, -255, 0.5, np.nan)),
    (MaskError, "a mask must hold 0 and 1 only", lambda p: {"infection": p["infection"] * 255}),
    (MaskError, "lesion mask holds unexpected values", lambda p: {"labels": p["labels"] * 2}),
    (ConfigError, "needs an infection mask", lambda p: {"infection": None, "labels": None}),
    *((GeometryError, rf"{name} and lungs must have one shape(.|\n)*never resized",
       lambda p, name=name, of=of: {name: p[of][1:]})
      for name, of in (("infection", "infection"), ("hu", "hu"), ("lobes", "lungs"))),
    *((GeometryError, "spacing does not fit", lambda p, bad=bad: {"spacing_mm": bad})
      for bad in ((1, 1), (1, 1, 0), (1, 1, -2), (1, np.nan, 1), (1, 1, 1, 1))),
    (GeometryError, "a volume or a picture", lambda p: {**ALONE, "infection": p["infection"][None], "lungs": p["lungs"][None]}),
    (ConfigError, "a lobe mask needs the whole volume", lambda p: {name: p[name][..., [15]] for name in (
        "infection", "lungs", "labels", "hu", "lobes")}),
    (MaskError, r"unexpected values(.|\n)*14 \(.*(.|\n)*5 left lower",
     lambda p: {"lobes": np.where(p["lobes"] == 5, 14, p["lobes"])}),
    (MaskError, "does not cover the lungs(.|\n)*3[0-9].[0-9]% of the lung(.|\n)*at most 20%",
     lambda p: {"lobes": p["lobes"] * (np.arange(p["lobes"].size).reshape(p["lobes"].shape) % 3 > 0)}),
    (GeometryError, "right lobes lie in the left lung",
     lambda p: {"lobes": np.array([0, 4, 4, 5, 1, 3], np.uint8)[p["lobes"]]}),
    (GeometryError, "right lung lies on patient's left(.|\n)*pass --situs-inversus if real",
     lambda p: {"lungs": np.choose(p["lungs"], (0, 2, 1))}),
    (GeometryError, "right lung lies on patient's left", lambda p: {"situs_inversus": True}),
    *((ConfigError, "min_fraction cannot be used", lambda p, bad=bad: {"min_fraction": bad})
      for bad in (-0.01, 0.5, np.nan)),
    (IntensityError, "not Hounsfield units(.|\n)*0 to 255", lambda p: {"hu": np.where(p["lungs"] > 0, 0, 255)}),
    (IntensityError, "not Hounsfield units(.|\n)*inf", lambda p: {"hu": np.where(p["infection"], np.inf, p["hu"])})])
def test_bad_input_is_refused(patient, error, words, change):
    """Rows 24 and 28 among them."""
    pytest.raises(error, score, patient, **change(patient)).match(words)


def test_a_lobe_mask_with_gaps_is_filled_from_the_same_lung(patient):
    """Row 27: nearest lobe, the share reported, a warning above 2 %."""
    lungs, lobes, infection = patient["lungs"], patient["lobes"], patient["infection"]
    rng = np.random.default_rng(0)
    for share, warned in ((0.01, False), (0.1, True)):
        gaps = (rng.random(lungs.shape) < share) & (lungs > 0)
        holes = np.where(gaps, 0, lobes)
        filled, n = fill_lobes(holes, lungs)
        assert n == gaps.sum() / (lungs > 0).sum()
        assert np.array_equal(filled[~gaps], np.where(lungs > 0, lobes, 0)[~gaps])
        assert np.array_equal(np.array([0, 1, 1, 1, 2, 2])[filled], lungs)
        assert np.mean(filled[gaps] == lobes[gaps]) > 0.9  # single voxels, so the neighbours know
        result = severity(infection, lungs, lobes=holes)
        assert result.lobe_fill_fraction == n
        assert (f"lobe_fill: {n:.1%}" in " ".join(result.warnings)) == warned
    small = np.where((lungs == 1) | (np.cumsum(lungs == 2).reshape(lungs.shape) < 99), lungs, 0)
    pytest.raises(MaskError, fill_lobes, np.where(small == 2, 0, lobes), small).match("leaves one lung out")


def test_an_upside_down_volume_is_suspected(patient, results):
    """Row 29."""
    assert not any(text.startswith("z_suspect") for result in results.values() for text in result.warnings)
    for seed in (1, 2, 3):
        lungs = ras(phantom_volume(seed, (24, 64, 64)).lungs)
        for volume, expected in ((lungs, 0), (lungs[..., ::-1], 1)):
            warnings = severity(0 * volume, volume).warnings
            assert sum(text.startswith("z_suspect") for text in warnings) == expected


def test_fragments_cannot_stretch_the_grid(patient):
    lungs, infection = patient["lungs"], patient["infection"]
    crumbs = lungs.copy()
    crumbs[2, 2, -1], crumbs[-3, 2, -1] = 2, 1
    plain, other = severity(infection, lungs), severity(infection, crumbs)
    assert other.regions == plain.regions
    assert other.dropped_fraction == pytest.approx(2 / (2 + np.count_nonzero(lungs)))
    dust = np.zeros((40, 30, 20), np.uint8)
    dust[::2, ::2, ::2] = np.where(np.arange(40) < 20, 2, 1)[::2, None, None]  # 3000 pieces, none of them 1 %
    assert drop_fragments(dust)[0].any()
    assert drop_fragments(turn_picture(lungs[..., 15]))[0].shape == lungs.shape[1::-1]


def test_labels_and_infection_that_disagree_are_noticed(patient):
    labels, lungs = patient["labels"], patient["lungs"]
    less = patient["infection"].copy()
    gone = np.argwhere(less & (lungs > 0))[:7]
    less[tuple(gone.T)] = False
    result = severity(less, lungs, labels=labels)
    assert any(text.startswith("labels_infection_differ: 7 lung voxels") for text in result.warnings)
    assert result.ggo_share == np.count_nonzero((labels == 1) & less) / np.count_nonzero((labels > 0) & less)


def test_memory_stays_within_a_few_bytes_a_voxel():
    """512 x 512 x 300 voxels have to fit into 2 GiB with their inputs: at most 12 bytes a voxel beside them."""
    lungs = smooth_lungs((128, 128, 96))
    infection, hu = (lungs > 0) & (np.arange(96) < 40), np.where(lungs > 0, np.int16(-800), np.int16(40))
    tracemalloc.start()
    severity(infection, lungs, hu=hu, spacing_mm=(1, 1, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * lungs.size, f"{peak / lungs.size:.1f} bytes a voxel"
