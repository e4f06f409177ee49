"""Properties of the metrics, bad input, and folders as a user has them."""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from scipy import ndimage

from covidsev.method import metrics
from covidsev.core import ConfigError, GeometryError, IntensityError, MaskError
from covidsev.method.metrics import (Counts, check_pair, confusion, dice, dsc, e_measure,
                                     empty_counts, evaluate_folder, hd95, match_stems, overlap,
                                     per_image, pooled_dice, quadrant_histograms, resize_map,
                                     s_measure, soft_dice, summarise, to_levels, toolbox)

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=14)
GREY = st.integers(0, 255).map(lambda level: level / 255)


@st.composite
def mask_pairs(draw):
    """Two masks of one shape; either may be empty or full."""
    shape = draw(SHAPES)
    return tuple(draw(arrays(bool, shape)) for _ in range(2))


@st.composite
def map_and_truth(draw, values=GREY):
    """A map with `values` and a truth of its shape."""
    shape = draw(SHAPES)
    return draw(arrays(np.float64, shape, elements=values)), draw(arrays(bool, shape))


FLOATS = map_and_truth(st.floats(0, 1))


# overlap ----------------------------------------------------------------------------------------------------


@given(mask_pairs())
def test_dice_agrees_with_its_definition_and_is_symmetric(pair):
    a, b = pair
    if a.any() or b.any():
        assert 0 <= 2 * (a & b).sum() / (a.sum() + b.sum()) == dice(a, b) == dice(b, a) <= 1
    else:
        assert np.isnan(dice(a, b))
    assert dice(a, a, empty="one") == 1 and (not a.any() or dice(a, b & ~a) == 0)


@given(mask_pairs(), st.sampled_from(sorted(metrics.EMPTY_RULES)))
def test_scores_are_bounded_and_related(pair, rule):
    scores = overlap(confusion(*pair), rule)
    assert all(np.isnan(score) or 0 <= score <= 1 for score in scores.values())
    np.testing.assert_allclose(scores["dice"], 2 * scores["iou"] / (1 + scores["iou"]))
    flipped = overlap(confusion(*pair[::-1]), rule)
    np.testing.assert_equal(flipped["precision"], scores["sensitivity"])
    complement = overlap(confusion(~pair[0], ~pair[1]))
    if (~pair[1]).any():
        assert complement["sensitivity"] == scores["specificity"]


@pytest.mark.parametrize("rule, both_empty", [("exclude", np.nan), ("one", 1.0), ("zero", 0.0)])
def test_the_empty_rule_decides_only_where_both_are_empty(rule, both_empty):
    empty, some = np.zeros((3, 4), bool), np.eye(3, 4, dtype=bool)
    np.testing.assert_equal(dsc(empty, empty, rule), both_empty)
    np.testing.assert_equal(soft_dice(empty, empty, rule), both_empty)
    assert dsc(some, empty, rule) == dsc(empty, some, rule) == soft_dice(some, empty, rule) == 0
    assert np.isnan(overlap(confusion(some, empty), rule)["sensitivity"])
    assert np.isnan(overlap(confusion(empty, some), rule)["precision"])
    assert hd95(some, empty, empty=rule) == hd95(empty, some, empty=rule) == np.hypot(2, 3)
    np.testing.assert_equal(hd95(empty, empty, empty=rule), {"exclude": np.nan, "one": 0.0,
            "zero": np.hypot(2, 3)}[rule])


# hd95 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 4, 9])
def test_hd95_of_a_shifted_square_is_the_shift(shift):
    square = np.zeros((40, 40), bool)
    square[10:20, 10:20] = True
    assert hd95(np.roll(square, shift, axis=0), square) == shift
    assert hd95(np.roll(square, shift, axis=0), square, spacing=(0.5, 3)) == 0.5 * shift


def test_hd95_ignores_a_stray_pixel_and_volumes_work():
    truth = ndimage.zoom(np.pad(np.ones((3, 3, 3)), 3), 3, order=0) > 0
    stray = truth.copy()
    stray[0, 0, 0] = True
    assert hd95(stray, truth) == hd95(truth, stray) == 0
    assert hd95(np.roll(truth, 2, axis=0), truth, spacing=(5, 1, 1)) == 10


