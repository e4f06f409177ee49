"""The phantom: exact truth, extent as asked, the same on every call, and a clear no to what cannot be built."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, distance_transform_edt, label

from covidsev.core import ConfigError
from covidsev.data.phantom import (CONSOLIDATION, GGO, Phantom, demo_slice, phantom_patients, phantom_slice,
                                   phantom_volume)

MAPS = ("hu", "lungs", "lobes", "vessels", "airways", "labels", "body")


def digest(phantom: Phantom) -> str:
    parts = [np.ascontiguousarray(getattr(phantom, name)).tobytes() for name in (*MAPS, "affine")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def fraction(phantom: Phantom, value: int) -> float:
    return float((phantom.labels == value).sum() / (phantom.lungs > 0).sum())


@pytest.fixture(scope="module")
def volume() -> Phantom:
    return phantom_volume(seed=3, shape=(24, 96, 96))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.6), st.floats(0.02, 0.3), st.floats(0, 1), st.sampled_from([64, 96, 128]))
def test_extent_is_met_for_any_request(seed, ggo, consolidation, subpleural, size):
    p = phantom_slice(seed, size, ggo_fraction=ggo, consolidation_fraction=consolidation, subpleural=subpleural)
    assert fraction(p, GGO) == pytest.approx(ggo, rel=0.1)
    assert fraction(p, CONSOLIDATION) == pytest.approx(consolidation, rel=0.1)
    assert set(np.unique(p.labels)) <= {0, GGO, CONSOLIDATION}
    assert not (p.labels[p.lungs == 0]).any() and ((p.lobes > 0) == (p.lungs > 0)).all()
    assert set(np.unique(p.lobes[p.lungs == 1])) <= {1, 2, 3} and set(np.unique(p.lobes[p.lungs == 2])) <= {4, 5}
    assert not (p.lungs[~p.body]).any() and not (p.vessels & (p.lungs == 0)).any()


def test_volume_meets_the_extent_and_holds_five_lobes(volume):
    assert fraction(volume, GGO) == pytest.approx(0.15, rel=0.1)
    assert fraction(volume, CONSOLIDATION) == pytest.approx(0.05, rel=0.1)
    shares = np.bincount(volume.lobes.ravel(), minlength=6)[1:] / (volume.lungs > 0).sum()
    assert (shares > 0.03).all() and shares.sum() == pytest.approx(1)
    for side in (1, 2):
        sizes = np.bincount(label(volume.lungs == side)[0].ravel())[1:]
        assert sizes.max() > 0.95 * sizes.sum(), "each lung is one piece"


@pytest.mark.parametrize("seed", range(4))
def test_zero_fraction_gives_none(seed):
    assert not phantom_slice(seed, 96, ggo_fraction=0, consolidation_fraction=0).labels.any()
    assert set(np.unique(phantom_slice(seed, 96, ggo_fraction=0).labels)) == {0, CONSOLIDATION}
    assert set(np.unique(phantom_slice(seed, 96, consolidation_fraction=0).labels)) == {0, GGO}


def test_same_seed_same_bytes_and_other_seed_other_bytes(volume):
    assert digest(demo_slice()) == digest(phantom_slice(7, 192))
    assert digest(volume) == digest(phantom_volume(seed=3, shape=(24, 96, 96)))
    assert len({digest(phantom_slice(seed, 64)) for seed in range(12)}) == 12


def test_global_random_state_plays_no_part():
    digests = []
    for seed in (1, 2):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        digests.append(digest(phantom_slice(4, 64)))
        assert np.array_equal(np.random.get_state()[1], before)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("seed", range(8))
def test_densities_are_those_of_a_chest(seed):
    p = phantom_slice(seed, 128, ggo_fraction=0.2, consolidation_fraction=0.1, noise_hu=15)
    assert p.hu.dtype == np.float32 and np.array_equal(p.hu, np.rint(p.hu)) and p.hu.min() >= -1024
    assert -700 < np.median(p.hu[p.labels == GGO]) < -350
    assert -50 < np.median(p.hu[(p.labels == CONSOLIDATION) & ~p.airways]) < 60
    far = ~binary_dilation(p.labels > 0, iterations=6) & (p.lungs > 0) & ~p.vessels
    assert -920 < np.median(p.hu[far]) < -750
    assert np.median(p.hu[~p.body]) == pytest.approx(-1000, abs=8)
    assert p.hu[p.body].max() > 250, "bone"


def test_gravity_makes_the_back_of_a_healthy_lung_denser():
    p = phantom_slice(2, 128, ggo_fraction=0, consolidation_fraction=0)
    rows = np.nonzero((p.lungs > 0) & ~p.vessels & ~p.airways)
    lower = rows[0] > np.median(rows[0])
    assert np.median(p.hu[rows][lower]) > np.median(p.hu[rows][~lower]) + 15


def test_noise_and_blur_are_what_was_asked_for():
    quiet = phantom_slice(5, 128, noise_hu=0)
    for noise in (10.0, 40.0):
        difference = (phantom_slice(5, 128, noise_hu=noise).hu - quiet.hu)[quiet.body]
        assert difference.std() == pytest.approx(noise, rel=0.05)
    soft = phantom_slice(5, 128, noise_hu=0, blur_px=2.0)
    assert np.abs(np.diff(soft.hu)).mean() < 0.8 * np.abs(np.diff(quiet.hu)).mean()
    assert np.array_equal(soft.labels, quiet.labels), "the truth does not depend on the scanner"


@pytest.mark.parametrize("seed", range(6))
def test_subpleural_consolidation_touches_the_wall_and_inner_does_not(seed):
    outer, inner = (phantom_slice(seed, 192, subpleural=subpleural, ggo_fraction=0.0, consolidation_fraction=0.08)
                    for subpleural in (1.0, 0.0))
    depth = [distance_transform_edt(p.lungs > 0)[p.labels == CONSOLIDATION] for p in (outer, inner)]
    assert depth[0].min() == 1 and np.median(depth[0]) < np.median(depth[1]) and depth[1].min() > 2
    assert (outer.hu[outer.labels == CONSOLIDATION] > -400).mean() > 0.6, "lungs found by air alone would miss it"


def test_vessels_show_inside_ground_glass_and_thin_out():
    bright, dark, near, far = [], [], [], []
    for seed in range(6):
        p = phantom_slice(seed, 192, ggo_fraction=0.4, consolidation_fraction=0, noise_hu=0)
        haze = p.labels == GGO
        bright.append(p.hu[haze & p.vessels])
        dark.append(p.hu[haze & ~binary_dilation(p.vessels, iterations=2)])
        depth = distance_transform_edt(p.lungs > 0) * p.spacing_mm[0]
        near.append(p.vessels[(depth > 0) & (depth <= 6)].mean())
        far.append(p.vessels[depth > 20].mean())
    assert np.median(np.concatenate(bright)) > np.median(np.concatenate(dark)) + 150
    assert np.mean(near) < 0.5 * np.mean(far)


def test_airways_cross_consolidation_as_dark_lines():
    p = phantom_volume(1, (24, 128, 128), ggo_fraction=0, consolidation_fraction=0.5, subpleural=0, noise_hu=0)
    inside = p.labels == CONSOLIDATION
    assert (inside & p.airways).sum() > 20
    assert np.median(p.hu[inside & p.airways]) < -300 < -100 < np.median(p.hu[inside & ~p.airways])


def test_orientation_right_is_left_in_the_picture_and_affine_agrees(volume):
    p = demo_slice()
    columns = [np.nonzero(p.lungs == side)[1].mean() for side in (1, 2)]
    assert columns[0] < columns[1]
    spine = p.hu[:, 86:106].max(1)
    assert spine[120:].max() > spine[60:100].max(), "the spine is at the bottom"
    for side, sign in ((1, 1), (2, -1)):
        centre = np.argwhere(volume.lungs.T == side).mean(0)
        assert np.sign((volume.affine @ [*centre, 1])[0]) == sign, "RAS+: right is positive"
    areas = (volume.lungs > 0).sum((1, 2))
    upper, lower = np.nonzero(areas)[0][[-1, 0]]
    heights = [(volume.affine @ (0, 0, k, 1))[2] for k in (lower, upper)]
    assert heights[0] < heights[1] and volume.airways[upper].any(), "the trachea is at the top"
    assert np.allclose(np.abs(np.diag(volume.affine)[:3]), volume.spacing_mm[::-1])


def test_patients_share_anatomy_differ_in_disease_and_never_repeat():
    slices = phantom_patients(6, seed=0, size=64, slices_per_patient=3)
    names = [name for name, _ in slices]
    assert len(slices) == 18 and len(set(names)) == 6 and names == sorted(names)
    for name in set(names):
        mine = [p for n, p in slices if n == name]
        assert len({p.spacing_mm for p in mine}) == 1 and len({digest(p) for p in mine}) == 3
    assert len({p.spacing_mm for _, p in slices}) == 6
    extents = [fraction(p, GGO) + fraction(p, CONSOLIDATION) for _, p in slices]
    assert max(extents) > 3 * np.median(extents) or max(extents) > 0.3
    other = {digest(p) for _, p in phantom_patients(6, seed=1, size=64)}
    assert not other & {digest(p) for _, p in slices}




@pytest.mark.parametrize("make, options, message", [
    *((phantom_slice, {name: value}, f"{name} is out of range") for name, value in (
        ("ggo_fraction", -0.1), ("ggo_fraction", float("nan")), ("consolidation_fraction", 5), ("subpleural", 1.5),
        ("noise_hu", -1), ("blur_px", float("inf")))),
    (phantom_slice, {"ggo_fraction": 0.7, "consolidation_fraction": 0.6}, "more disease than lung"),
    (phantom_slice, {"seed": -3}, "must be a whole number"), (phantom_slice, {"seed": 1.5}, "must be a whole number"),
    (phantom_slice, {"size": 8}, "too small"), (phantom_volume, {"shape": (1, 64, 64)}, "too small")])
def test_impossible_requests_are_refused(make, options, message):
    pytest.raises(ConfigError, make, **options).match(message)

