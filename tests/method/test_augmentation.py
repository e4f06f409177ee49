"""Augmentation: one draw for everything, labels never invented and never cut, nothing changed in place."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covidsev.method.augmentation import (NONE, PAPER, PRESETS, STRONG, Augmentation,
                                          affine_matrices, augment, augmentation, change_intensity,
                                          cut_out, cutout_rectangles, draw_numbers, warp)
from covidsev.core import ConfigError, GeometryError, IntensityError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 6, height: int = 48, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images and blocky labels, so that every displaced pixel is seen."""
    rng = generator(seed)
    images = torch.rand((n, 1, height, width), generator=rng)
    blocks = torch.randint(0, 3, (n, 1, height // 8, width // 8), generator=rng, dtype=torch.uint8)
    return images, blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)


FLIP = Augmentation(vertical_flip=1.0, horizontal_flip=1.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(PRESETS)), cutout=st.floats(0, 1),
       mode=st.sampled_from(["side", "area"]), height=st.sampled_from([32, 40, 56]),
       width=st.sampled_from([32, 48]))
def test_shapes_dtypes_values_and_inputs_survive(seed, name, cutout, mode, height, width):
    images, labels = batch(3, height, width, seed=seed % 1000)
    prior = torch.rand((3, 2, height, width), generator=generator(1))
    kept = [t.clone() for t in (images, labels, prior)]
    spec = augmentation(name, cutout, mode)
    out = augment(images, labels, spec, generator(seed), prior=prior)
    for before, after, copy in zip((images, labels, prior), out, kept):
        assert after.shape == before.shape and after.dtype == before.dtype
        assert torch.equal(before, copy), "changed in place"
    assert out[0].min() >= 0 and out[0].max() <= 1 + 1e-6 and torch.isfinite(out[0]).all()
    for sample in range(3):
        assert set(out[1][sample].unique().tolist()) <= set(labels[sample].unique().tolist())


def test_no_recipe_changes_nothing():
    images, labels = batch()
    out = augment(images, labels, NONE, generator())
    assert torch.equal(out[0], images) and torch.equal(out[1], labels)


@pytest.mark.parametrize("spec", [Augmentation(vertical_flip=1.0), Augmentation(horizontal_flip=1.0), FLIP])
def test_flips_are_exact_and_undo_themselves(spec):
    images, labels = batch(height=40)
    once = augment(images, labels, spec, generator())
    dims = [d for d, p in ((2, spec.vertical_flip), (3, spec.horizontal_flip)) if p]
    torch.testing.assert_close(once[0], images.flip(dims), atol=1e-4, rtol=0)
    assert torch.equal(once[1], labels.flip(dims))
    twice = augment(*once, spec, generator(9))
    torch.testing.assert_close(twice[0], images, atol=2e-4, rtol=0)
    assert torch.equal(twice[1], labels)


def test_flip_happens_with_the_probability_asked_for():
    images, labels = batch(400, 8, 8)
    out = augment(images, labels, Augmentation(vertical_flip=0.25), generator(3))[0]
    share = float(((out - images.flip(2)).abs().amax((1, 2, 3)) < 1e-3).float().mean())
    assert abs(share - 0.25) < 0.07


@pytest.mark.parametrize("spec", [PAPER, STRONG], ids=["paper", "strong"])
def test_image_labels_and_priors_take_the_same_draw(spec):
    """An image that is the label map, read bilinearly, equals the moved labels wherever it is certain."""
    _, labels = batch(16, 64, 64)
    geometry = replace(spec, gamma_log=0.0, contrast=0.0, brightness=0.0)
    image = labels.float() / 2
    moved, moved_labels, moved_prior = augment(image, labels, geometry, generator(5), prior=image.clone())
    torch.testing.assert_close(moved, moved_prior, atol=1e-6, rtol=0)
    certain = ((moved * 2) - (moved * 2).round()).abs() < 1e-5
    assert certain.float().mean() > 0.5
    assert torch.equal((moved * 2).round().to(torch.uint8)[certain], moved_labels[certain])
    hard = augment(image, labels, spec, generator(5), prior=labels.clone())[2]
    assert torch.equal(hard, moved_labels)
    assert not torch.equal(moved_labels, labels)


def test_crop_reads_a_square_of_the_asked_side_within_the_image():
    u = draw_numbers(2000, generator(2))
    for height, width in ((100, 100), (100, 200)):
        m = affine_matrices(Augmentation(crop=1.0, crop_side=0.8), u, height, width)
        assert torch.allclose(m[:, 0, 0] * width, torch.tensor(80.0, dtype=torch.float64))
        assert torch.allclose(m[:, 1, 1] * height, torch.tensor(80.0, dtype=torch.float64))
        assert (m[:, 0, 0] + m[:, 0, 2].abs() <= 1 + 1e-12).all() and (m[:, 1, 1] + m[:, 1, 2].abs()
            <= 1 + 1e-12).all()
    share = (affine_matrices(PAPER, u, 64, 64)[:, :, :2].det().abs() < 0.9).double().mean()
    assert abs(share - 0.5) < 0.04