# the toolbox ------------------------------------------------------------------------------------------------


@given(FLOATS)
def test_toolbox_is_bounded_and_a_perfect_map_is_best(pair):
    probability, truth = pair
    scores = toolbox([probability], [truth])
    # the E-measure divides by N - 1, so a perfect tiny picture reaches N / (N - 1)
    assert all(0 <= value <= 1 + (1.01 / (truth.size - 1) if "Em" in name else 1e-12) for name,
               value in scores.items())
    if truth.any() and not truth.all():
        best = toolbox([truth], [truth])
        np.testing.assert_allclose([best[name] for name in ("maxDice", "Sm", "MAE", "adpIoU")],
                                   [1, 1, 0, 1], atol=1e-9)
        assert all(best[name] >= scores[name] - 1e-9 for name in ("meanDice", "maxDice", "Sm",
                "meanEm", "adpDice"))


def test_constant_maps_and_empty_truths_follow_the_published_conventions():
    full, half = np.ones((5, 6), bool), np.floor(255 * np.full((5, 6), 0.5)) / 255
    assert to_levels(half)[0].max() == 127 and np.isclose(toolbox([half], [full])["MAE"], 1 - 127 / 255)
    nothing_found = toolbox([np.zeros((5, 6))], [~full])  # no true positive: zero, specificity too
    assert [nothing_found[name] for name in ("meanDice", "maxSpe", "Sm", "MAE")] == [0, 0, 1, 0]
    assert np.isclose(e_measure(Counts(0, 0, 0, 30)), 30 / 29)


def test_s_measure_of_a_constant_quarter():
    """A quarter where map and truth are both constant is perfect; where only the truth is, it scores 0."""
    levels, values = np.full((4, 4), 77, np.uint8), np.arange(256) / 255
    truth = np.zeros((4, 4), bool)
    truth[:2, :2] = True
    quarters = quadrant_histograms(levels, truth)
    assert [metrics._quadrant_score(quarter, values) for quarter in quarters[1:]] == [1.0, 1.0, 1.0]
    levels[3, 3] = 78
    assert metrics._quadrant_score(quadrant_histograms(levels, truth)[3], values) == 0.0
    assert 0 <= s_measure(quarters, values) <= 1


# per image --------------------------------------------------------------------------------------------------


def test_per_image_has_the_promised_columns_and_values():
    truth, probability = np.eye(4, dtype=bool), np.eye(4) * 0.6
    table = per_image([probability, truth], [truth, truth], ids=["a", "b"])
    assert list(table) == ["id", "dice", "iou", "sensitivity", "specificity", "precision",
                           "soft_dice", "area_error", "mae", "hd95", "n_truth", "n_pred"]
    np.testing.assert_allclose(table.loc[0, "soft_dice"], 2 * 2.4 / (2.4 + 4))
    np.testing.assert_allclose(table.loc[0, "mae"], 0.4 * 4 / 16)
    assert (table["dice"] == 1).all() and (table["hd95"] == 0).all() and (table["n_pred"] == 4).all()
    assert per_image([probability], [truth], threshold=0.6).loc[0,
        "n_pred"] == 4, ("a map value on the threshold is positive")
    assert per_image([probability], [truth], threshold=0.61).loc[0, "n_pred"] == 0


