"""The maps behind the published Inf-Net tables must give the published numbers. Skipped without them."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covidsev.data.datasets import find_covid_semiseg
from covidsev.data.pictures import read_map, read_mask
from covidsev.method import metrics
from covidsev.method.metrics import evaluate_folder, per_image, pooled_dice, summarise, toolbox, toolbox_image

SINGLE = "Results/Lung infection segmentation"
MULTI = "Results/Multi-class lung infection segmentation"
FOLDERS = {  # models of published_results.csv whose maps are kept: where the maps are, where the truth is
    ("infection", "UNet"): (f"{SINGLE}/UNet", "LungInfection-Test/GT"),
    ("infection", "Inf-Net"): (f"{SINGLE}/Inf-Net", "LungInfection-Test/GT"),
    **{(label, "Semi-Inf-Net_UNet"): (f"{MULTI}/{folder}/Semi-Inf-Net_UNet", f"MultiClassInfection-Test/GT-{number}")
       for label, folder, number in (("ggo", "Ground-glass opacities", 1), ("consolidation", "Consolidation", 2))}}
CONSOLIDATION = ("consolidation", "Semi-Inf-Net_UNet")
EACH = pytest.mark.parametrize("key", list(FOLDERS), ids=" ".join)


@pytest.fixture(scope="module")
def folders(data_root, published_root):
    """Maps folder and truth folder of each kept model."""
    testing = find_covid_semiseg(data_root) / "TestingSet"
    return {key: (published_root / maps, testing / truth) for key, (maps, truth) in FOLDERS.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    """Maps and truths as arrays, read once."""
    return {key: ([read_map(path) for path in sorted(maps.glob("*.png"))],
                  [read_mask(truth / path.name) for path in sorted(maps.glob("*.png"))])
            for key, (maps, truth) in folders.items()}


@pytest.fixture(scope="module")
def stored(published_root):
    """(name of a table of the pack, label and model) -> its rows."""
    def rows(name, key):
        table = pd.read_csv(published_root / f"{name}.csv")
        return table[(table["label"] == key[0]) & (table["model"] == key[1])]
    return rows


def printed(values):
    return [f"{value:.3f}" for value in values]


@EACH
def test_every_published_number_to_three_decimals(key, folders, stored, recwarn):
    published = stored("published_results", key)
    summary = evaluate_folder(*folders[key]).summary.set_index("metric")["value"]
    assert len(published) >= 6 and summary["n_images"] == 48 and summary["n_resized"] == 0
    assert printed(summary[published["metric"]]) == printed(published["value"])
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


@EACH
def test_the_authors_full_precision_values(key, loaded, stored):
    table, scores = stored("results_full_precision", key), toolbox(*loaded[key])
    assert len(table) >= 10
    np.testing.assert_allclose([scores[name] for name in table["metric"]], table["value"], rtol=0, atol=1e-11)


def threshold_curves(maps, truths):
    """The mean over images of each curve."""
    each = [toolbox_image(*pair).curves for pair in zip(maps, truths, strict=True)]
    return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}


@EACH
def test_the_threshold_curves_to_1e9(key, loaded, stored):
    table = stored("threshold_curves", key).sort_values("threshold_index")
    curves = threshold_curves(*loaded[key])
    np.testing.assert_allclose(curves["e_measure"], table["e_measure"], rtol=0, atol=1e-9)
    for name in ("dice", "sensitivity", "specificity"):  # counts of pixels: nothing to round
        np.testing.assert_array_equal(curves[name], table[name], err_msg=name)


def test_linspace_thresholds_do_not_give_the_published_numbers(loaded, stored, monkeypatch):
    """A guard: were the thresholds ever 'tidied up', a printed digit would change."""
    key = "infection", "UNet"
    monkeypatch.setattr(metrics, "toolbox_thresholds", lambda: np.linspace(1, 0, 256))
    published, scores = stored("published_results", key), toolbox(*loaded[key])
    assert printed(scores[name] for name in published["metric"]) != printed(published["value"])
    curve = stored("threshold_curves", key).sort_values("threshold_index")["dice"]
    assert (np.abs(threshold_curves(*loaded[key])["dice"] - curve.to_numpy()) > 1e-9).sum() > 10


def test_the_released_scripts_e_measure_does_not_give_the_published_numbers(loaded, stored, monkeypatch):
    """>= instead of > for the E-measure, as in the released main.m, moves the consolidation row by .001."""
    counts_at = metrics.counts_at
    monkeypatch.setattr(metrics, "counts_at", lambda *args, strict=False: counts_at(*args, strict=False))
    published = stored("published_results", CONSOLIDATION).set_index("metric")["value"]
    assert round(toolbox(*loaded[CONSOLIDATION])["meanEm"], 3) != published["meanEm"]


@pytest.mark.parametrize("model, expected", [
    ("Inf-Net", {"dice": 0.7377, "iou": 0.5991, "sensitivity": 0.7185, "specificity": 0.9627, "soft_dice": 0.6838,
                 "area_error": 0.0200, "pooled": 0.8010}),
    ("UNet", {"dice": 0.5413, "iou": 0.3910, "sensitivity": 0.5342, "specificity": 0.9286, "soft_dice": 0.4172,
              "area_error": 0.0720, "pooled": 0.6091})])
def test_plain_scores_of_the_published_maps(loaded, model, expected):
    """The published .682 and .439 are .738 and .541 at one plain threshold: known answers."""
    pair = loaded["infection", model]
    ours = {**per_image(*pair).drop(columns="id").mean(), "pooled": pooled_dice(*pair)}
    np.testing.assert_allclose([ours[name] for name in expected], list(expected.values()), atol=5e-5)


def test_the_empty_rule_on_consolidation(loaded):
    """Ten of 48 slices have no consolidation and the network leaves one of them empty."""
    means = {rule: summarise(per_image(*loaded[CONSOLIDATION], empty=rule)).set_index("metric")
             for rule in ("exclude", "zero", "one")}
    counts = means["exclude"]["value"]
    assert (counts["n_images"], counts["n_empty_truth"], counts["n_both_empty"]) == (48, 10, 1)
    assert means["exclude"].loc["dice", "n"] == 47 and means["one"].loc["dice", "n"] == 48
    dice = [each.loc["dice", "value"] for each in means.values()]
    np.testing.assert_allclose(dice, [0.371, 0.3631, 0.3840], atol=5e-4)


def test_a_perfect_map_is_not_perfect_for_the_toolbox(loaded):
    """Empty truths score 0 whatever the map, so consolidation Dice stops at 38 of 48."""
    truths = loaded[CONSOLIDATION][1]
    assert toolbox(truths, truths)["maxDice"] == pytest.approx(38 / 48)
    assert per_image(truths, truths)["dice"].mean() == 1


def test_maps_saved_at_352_pixels_score_nearly_the_same(folders, tmp_path):
    """The released script saves at 352 x 352: such a folder is scored at the size of the truth."""
    (maps, truth), scored = folders["infection", "Inf-Net"], []
    for name in ("native", "saved"):
        (tmp_path / name).mkdir()
        for path in sorted(maps.glob("*.png"))[::6]:
            picture = Image.open(path)
            size = (352, 352) if name == "saved" else picture.size
            picture.resize(size, Image.Resampling.BILINEAR).save(tmp_path / name / path.name)
        result = evaluate_folder(tmp_path / name, truth, allow_missing=True)
        scored.append(result.summary.set_index("metric")["value"])
    native, saved = scored
    assert saved["n_resized"] == saved["n_images"] == 8
    assert native["n_resized"] == 0 and native["n_truths_without_map"] == 40
    names = ["meanDice", "Sm", "meanEm", "MAE", "dice"]
    np.testing.assert_allclose(saved[names], native[names], atol=0.01)
