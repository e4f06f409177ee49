"""Multi-class network: published counts, properties of encoding, losses, folds and table, leaks and bad input."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

from covidsev.core import ConfigError, GeometryError, IntensityError, MaskError
from covidsev.data.datasets import load_covid_semiseg
from covidsev.data.pictures import read_map
from covidsev.method.losses import focal
from covidsev.method.metrics import per_image
from covidsev.method.multiclass import (check_labels, class_dice, class_table, multiclass_loss,
                                        one_hot, prior_tensor)


def random_labels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("labels, check, error", [
    (torch.full((1, 1, 2, 2), -1), check_labels, MaskError), (torch.ones(1, 1, 2, 2), check_labels, MaskError),
    (torch.full((1, 1, 2, 2), 75, dtype=torch.uint8), check_labels, MaskError),
    (torch.zeros(1, 1, 0, 2, dtype=torch.uint8), check_labels, MaskError),
    (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), one_hot, GeometryError)])
def test_labels_that_are_none(labels, check, error):
    with pytest.raises(error):
        check(labels)


# losses

GAMMAS = (0.0, 2.0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_truth_is_better_than_anything_else(gamma):
    labels = random_labels(1, 1, 8, 8)
    right = multiclass_loss(4 * one_hot(labels) - 2, labels, gamma)
    for seed in range(5):
        wrong = random_labels(1, 1, 8, 8, seed=seed + 1)
        assert multiclass_loss(4 * one_hot(wrong) - 2, labels, gamma) > right


@pytest.mark.parametrize("gamma", GAMMAS)
def test_losses_survive_huge_logits_and_half_precision(gamma):
    labels = random_labels(1, 1, 8, 8)
    for scale in (1e4, 6e4):
        logits = (scale * (one_hot(labels) - 0.5)).to(torch.float16).requires_grad_()
        value = multiclass_loss(logits, labels, gamma)
        value.backward()
        assert value.dtype == torch.float32 and torch.isfinite(value) and torch.isfinite(logits.grad).all()


@given(st.floats(0.0, 30.0), st.floats(0.0, 5.0))
def test_focal_never_raises_a_loss(value, gamma):
    loss = torch.tensor(value, dtype=torch.float64)
    assert 0 <= float(focal(loss, gamma)) <= value * (1 + 1e-12)
    assert float(focal(loss, gamma, alpha=0.5)) == pytest.approx(0.5 * float(focal(loss, gamma)))


def test_focal_has_a_gradient_where_the_loss_is_zero():
    loss = torch.zeros(3, requires_grad=True)
    focal(loss, 2.0).sum().backward()
    assert torch.isfinite(loss.grad).all()


# what a training set holds

def test_class_table_counts_and_names_what_is_missing():
    table = class_table([np.array([[0, 1]]), np.array([[0], [0], [1]])])
    assert table["pixels"].tolist() == [3, 2, 0] and table["slices"].tolist() == [2, 2, 0]
    assert table["note"].astype(bool).tolist() == [False, False, True]


def test_prior_tensor_keeps_range_and_shape():
    maps = [np.random.default_rng(0).random((50, 33)), np.ones((64, 80)), np.eye(40, dtype=bool)]
    tensor = prior_tensor(maps, 32)
    assert tensor.shape == (3, 1, 32, 32) and tensor.dtype == torch.float32
    assert 0 <= tensor.min() and tensor.max() <= 1 and torch.allclose(tensor[1], torch.ones(1))
    assert float(tensor[0].mean()) == pytest.approx(maps[0].mean(), abs=0.02)  # averaged, not sampled
    with pytest.raises(IntensityError):
        prior_tensor([255 * maps[1]], 32)
    with pytest.raises(ConfigError, match="no prior"):
        prior_tensor([], 32)


def test_the_published_consolidation_rows_are_one_number_in_two_conventions(repository):
    """Every model's mean over 48 slices, 10 of them without consolidation, is its mean over 38 times 38 / 48."""
    table = pd.read_csv(repository / "results" / "published" / "infnet_table.csv")
    table = table[(table["label"] == "consolidation") & (table["metric"] == "meanDic") & (table["verified"] == "yes")]
    pairs = table.pivot(index="row_key", columns="n", values="value")
    assert len(pairs) == 5 and np.allclose(pairs[48], pairs[38] * 38 / 48, atol=1e-3)


def test_the_classes_of_the_published_maps(data_root, published_root):
    """The maps of Semi-Inf-Net & U-Net at 0.5: Dice of consolidation by classes and by maps is one."""
    test = load_covid_semiseg(data_root, "test")
    folder = published_root / "Results" / "Multi-class lung infection segmentation"
    one, two = ([read_map(folder / name / "Semi-Inf-Net_UNet" / f"{slice_id}.png") >= 0.5 for slice_id in test.ids]
                for name in ("Ground-glass opacities", "Consolidation"))
    found = [np.where(b, 2, a) for a, b in zip(one, two, strict=True)]
    table = class_dice(found, test.labels, test.ids).query("`class` == 'consolidation'")
    each = per_image([b * 1.0 for b in two], [labels == 2 for labels in test.labels])
    assert table["dice"].to_numpy() == pytest.approx(each["dice"].to_numpy(), nan_ok=True)
    assert (table["n_truth"] > 0).sum() == 38 and len(table) == 48  # the two conventions: over 38 or over 48


@pytest.mark.parametrize("found, truth", [([[0]], [[75]]), ([[0.5]], [[0]])])
def test_tables_of_no_classes(found, truth):
    with pytest.raises(MaskError):
        class_dice([np.array(found)], [np.array(truth)])


# the real set

def test_priors_of_the_real_set(data_root):
    """The published priors are the masks."""
    priors, masks = (data_root / "covid-semiseg/Dataset/TrainingSet" / name for name in (
        "MultiClassInfection-Train/Prior", "LungInfection-Train/Doctor-label/GT"))
    assert all(path.read_bytes() == (masks / path.name).read_bytes() for path in priors.iterdir())