def test_empty_masks_are_counted_and_left_out_of_means():
    empty, some = np.zeros((6, 6)), np.eye(6)
    table = per_image([empty, some, some, empty], [empty, some, empty, some])
    assert empty_counts(table) == {"n_images": 4, "n_empty_truth": 2, "n_empty_prediction": 2,
                                   "n_both_empty": 1}
    means = summarise(table).set_index("metric")
    assert means.loc["dice", "value"] == 1 / 3 and means.loc["dice", "n"] == 3
    assert means.loc["sensitivity", "n"] == 2 and means.loc["specificity", "n"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no "mean of empty slice"
        alone = summarise(per_image([empty], [empty])).set_index("metric")
    assert np.isnan(alone.loc["dice", "value"]) and alone.loc["dice", "n"] == 0


def test_inputs_are_not_changed_and_dtype_does_not_matter():
    rng = np.random.default_rng(2)
    truth, probability = rng.random((12, 9)) > 0.5, rng.integers(0, 256, (12, 9)) / 255
    before = probability.copy(), truth.copy()
    table, scores = per_image([probability], [truth]), toolbox([probability], [truth])
    np.testing.assert_array_equal(probability, before[0])
    np.testing.assert_array_equal(truth, before[1])
    for kind in (np.uint8, np.float32, np.int64):
        pd.testing.assert_frame_equal(per_image([np.asfortranarray(probability)],
                                                [truth.astype(kind)]), table)
    np.testing.assert_allclose(list(toolbox([probability.astype(np.float32)], [truth]).values()),
                               list(scores.values()), atol=1e-12)


# bad input --------------------------------------------------------------------------------------------------

OK = np.zeros((4, 4)), np.eye(4)


@pytest.mark.parametrize("call, error, says", [
    (lambda: check_pair(np.zeros((0, 4)), np.zeros((0, 4))), GeometryError, "at least one pixel"),
    (lambda: dice(np.zeros((2, 2)), np.zeros(4)), GeometryError, "map (2, 2), truth (4,)"),
    (lambda: hd95(np.zeros((2, 2)), np.zeros((2, 3))), GeometryError, "map (2, 2), truth (2, 3)"),
    (lambda: hd95(*OK, spacing=(1,)), GeometryError, "one positive number per axis"),
    (lambda: hd95(*OK, spacing=(1, np.nan)), GeometryError, "one positive number per axis"),
    (lambda: toolbox([[[0.5, np.nan], [np.inf, -1]]], [np.eye(2)]), IntensityError,
     "1 NaN and 2 values outside [0, 1] of 4"),
    (lambda: per_image([OK[0]], [OK[1] * 255]), MaskError, "values 0, 255"),
    (lambda: dice(OK[0] + 0.5, OK[1]), MaskError, "values 0.5"),
    (lambda: toolbox([], []), ConfigError, "0 maps, 0 truths"),
    (lambda: per_image([OK[0]], []), ConfigError, "1 maps, 0 truths"),
    (lambda: pooled_dice([], []), ConfigError, "0 maps, 0 truths"),
    (lambda: per_image([OK[0]], [OK[1]], threshold=float("nan")), ConfigError, "found: nan"),
    (lambda: per_image([OK[0]], [OK[1]], empty="zeros"), ConfigError, "did you mean 'zero'?"),
    (lambda: hd95(*OK, empty="none"), ConfigError, "unknown empty rule 'none'"),
    (lambda: match_stems([], ["a"]), MaskError, "maps for: a")])
def test_bad_input_is_refused_with_what_was_found(call, error, says):
    with pytest.raises(error, match=re.escape(says)):
        call()


# folders ----------------------------------------------------------------------------------------------------


def save(folder: Path, pictures: dict[str, np.ndarray]) -> Path:
    """Float arrays in [0, 1] or bool as 8-bit pictures, by file name."""
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        Image.fromarray(np.uint8(np.floor(255 * np.asarray(picture, float) + 0.5))).save(folder / name)
    return folder


@pytest.fixture
def pictures():
    """Three truths of different size and an 8-bit map of each."""
    rng = np.random.default_rng(9)
    truths = {name: ndimage.gaussian_filter(rng.standard_normal(shape), 3) > 0.05 for name,
              shape in (("10", (40, 51)), ("9", (46, 38)), ("é 1", (43, 43)))}
    soft = {name: np.clip(ndimage.gaussian_filter(t.astype(float), 1.5)
                          + rng.normal(0, 0.1, t.shape), 0, 1) for name, t in truths.items()}
    return {name: np.floor(255 * m + 0.5) / 255 for name, m in soft.items()}, truths


def png(arrays_by_stem):
    return {f"{stem}.png": array for stem, array in arrays_by_stem.items()}


def values_of(evaluation):
    return evaluation.summary.set_index("metric")["value"]


def test_a_folder_scores_as_its_arrays(tmp_path, pictures):
    """Pairs by stem, whatever the suffix and the order of files; twice the same bytes."""
    maps, truths = pictures
    folders = (save(tmp_path / "my maps", {f"{stem}.bmp": one for stem, one in reversed(maps.items())}),
               save(tmp_path / "truth", png(truths)))
    (folders[0] / "notes.txt").write_text("not a picture")
    result, _ = (evaluate_folder(*folders, tmp_path / "new" / name) for name in ("one", "two"))
    stems = ["9", "10", "é 1"]  # 9 comes before 10
    expected = toolbox([maps[s] for s in stems], [truths[s] for s in stems])
    np.testing.assert_allclose(values_of(result)[list(expected)], list(expected.values()), rtol=0, atol=1e-12)
    assert list(result.per_image["id"]) == stems and values_of(result)["n_resized"] == 0
    for name, table in (("summary", result.summary), ("per_image", result.per_image)):
        one, two = (tmp_path / "new" / folder / f"{name}.csv" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes() and str(tmp_path).encode() not in one.read_bytes()
        pd.testing.assert_frame_equal(pd.read_csv(one, dtype={"id": str}), table, rtol=1e-12)


def test_maps_are_brought_to_the_truth_and_never_the_other_way(tmp_path, pictures):
    maps, truths = pictures
    large = {name: resize_map(m, (352, 352)) for name, m in maps.items()}
    result = evaluate_folder(save(tmp_path / "maps", png(large)), save(tmp_path / "truth", png(truths)))
    assert values_of(result)["n_resized"] == 3
    table = result.per_image.set_index("id")
    for stem, truth in truths.items():
        assert table.loc[stem, "n_truth"] == truth.sum()
        assert abs(table.loc[stem, "dice"] - dice(maps[stem] >= 0.5, truth)) < 0.1


def test_unmatched_stems(tmp_path, pictures):
    maps, truths = pictures
    extra = save(tmp_path / "maps", png({**maps, "stray": maps["9"]}))
    truth = save(tmp_path / "truth", png(truths))
    with pytest.warns(UserWarning, match="1 maps have no truth and are not scored: stray"):
        result = evaluate_folder(extra, truth)
    assert result.without_truth == ["stray"] and values_of(result)["n_maps_without_truth"] == 1
    (extra / "10.png").unlink()
    (extra / "stray.png").unlink()
    with pytest.raises(MaskError, match="1 of 3 truths have no map") as caught:
        evaluate_folder(extra, truth, tmp_path / "out")
    assert "maps for: 10" in str(caught.value) and not (tmp_path / "out").exists()
    partly = evaluate_folder(extra, truth, allow_missing=True)
    assert (partly.without_map == ["10"] and values_of(partly)["n_truths_without_map"] == 1
            and len(partly.per_image) == 2)


def test_folders_that_cannot_be_scored(tmp_path, pictures):
    maps, truths = pictures
    truth = save(tmp_path / "truth", png(truths))
    twice = save(tmp_path / "twice", {**png(maps), "9.bmp": maps["9"]})
    with pytest.raises(MaskError, match="two pictures have one stem"):
        evaluate_folder(twice, truth)
    with pytest.raises(MaskError, match="3 of 3 truths have no map"):
        evaluate_folder(save(tmp_path / "other", png({f"case {s}": m for s, m in maps.items()})), truth)
    with pytest.raises(ConfigError, match="not a folder"):
        evaluate_folder(truth / "9.png", truth)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MaskError, match="no pictures in this folder"):
        evaluate_folder(tmp_path / "empty", truth)
    grey = save(tmp_path / "grey truth", png({s: t * 0.4 for s, t in truths.items()}))
    with pytest.raises(MaskError, match="grey truth"):
        evaluate_folder(save(tmp_path / "maps", png(maps)), grey)