def test_crop_of_a_ramp_magnifies_it():
    ramp = torch.linspace(0, 1, 80).expand(1, 1, 80, 80).contiguous()
    out = augment(ramp, torch.zeros((1, 1, 80, 80), dtype=torch.uint8), Augmentation(crop=1.0),
                  generator(1))[0]
    slope = out.diff(dim=3)[..., 5:-5]
    torch.testing.assert_close(slope, torch.full_like(slope, 0.8 / 79), atol=1e-5, rtol=0)


def test_rotation_is_a_true_rotation_for_images_that_are_not_square():
    u = draw_numbers(50, generator(4))
    height, width = 60, 100
    m = affine_matrices(Augmentation(rotation_degrees=30.0), u, height, width)
    to_pixels = torch.diag(torch.tensor([width / 2, height / 2], dtype=torch.float64))
    turned = to_pixels @ m[:, :, :2] @ to_pixels.inverse()
    identity = torch.eye(2, dtype=torch.float64).expand(50, 2, 2)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), identity)
    angles = torch.rad2deg(torch.atan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert angles.abs().max() <= 30 and angles.abs().max() > 20 and angles.min() < 0 < angles.max()


def test_zoom_and_shift_stay_in_their_ranges():
    m = affine_matrices(Augmentation(scale_log=0.3, shift=0.15), draw_numbers(3000, generator(6)), 64, 64)
    zoom = m[:, :, :2].det().sqrt()
    assert math.exp(-0.3) <= zoom.min() < 0.76 and 1.32 < zoom.max() <= math.exp(0.3)
    assert 0.29 < m[:, :, 2].abs().max() <= 0.3


def test_a_corner_filled_by_reflection_carries_its_label():
    """What is outside is mirrored in image and labels alike: no zeros come in, and pairs stay pairs."""
    labels = torch.ones((8, 1, 48, 48), dtype=torch.uint8)
    out = augment(labels.float() * 0.5, labels, Augmentation(rotation_degrees=45, shift=0.15), generator())
    assert out[1].min() == 1 and torch.allclose(out[0], torch.tensor(0.5))


@pytest.mark.parametrize("c", [0.2, 0.4, 0.5, 0.8])
def test_side_cutout_follows_its_formula(c):
    size = 200
    box = cutout_rectangles(Augmentation(cutout=c), draw_numbers(20_000, generator(7)), size, size)
    top, left, tall, wide = box.T
    erased = (tall * wide).double() / size**2
    assert abs(erased.mean() / (c**2 / 4) - 1) < 0.03
    assert erased.max() <= c**2 + 1e-12 and erased.max() > 0.9 * c**2
    assert tall.min() == 0 and tall.max() == int(c * size) and wide.max() == int(c * size)
    assert abs(np.corrcoef(tall.numpy(), wide.numpy())[0, 1]) < 0.03, "the sides are independent"
    assert ((top >= 0).all() and (left >= 0).all() and (top + tall <= size).all()
            and (left + wide <= size).all())


@settings(max_examples=40, deadline=None)
@given(c=st.floats(0.01, 1), height=st.integers(24, 200), width=st.integers(24, 200),
       seed=st.integers(0, 10**6))
def test_area_cutout_erases_exactly_its_fraction(c, height, width, seed):
    spec = Augmentation(cutout=c, cutout_mode="area")
    top, left, tall, wide = cutout_rectangles(spec, draw_numbers(64, generator(seed)), height, width).T
    assert ((tall * wide - c * height * width).abs() <= torch.maximum(tall, wide) / 2 + 1).all()
    assert (tall >= 1).all() and (wide >= 1).all()
    assert ((top >= 0).all() and (left >= 0).all() and (top + tall <= height).all()
            and (left + wide <= width).all())


def test_area_cutout_has_many_shapes_and_places():
    spec = Augmentation(cutout=0.2, cutout_mode="area")
    top, left, tall, wide = cutout_rectangles(spec, draw_numbers(500, generator(8)), 100, 100).T.double()
    ratio = tall / wide
    assert ratio.min() < 0.4 and ratio.max() > 2.5 and 0.3 < ratio.min() and ratio.max() < 3.4
    assert len(top.unique()) > 30 and len(left.unique()) > 30


@pytest.mark.parametrize("mode", ["side", "area"])
def test_cutout_fills_one_grey_and_leaves_labels_alone(mode):
    images, labels = batch(12, 64, 64)
    prior = images.clone()
    out, out_labels, out_prior = augment(images, labels, augmentation("none", 0.5, mode),
                                         generator(9), prior=prior)
    assert torch.equal(out_labels, labels) and torch.equal(out_prior, prior)
    greys = []
    for before, after in zip(images, out):
        changed = after[before != after]
        assert changed.unique().numel() <= 1
        greys += changed[:1].tolist()
    assert len(set(greys)) > 5 and all(abs(g * 255 - round(g * 255)) < 1e-4 for g in greys)
    if mode == "area":
        assert abs(float((images != out).float().mean()) - 0.5) < 0.01


def test_cutout_probability_is_kept():
    u = draw_numbers(4000, generator(1))
    boxes = cutout_rectangles(Augmentation(cutout=0.5, cutout_mode="area", cutout_probability=0.5), u, 50, 50)
    assert abs((boxes[:, 2] > 0).double().mean() - 0.5) < 0.03


def test_arms_that_differ_in_cutout_share_geometry_and_the_generator_position():
    images, labels = batch()
    ends = []
    moved = []
    for spec in (PAPER, augmentation("paper", 0.2), augmentation("paper", 0.5, "area"), NONE):
        g = generator(11)
        moved.append(augment(images, labels, spec, g)[1])
        ends.append(torch.rand(1, generator=g).item())
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])
    assert len(set(ends)) == 1


