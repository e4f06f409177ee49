"""The maps behind the published Inf-Net tables must give the published numbers. Skipped without them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covidsev.method import metrics
from covidsev.data.datasets import find_covid_semiseg
from covidsev.data.pictures import read_map, read_mask
from covidsev.method.metrics import evaluate_folder, per_image, pooled_dice, summarise, toolbox, toolbox_image

SINGLE = "Results/Lung infection segmentation"
MULTI = "Results/Multi-class lung infection segmentation"
FOLDERS = {  # models of published_results.csv whose maps are kept: where the maps are, where the truth is
    ("infection", "UNet"): (f"{SINGLE}/UNet", "LungInfection-Test/GT"),
    ("infection", "Inf-Net"): (f"{SINGLE}/Inf-Net", "LungInfection-Test/GT"),
    ("ggo", "Semi-Inf-Net_UNet"): (
        f"{MULTI}/Ground-glass opacities/Semi-Inf-Net_UNet",
        "MultiClassInfection-Test/GT-1",
    ),
    ("consolidation", "Semi-Inf-Net_UNet"): (
        f"{MULTI}/Consolidation/Semi-Inf-Net_UNet",
        "MultiClassInfection-Test/GT-2",
    ),
}
EACH = pytest.mark.parametrize("key", list(FOLDERS), ids=" ".join)


@pytest.fixture(scope="module")
def folders(data_root, published_root) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Maps folder and truth folder of each kept model."""
    testing = find_covid_semiseg(data_root) / "TestingSet"
    return {key: (published_root / maps, testing / truth) for key, (maps, truth) in FOLDERS.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    """Maps and truths as arrays, read once."""

    def read(maps: Path, truth: Path):
        stems = sorted(path.stem for path in maps.glob("*.png"))
        return [read_map(maps / f"{stem}.png") for stem in stems], [
            read_mask(truth / f"{stem}.png") for stem in stems
        ]

    return {key: read(*pair) for key, pair in folders.items()}


def rows_of(root: Path, name: str, key: tuple[str, str]) -> pd.DataFrame:
    """The rows of one label and model of a table of the pack."""
    table = pd.read_csv(root / name)
    return table[(table["label"] == key[0]) & (table["model"] == key[1])]


@EACH
def test_every_published_number_to_three_decimals(key, folders, published_root, recwarn):
    published = rows_of(published_root, "published_results.csv", key)
    summary = evaluate_folder(*folders[key]).summary.set_index("metric")["value"]
    assert len(published) >= 6 and summary["n_images"] == 48 and summary["n_resized"] == 0
    compared = published.assign(
        ours=[f"{summary[name]:.3f}" for name in published["metric"]],
        printed=[f"{value:.3f}" for value in published["value"]],
    )
    print(
        f"\n{key}\n{compared[['metric', 'printed', 'ours']].to_string(index=False)}"
    )  # the table, with pytest -s
    assert (compared["ours"] == compared["printed"]).all()
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


@EACH
def test_the_authors_full_precision_values(key, loaded, published_root):
    stored = rows_of(published_root, "results_full_precision.csv", key)
    scores = toolbox(*loaded[key])
    assert len(stored) >= 10
    np.testing.assert_allclose(
        [scores[name] for name in stored["metric"]], stored["value"], rtol=0, atol=1e-11
    )


def threshold_curves(maps, truths):
    """The mean over images of each curve."""
    each = [toolbox_image(*pair).curves for pair in zip(maps, truths, strict=True)]
    return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}


@EACH
def test_the_threshold_curves_to_1e9(key, loaded, published_root):
    stored = rows_of(published_root, "threshold_curves.csv", key).sort_values("threshold_index")
    curves = threshold_curves(*loaded[key])
    for name in ("dice", "sensitivity", "specificity", "e_measure"):
        np.testing.assert_allclose(curves[name], stored[name], rtol=0, atol=1e-9, err_msg=name)
    for name in ("dice", "sensitivity", "specificity"):  # counts of pixels: nothing to round
        np.testing.assert_array_equal(curves[name], stored[name], err_msg=name)


