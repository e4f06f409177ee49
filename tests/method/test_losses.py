"""The losses: equality with plain definitions, the published defect, properties, bad input."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from covidsev.core import ConfigError, GeometryError
from covidsev.method.losses import (LossParts, SideOutputs, boundary_weights, box_mean, edge_loss,
                                    infnet_loss, structure_loss, test_loss_mean, test_loss_sum)


def blobs(seed: int, batch: int = 2, size: int = 40) -> torch.Tensor:
    """Masks with some structure: thresholded smooth noise, (B, 1, H, W) of 0 and 1."""
    noise = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = functional.avg_pool2d(noise, 7, 1, 3)
    return (smooth > smooth.flatten(1).quantile(0.8, dim=1).view(-1, 1, 1, 1)).float()


def logits_for(seed: int, mask: torch.Tensor) -> torch.Tensor:
    return 3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(half=st.integers(0, 20), height=st.integers(1, 50), width=st.integers(1, 50), seed=st.integers(0, 99))
def test_box_mean_equals_the_square_pool(half, height, width, seed):
    k = 2 * half + 1
    x = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(seed))
    padded = functional.pad(x, [half] * 4)
    torch.testing.assert_close(box_mean(x, k), functional.avg_pool2d(padded, k, 1), atol=1e-6, rtol=0)


def test_box_mean_equals_the_published_pool():
    x = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(box_mean(x), functional.avg_pool2d(x, 31, stride=1, padding=15),
                               atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [0, 2, 30, -1])
def test_box_needs_a_centre(k):
    with pytest.raises(GeometryError, match="odd number"):
        box_mean(torch.zeros(1, 1, 8, 8), k)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_weights_are_between_one_and_six_and_carry_no_gradient(seed):
    weights = boundary_weights(blobs(seed).requires_grad_())
    assert 1 <= weights.min() and weights.max() <= 6 and not weights.requires_grad


def test_as_published_equals_the_legacy_keyword():
    """The published line itself, with the keyword that PyTorch reads as "take the mean"."""
    mask, variants = blobs(1, batch=3), {}
    logits, weights = logits_for(2, mask), boundary_weights(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduce="none")
    assert entropy.ndim == 0
    published_bce = (weights * entropy).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))
    probs = torch.sigmoid(logits)
    inter, union = (probs * mask * weights).sum(dim=(2, 3)), ((probs + mask) * weights).sum(dim=(2, 3))
    published = (published_bce + 1 - (inter + 1) / (union - inter + 1)).mean()
    for name in ("weighted", "as_published"):
        variants[name] = structure_loss(logits, mask, variant=name)
    torch.testing.assert_close(variants["as_published"], published)
    assert not torch.isclose(variants["weighted"], published, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), variant=st.sampled_from(["weighted", "as_published"]))
def test_batch_loss_is_the_mean_over_images(seed, variant):
    mask = blobs(seed, batch=3)
    logits = logits_for(seed + 1, mask)
    each = [structure_loss(logits[k : k + 1], mask[k : k + 1], variant=variant) for k in range(3)]
    torch.testing.assert_close(structure_loss(logits, mask, variant=variant), torch.stack(each).mean())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), variant=st.sampled_from(["weighted", "as_published"]))
def test_loss_ignores_mirroring_and_falls_with_confidence(seed, variant):
    mask = blobs(seed)
    logits = logits_for(seed, mask)
    torch.testing.assert_close(structure_loss(logits.flip(-1), mask.flip(-1), variant=variant),
                               structure_loss(logits, mask, variant=variant))
    right = 2 * mask - 1
    losses = [structure_loss(scale * right, mask, variant=variant) for scale in (-4, -1, 0, 1, 4, 16)]
    assert all(a > b for a, b in zip(losses, losses[1:])) and losses[-1] < 1e-3


def test_gradient_matches_finite_differences():
    mask = blobs(0, batch=1, size=6)
    weights = boundary_weights(mask).double()
    logits = logits_for(0, mask)
    assert torch.allclose(weights, weights.clamp(1, 6))

    def loss_of(values):
        return infnet_loss(SideOutputs(s_3=values, edge=values), mask, mask).total

    values = logits.clone().requires_grad_()
    loss_of(values).backward()
    for place in [(0, 0, 0, 0), (0, 0, 3, 2), (0, 0, 5, 5)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-2
        numeric = (loss_of(logits + step) - loss_of(logits - step)) / 2e-2
        torch.testing.assert_close(values.grad[place], numeric, atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [6e4, -6e4])
def test_extreme_logits_stay_finite(dtype, size):
    mask = blobs(3, size=64)
    logits = torch.full(mask.shape, size, dtype=dtype, requires_grad=True)
    loss = infnet_loss(SideOutputs(s_3=logits, edge=logits), mask, mask).total
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_empty_and_full_masks(value):
    mask = torch.full((2, 1, 32, 32), value)
    right, wrong = (structure_loss(sign * (40 * mask - 20), mask) for sign in (1, -1))
    assert right < 1e-4 and wrong > 10


def test_total_is_equation_2_and_table_1_leaves_the_edge_out():
    mask = blobs(5)
    maps = [logits_for(k, mask) for k in range(5)]
    parts = infnet_loss(SideOutputs(*maps), mask, 1 - mask)
    single = [structure_loss(m, mask) for m in maps[:4]]
    torch.testing.assert_close(parts.total, sum(single) + edge_loss(maps[4], 1 - mask))
    torch.testing.assert_close(test_loss_sum(parts), sum(single))
    torch.testing.assert_close(test_loss_mean(parts), sum(single) / 4)
    assert list(parts._fields) == ["total", "s_g", "s_5", "s_4", "s_3", "edge"]


def test_a_network_with_one_map():
    mask = blobs(6)
    parts = infnet_loss(SideOutputs(s_3=logits_for(1, mask)), mask)
    assert parts == LossParts(total=parts.total, s_3=parts.s_3) and parts.total == parts.s_3
    assert test_loss_sum(parts) == test_loss_mean(parts) == parts.s_3


def test_inputs_are_not_changed():
    mask = blobs(7)
    maps = SideOutputs(s_g=logits_for(1, mask), s_3=logits_for(2, mask))
    before = [mask.clone(), maps.s_g.clone(), maps.s_3.clone()]
    infnet_loss(maps, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, [mask, maps.s_g, maps.s_3]))


def test_wrong_shapes_and_names_are_refused():
    mask = blobs(9)
    logits = torch.zeros_like(mask)
    with pytest.raises(GeometryError, match="resize the mask"):
        structure_loss(logits[:, :, :20], mask)
    with pytest.raises(GeometryError, match="differ in shape"):
        edge_loss(logits[:1], mask)
    with pytest.raises(ConfigError, match="as_published"):
        structure_loss(logits, mask, variant="as_publishd")