def test_same_seed_same_batch_and_no_global_state():
    images, labels = batch()
    spec = augmentation("strong", 0.4)
    torch.manual_seed(1)
    first = augment(images, labels, spec, generator(3))
    state = torch.random.get_rng_state()
    torch.rand(5)
    torch.random.set_rng_state(state)
    second = augment(images, labels, spec, generator(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(augment(images, labels, spec, generator(4))[0], first[0])


def test_intensity_is_bounded_monotone_and_only_where_asked():
    images, _ = batch(64)
    u = draw_numbers(64, generator(2))
    assert change_intensity(images, PAPER, u) is images
    changed = change_intensity(images, STRONG, u)
    assert changed.min() >= 0 and changed.max() <= 1
    order = images.flatten(1).argsort(1)
    assert (changed.flatten(1).gather(1, order).diff(dim=1) >= -1e-6).all()


def test_warp_accepts_bool_and_keeps_it():
    mask = batch(2)[1] > 0
    m = affine_matrices(PAPER, draw_numbers(2, generator()), 48, 48)
    assert warp([mask], m)[0].dtype == torch.bool


def test_cut_out_copies():
    images = torch.zeros((1, 1, 8, 8))
    out = cut_out(images, torch.tensor([[2, 3, 2, 4]]), torch.tensor([1.0]))
    assert images.sum() == 0 and out.sum() == 8 and out[0, 0, 2:4, 3:7].sum() == 8


@pytest.mark.parametrize("c", [-0.1, 1.0001, 20, float("nan"), float("inf"), "0.2", None, True])
def test_cutout_out_of_range_is_refused(c):
    with pytest.raises(ConfigError, match="cutout is out of range") as caught:
        augmentation("paper", cutout=c)
    assert "[0, 1]" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("field", ["vertical_flip", "crop", "crop_side", "rotation_degrees",
                                   "shift", "gamma_log"])
def test_every_field_has_a_range(field):
    with pytest.raises(ConfigError, match=field):
        Augmentation(**{field: 200.0})
    with pytest.raises(ConfigError, match=field):
        Augmentation(**{field: -0.5})


def test_unknown_names_are_answered_with_the_valid_ones():
    with pytest.raises(ConfigError, match="strong"):
        augmentation("stron")
    with pytest.raises(ConfigError, match="area"):
        augmentation("paper", cutout_mode="areas")


def test_mismatched_sizes_name_both_shapes():
    images, labels = batch()
    with pytest.raises(GeometryError) as caught:
        augment(images, labels[:, :, :40], PAPER, generator())
    assert "(6, 1, 48, 48)" in str(caught.value) and "(6, 1, 40, 48)" in str(caught.value)
    with pytest.raises(GeometryError) as caught:
        augment(images, labels, PAPER, generator(), prior=images[:5])
    assert "prior (5, 1, 48, 48)" in str(caught.value)
    with pytest.raises(GeometryError):
        augment(images[0], labels[0], PAPER, generator())


def test_wrong_dtypes_are_refused():
    images, labels = batch()
    with pytest.raises(IntensityError, match="uint8"):
        augment((images * 255).to(torch.uint8), labels, PAPER, generator())
    with pytest.raises(IntensityError, match="labels must be integers"):
        augment(images, labels.float(), PAPER, generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_sees_the_same_augmentation():
    images, labels = batch(8, 96, 96)
    spec = augmentation("strong", 0.5)
    here = augment(images, labels, spec, generator(1))
    there = augment(images.cuda(), labels.cuda(), spec, generator(1))
    assert there[0].device.type == "cuda" and there[1].device.type == "cuda"
    assert (here[1] == there[1].cpu()).float().mean() > 0.999
    assert (here[0] - there[0].cpu()).abs().mean() < 1e-3