def test_linspace_thresholds_do_not_give_the_published_numbers(loaded, published_root, monkeypatch):
    """A guard: were the thresholds ever 'tidied up', a printed digit would change."""
    key = "infection", "UNet"
    stored = rows_of(published_root, "threshold_curves.csv", key).sort_values("threshold_index")
    monkeypatch.setattr(metrics, "toolbox_thresholds", lambda: np.linspace(1, 0, 256))
    curves, scores = threshold_curves(*loaded[key]), toolbox(*loaded[key])
    moved = np.abs(curves["dice"] - stored["dice"].to_numpy()) > 1e-9
    assert moved.sum() > 10
    printed = rows_of(published_root, "published_results.csv", key)
    assert any(
        f"{scores[name]:.3f}" != f"{value:.3f}" for name, value in zip(printed["metric"], printed["value"])
    )


def test_the_released_scripts_e_measure_does_not_give_the_published_numbers(
    loaded, published_root, monkeypatch
):
    """>= instead of > for the E-measure, as in the released main.m, moves the consolidation row by .001."""
    key = "consolidation", "Semi-Inf-Net_UNet"
    counts_at = metrics.counts_at
    monkeypatch.setattr(metrics, "counts_at", lambda *args, strict=False: counts_at(*args, strict=False))
    printed = rows_of(published_root, "published_results.csv", key).set_index("metric")["value"]
    assert round(toolbox(*loaded[key])["meanEm"], 3) != printed["meanEm"]


def test_plain_scores_of_the_published_maps(loaded):
    """The published .682 and .439 are .738 and .541 at one plain threshold: known answers."""
    expected = {
        "Inf-Net": {
            "dice": 0.7377,
            "iou": 0.5991,
            "sensitivity": 0.7185,
            "specificity": 0.9627,
            "soft_dice": 0.6838,
            "area_error": 0.0200,
            "pooled": 0.8010,
        },
        "UNet": {
            "dice": 0.5413,
            "iou": 0.3910,
            "sensitivity": 0.5342,
            "specificity": 0.9286,
            "soft_dice": 0.4172,
            "area_error": 0.0720,
            "pooled": 0.6091,
        },
    }
    for model, scores in expected.items():
        maps, truths = loaded["infection", model]
        ours = {**per_image(maps, truths).drop(columns="id").mean(), "pooled": pooled_dice(maps, truths)}
        np.testing.assert_allclose(
            [ours[name] for name in scores], list(scores.values()), atol=5e-5, err_msg=model
        )


def test_the_empty_rule_on_consolidation(loaded):
    """Ten of 48 slices have no consolidation and the network leaves one of them empty."""
    pair = loaded["consolidation", "Semi-Inf-Net_UNet"]
    means = {
        rule: summarise(per_image(*pair, empty=rule)).set_index("metric")
        for rule in ("exclude", "zero", "one")
    }
    counts = means["exclude"]["value"]
    assert (counts["n_images"], counts["n_empty_truth"], counts["n_both_empty"]) == (48, 10, 1)
    assert means["exclude"].loc["dice", "n"] == 47 and means["one"].loc["dice", "n"] == 48
    np.testing.assert_allclose(
        [means[rule].loc["dice", "value"] for rule in means], [0.371, 0.3631, 0.3840], atol=5e-4
    )


def test_a_perfect_map_is_not_perfect_for_the_toolbox(loaded):
    """Empty truths score 0 whatever the map, so consolidation Dice stops at 38 of 48."""
    truths = loaded["consolidation", "Semi-Inf-Net_UNet"][1]
    assert toolbox(truths, truths)["maxDice"] == pytest.approx(38 / 48)
    assert per_image(truths, truths)["dice"].mean() == 1


def test_maps_saved_at_352_pixels_score_nearly_the_same(folders, tmp_path):
    """The released script saves at 352 x 352: such a folder is scored at the size of the truth."""
    maps, truth = folders["infection", "Inf-Net"]
    scored = {}
    for name, size in (("native", None), ("saved", (352, 352))):
        (tmp_path / name).mkdir()
        for path in sorted(maps.glob("*.png"))[::6]:
            picture = Image.open(path)
            (picture.resize(size, Image.Resampling.BILINEAR) if size else picture).save(
                tmp_path / name / path.name
            )
        scored[name] = evaluate_folder(tmp_path / name, truth, allow_missing=True).summary.set_index(
            "metric"
        )["value"]
    assert scored["saved"]["n_resized"] == scored["saved"]["n_images"] == 8
    assert scored["native"]["n_resized"] == 0 and scored["native"]["n_truths_without_map"] == 40
    names = ["meanDice", "Sm", "meanEm", "MAE", "dice"]
    np.testing.assert_allclose(scored["saved"][names], scored["native"][names], atol=0.01)


