"""The losses: equality with plain definitions, the published defect, properties, bad input."""

import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional

from covidsev.method.losses import SideOutputs, boundary_weights, infnet_loss, structure_loss


def blobs(seed: int, batch: int = 2, size: int = 40) -> torch.Tensor:
    """Masks with some structure: thresholded smooth noise, (B, 1, H, W) of 0 and 1."""
    noise = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = functional.avg_pool2d(noise, 7, 1, 3)
    return (smooth > smooth.flatten(1).quantile(0.8, dim=1).view(-1, 1, 1, 1)).float()


def logits_for(seed: int, mask: torch.Tensor) -> torch.Tensor:
    return 3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))


def test_as_published_equals_the_legacy_keyword():
    """The published line itself, with the keyword that PyTorch reads as "take the mean"."""
    mask = blobs(1, batch=3)
    logits, weights = logits_for(2, mask), boundary_weights(mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduce="none")
    probs, kept = torch.sigmoid(logits), (mask.clone(), logits.clone())
    inter, union = (probs * mask * weights).sum(dim=(2, 3)), ((probs + mask) * weights).sum(dim=(2, 3))
    bce = (weights * entropy).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))
    published = (bce + 1 - (inter + 1) / (union - inter + 1)).mean()
    torch.testing.assert_close(structure_loss(logits, mask, variant="as_published"), published)
    assert not torch.isclose(structure_loss(logits, mask), published, rtol=1e-3)
    assert torch.equal(mask, kept[0]) and torch.equal(logits, kept[1])  # nothing was changed in place


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), variant=st.sampled_from(["weighted", "as_published"]))
def test_batch_loss_is_the_mean_over_images_and_ignores_mirroring(seed, variant):
    mask = blobs(seed, batch=3)
    logits = logits_for(seed + 1, mask)
    each = [structure_loss(logits[k:k + 1].flip(-1), mask[k:k + 1].flip(-1), variant=variant) for k in range(3)]
    torch.testing.assert_close(structure_loss(logits, mask, variant=variant), torch.stack(each).mean())


def test_gradient_matches_finite_differences():
    mask = blobs(0, batch=1, size=6)
    logits = logits_for(0, mask)

    def loss_of(values):
        return infnet_loss(SideOutputs(s_3=values, edge=values), mask, mask).total

    (gradient,) = torch.autograd.grad(loss_of(values := logits.clone().requires_grad_()), values)
    for place in [(0, 0, 0, 0), (0, 0, 3, 2), (0, 0, 5, 5)]:
        step = torch.zeros_like(logits)
        step[place] = 1e-2
        numeric = (loss_of(logits + step) - loss_of(logits - step)) / 2e-2
        torch.testing.assert_close(gradient[place], numeric, atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("dtype, size", [(torch.float16, 6e4), (torch.bfloat16, 6e4), (torch.bfloat16, -6e4)])
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
