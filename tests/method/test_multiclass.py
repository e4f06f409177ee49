"""Multi-class network: published counts, properties of encoding, losses, folds and table, leaks and bad input."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from covidsev.core import (ConfigError, GeometryError, IntensityError, MaskError)
from covidsev.data.datasets import (SliceSet, load_covid_semiseg, load_phantom)
from covidsev.data.pictures import read_map
from covidsev.method.losses import focal
from covidsev.method.metrics import per_image
from covidsev.method.multiclass import (check_labels, class_dice, class_table, classes_of, dice_table,
                                        multiclass_loss, one_hot, prior_tensor)


@pytest.fixture(scope="module")
def train() -> SliceSet:
    return load_phantom("train", 8, 64, seed=3)


def pair(batch: int = 1, side: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 1, side, side, generator=generator), torch.rand(batch, 1, side, side, generator=generator)


def random_labels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# one-hot

@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 6))
def test_one_hot_is_a_partition_with_an_inverse(values, width):
    labels = torch.tensor((values * width)[: len(values) // width * width or 1], dtype=torch.uint8)
    labels = labels.reshape(1, 1, -1, width if labels.numel() % width == 0 else 1)
    planes = one_hot(labels)
    assert planes.shape == (1, 3, *labels.shape[2:]) and (planes.sum(1) == 1).all()
    assert torch.equal(classes_of(planes), labels)


def shifted(labels: np.ndarray) -> np.ndarray:
    """The published encoding: ones at 3 i + c - 1; planes GGO, consolidation, background."""
    flat = np.zeros(3 * labels.size)
    flat[3 * np.arange(labels.size) + labels.ravel().astype(int) - 1] = 1
    return flat.reshape(*labels.shape, 3).transpose(2, 0, 1)


@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.integers(1, 12))
def test_the_published_encoding_moves_the_background_by_one_pixel(seed, height, width):
    labels = np.random.default_rng(seed).integers(0, 3, (height, width)).astype(np.uint8)
    planes, wrong = one_hot(torch.from_numpy(labels)[None, None])[0].numpy(), shifted(labels)
    assert np.array_equal(wrong[:2], planes[1:])
    assert np.array_equal(wrong[2].ravel(), np.roll(planes[0].ravel(), -1))
    constant_background = len(np.unique(labels == 0)) == 1
    assert constant_background or not np.array_equal(wrong[2], planes[0])


def test_the_published_encoding_on_one_row():
    labels = np.array([[0, 0, 1, 0, 2, 2]], np.uint8)
    assert shifted(labels)[2].tolist() == [[1, 0, 1, 0, 0, 1]]  # the truth is 1 1 0 1 0 0
    assert one_hot(torch.from_numpy(labels)[None, None])[0, 0].tolist() == [[1, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize("labels, error", [
    (torch.full((1, 1, 2, 2), 3, dtype=torch.uint8), MaskError), (torch.full((1, 1, 2, 2), -1), MaskError),
    (torch.full((1, 1, 2, 2), 75, dtype=torch.uint8), MaskError), (torch.ones(1, 1, 2, 2), MaskError),
    (torch.zeros(1, 1, 0, 2, dtype=torch.uint8), MaskError), (torch.zeros(1, 2, 2, dtype=torch.uint8), GeometryError),
    (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), GeometryError)])
def test_labels_that_are_none(labels, error):
    with pytest.raises(error):
        (check_labels if error is MaskError else one_hot)(labels)


# losses

GAMMAS = (0.0, 2.0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_loss_falls_under_gradient_descent(gamma):
    logits, labels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), random_labels(1, 1, 8, 8)
    logits.requires_grad_()
    before = multiclass_loss(logits, labels, gamma)
    before.backward()
    assert before > 0 and torch.isfinite(logits.grad).all()
    assert multiclass_loss(logits - 0.5 * logits.grad, labels, gamma) < before


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


def test_focal_is_taken_pixel_by_pixel():
    labels, logits = random_labels(1, 1, 8, 8), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = functional.binary_cross_entropy_with_logits(logits, one_hot(labels), reduction="none")
    torch.testing.assert_close(multiclass_loss(logits, labels), plain.mean())
    torch.testing.assert_close(multiclass_loss(logits, labels, 2.0), ((1 - torch.exp(-plain)) ** 2 * plain).mean())


def test_loss_of_unequal_sizes():
    for logits in (torch.zeros(1, 3, 4, 2), torch.zeros(2, 3, 2, 2), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(GeometryError, match="differ in size"):
            multiclass_loss(logits, torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


# what a training set holds

def test_class_table_counts_and_names_what_is_missing():
    table = class_table([np.array([[0, 1]]), np.array([[0], [0], [1]])])
    assert table["pixels"].tolist() == [3, 2, 0] and table["slices"].tolist() == [2, 2, 0]
    assert table["note"].astype(bool).tolist() == [False, False, True]


# folds and priors

groups_strategy = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(lambda g: len(set(g)) > 1)


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


# decision

@given(st.integers(0, 1000), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_decision_ignores_any_rising_change_of_all_logits(seed, scale, shift):
    logits = torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    classes = classes_of(logits)
    assert classes.dtype == torch.uint8 and classes.shape == (1, 1, 6, 6)
    for changed in (scale * logits + shift, torch.sigmoid(logits), logits.softmax(1)):
        assert torch.equal(classes_of(changed), classes)


# the table

@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=25)
def test_table_properties(seed, n):
    draw = np.random.default_rng(seed)
    truths = [draw.integers(0, draw.integers(1, 4), (5, 5)) for _ in range(n)]
    found = [draw.integers(0, 3, (5, 5)) for _ in range(n)]
    table = dice_table(class_dice(found, truths)).set_index("class")
    assert list(table.index) == ["lesion mean", "ground-glass opacity", "consolidation", "background"]
    for name, number in (("ground-glass opacity", 1), ("consolidation", 2), ("background", 0)):
        row, there = table.loc[name], sum((truth == number).any() for truth in truths)
        assert (row["n_all"], row["n_non_empty"]) == (n, there)
        if there:  # the two conventions differ by the number that they divide by, and by nothing else
            assert row["all_slices"] * n == pytest.approx(row["non_empty"] * there)
        else:
            assert row["all_slices"] == 0 and np.isnan(row["non_empty"])
    lesions = table.loc[["ground-glass opacity", "consolidation"]]
    assert table.loc["lesion mean", "all_slices"] == pytest.approx(lesions["all_slices"].mean())


def test_the_published_consolidation_rows_are_one_number_in_two_conventions(repository):
    """Every model's mean over 48 slices, 10 of them without consolidation, is its mean over 38 times 38 / 48."""
    table = pd.read_csv(repository / "results" / "published" / "infnet_table.csv")
    table = table[(table["label"] == "consolidation") & (table["metric"] == "meanDic") & (table["verified"] == "yes")]
    pairs = table.pivot(index="row_key", columns="n", values="value")
    assert len(pairs) == 5 and np.allclose(pairs[48], pairs[38] * 38 / 48, atol=1e-3)


