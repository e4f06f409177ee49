"""Augmentation: one draw for everything, labels never invented and never cut, nothing changed in place."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from covidsev.method.augmentation import (NONE, PAPER, PRESETS, Augmentation, affine_matrices,
                                          augment, augmentation, cutout_rectangles, draw_numbers,
                                          warp)
from covidsev.core import ConfigError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 6, height: int = 48, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images and blocky labels, so that every displaced pixel is seen."""
    rng = generator(seed)
    images = torch.rand((n, 1, height, width), generator=rng)
    blocks = torch.randint(0, 3, (n, 1, height // 8, width // 8), generator=rng, dtype=torch.uint8)
    return images, blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)


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


def test_flips_crops_and_cutouts_happen_as_often_as_asked_for():
    images, labels = batch(400, 8, 8)
    out = augment(images, labels, Augmentation(vertical_flip=0.25), generator(3))[0]
    share = float(((out - images.flip(2)).abs().amax((1, 2, 3)) < 1e-3).float().mean())
    assert abs(share - 0.25) < 0.07
    u = draw_numbers(4000, generator(1))
    share = (affine_matrices(PAPER, u, 64, 64)[:, :, :2].det().abs() < 0.9).double().mean()
    assert abs(share - 0.5) < 0.04
    boxes = cutout_rectangles(Augmentation(cutout=0.5, cutout_mode="area", cutout_probability=0.5), u, 50, 50)
    assert abs((boxes[:, 2] > 0).double().mean() - 0.5) < 0.03


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


@settings(max_examples=40, deadline=None)
@given(c=st.floats(0.01, 1), height=st.integers(24, 200), width=st.integers(24, 200), seed=st.integers(0, 10**6))
def test_area_cutout_erases_exactly_its_fraction(c, height, width, seed):
    spec = Augmentation(cutout=c, cutout_mode="area")
    top, left, tall, wide = cutout_rectangles(spec, draw_numbers(64, generator(seed)), height, width).T
    assert ((tall * wide - c * height * width).abs() <= torch.maximum(tall, wide) / 2 + 1).all()
    assert min(tall.min(), wide.min()) >= 1 and min(top.min(), left.min()) >= 0
    assert (top + tall).max() <= height and (left + wide).max() <= width


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


def test_arms_that_differ_in_cutout_share_geometry_and_the_generator_position():
    (images, labels), ends, moved = batch(), set(), []
    for spec in (PAPER, augmentation("paper", 0.2), augmentation("paper", 0.5, "area"), NONE):
        moved.append(augment(images, labels, spec, g := generator(11))[1])
        ends.add(torch.rand(1, generator=g).item())
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2]) and len(ends) == 1


def test_warp_accepts_bool_and_keeps_it():
    mask = batch(2)[1] > 0
    m = affine_matrices(PAPER, draw_numbers(2, generator()), 48, 48)
    assert warp([mask], m)[0].dtype == torch.bool


@pytest.mark.parametrize("field", ["vertical_flip", "crop", "crop_side", "rotation_degrees",
                                   "shift", "gamma_log"])
def test_every_field_has_a_range(field):
    with pytest.raises(ConfigError, match=field):
        Augmentation(**{field: 200.0})
    with pytest.raises(ConfigError, match=field):
        Augmentation(**{field: -0.5})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_sees_the_same_augmentation():
    images, labels = batch(8, 96, 96)
    spec = augmentation("strong", 0.5)
    here = augment(images, labels, spec, generator(1))
    there = augment(images.cuda(), labels.cuda(), spec, generator(1))
    assert there[0].device.type == "cuda" and there[1].device.type == "cuda"
    assert (here[1] == there[1].cpu()).float().mean() > 0.999
    assert (here[0] - there[0].cpu()).abs().mean() < 1e-3