def test_the_table_of_the_published_maps(data_root, published_root):
    """The maps of Semi-Inf-Net & U-Net at 0.5: our table agrees with the per-image scores, in both conventions."""
    test = load_covid_semiseg(data_root, "test")
    folder = published_root / "Results" / "Multi-class lung infection segmentation"
    maps = {number: [read_map(folder / name / "Semi-Inf-Net_UNet" / f"{slice_id}.png") for slice_id in test.ids]
            for number, name in ((1, "Ground-glass opacities"), (2, "Consolidation"))}
    found = [np.where(two >= 0.5, 2, np.where(one >= 0.5, 1, 0)) for one, two in zip(maps[1], maps[2], strict=True)]
    table = dice_table(class_dice(found, test.labels, test.ids)).set_index("class")
    each = per_image([(one == 2) * 1.0 for one in found], [labels == 2 for labels in test.labels])
    with_truth = each[each["n_truth"] > 0]
    assert table.loc["consolidation", "non_empty"] == pytest.approx(with_truth["dice"].mean())
    assert table.loc["consolidation", "all_slices"] == pytest.approx(with_truth["dice"].sum() / 48)
    print(table.round(4))


def test_a_perfect_network_on_the_real_test_set(data_root):
    test = load_covid_semiseg(data_root, "test")
    table = dice_table(class_dice(test.labels, test.labels, test.ids)).set_index("class")
    assert table["n_all"].tolist() == [96, 48, 48, 48] and table["n_non_empty"].tolist() == [86, 48, 38, 48]
    assert table["non_empty"].tolist() == [1, 1, 1, 1]
    assert table.loc["consolidation", "all_slices"] == pytest.approx(38 / 48)


@pytest.mark.parametrize("found, truth", [([[3]], [[0]]), ([[0]], [[75]]), ([[0.5]], [[0]]), ([[0, 0]], [[0]])])
def test_tables_of_no_classes(found, truth):
    with pytest.raises((MaskError, GeometryError)):
        class_dice([np.array(found)], [np.array(truth)])


def test_tables_of_unequal_numbers():
    with pytest.raises(ConfigError):
        class_dice([np.zeros((2, 2), int)] * 2, [np.zeros((2, 2), int)])


# the real set

def test_priors_of_the_real_set(data_root):
    """The published priors are the masks."""
    priors, masks = (data_root / "covid-semiseg/Dataset/TrainingSet" / name for name in (
        "MultiClassInfection-Train/Prior", "LungInfection-Train/Doctor-label/GT"))
    assert all(path.read_bytes() == (masks / path.name).read_bytes() for path in priors.iterdir())
