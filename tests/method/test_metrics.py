"""Properties of the metrics, bad input, and folders as a user has them."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import directed_hausdorff

from covidsev.method import metrics
from covidsev.core import ConfigError, GeometryError, IntensityError, MaskError
from covidsev.method.metrics import (Counts, check_pair, confusion, counts_at, dice, dsc, e_measure,
                                     empty_counts, evaluate_folder, grey_histograms, hd95,
                                     match_stems, overlap, per_image, pooled_dice,
                                     quadrant_histograms, resize_map, s_measure, soft_dice,
                                     summarise, threshold_curves, to_levels, toolbox, toolbox_image,
                                     toolbox_thresholds)

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
    score = dice(a, b)
    if a.any() or b.any():
        assert score == 2 * (a & b).sum() / (a.sum() + b.sum()) == dice(b, a)
        assert 0 <= score <= 1
    else:
        assert np.isnan(score)


@given(mask_pairs())
def test_dice_of_itself_is_one_and_of_disjoint_masks_zero(pair):
    a, b = pair
    if a.any():
        assert dice(a, a) == 1
        assert dice(a, b & ~a) == 0
    assert dice(a, a, empty="one") == 1


@given(mask_pairs(), st.randoms(use_true_random=False))
def test_each_pixel_put_right_raises_dice(pair, random):
    prediction, truth = pair[0].copy(), pair[1]
    wrong = list(zip(*np.nonzero(prediction != truth)))
    random.shuffle(wrong)
    for pixel in wrong:
        before = dice(prediction, truth, empty="one")
        prediction[pixel] = truth[pixel]
        after = dice(prediction, truth, empty="one")
        assert after > before or (after == before == 0)  # at 0 a false alarm less changes nothing yet
    assert dice(prediction, truth, empty="one") == 1


@given(mask_pairs(), st.integers(0, 2**32 - 1))
def test_pixel_order_does_not_matter(pair, seed):
    order = np.random.default_rng(seed).permutation(pair[0].size)
    a, b = (mask.ravel()[order] for mask in pair)
    np.testing.assert_equal(overlap(confusion(a, b)), overlap(confusion(*pair)))


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


@given(FLOATS, st.floats(0, 1))
def test_pooled_dice_of_one_image_is_its_dice(pair, threshold):
    probability, truth = pair
    np.testing.assert_equal(pooled_dice([probability], [truth], threshold),
                            dice(probability >= threshold, truth))


def test_pooled_dice_weighs_by_pixels():
    good, bad = np.ones((10, 10)), np.zeros((10, 10))
    assert pooled_dice([good, bad[:1]], [good, good[:1]]) == 200 / 210
    assert per_image([good, bad[:1]], [good, good[:1]])["dice"].mean() == 0.5


# hd95 -------------------------------------------------------------------------------------------------------


def naive_hd95(a, b, spacing):
    """By definition: outline pixel against outline pixel."""

    def outline(mask):
        padded, (height, width) = np.pad(mask, 1), mask.shape
        near = [padded[r : r + height, c : c + width] for r, c in ((0, 1), (2, 1), (1, 0), (1, 2))]
        return np.argwhere(mask & ~np.logical_and.reduce(near)) * np.array(spacing)

    distance = np.linalg.norm(outline(a)[:, None] - outline(b)[None], axis=-1)
    return max(np.percentile(distance.min(axis=1), 95), np.percentile(distance.min(axis=0), 95))


@given(mask_pairs(), st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)))
def test_hd95_agrees_with_its_definition(pair, spacing):
    a, b = pair
    if a.any() and b.any():
        measured = hd95(a, b, spacing)
        np.testing.assert_allclose(measured, naive_hd95(a, b, spacing), rtol=1e-12)
        assert measured == hd95(b, a, spacing)
        assert measured <= max(directed_hausdorff(np.argwhere(x) * spacing, np.argwhere(y)
                                                  * spacing)[0] for x,
                               y in ((a, b), (b, a))) + np.hypot(*spacing) * max(a.shape)
        assert hd95(a, a, spacing) == 0


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
    assert hd95(stray, truth) == 0 < hd95(np.roll(truth, 2, axis=0), truth, spacing=(5, 1, 1))


# the toolbox ------------------------------------------------------------------------------------------------


def naive_scores(r, g, t):
    """Dice, Sen, Spe, Pre (r >= t) and E (r > t) of one image at one threshold, on pixels."""
    p, strict, tp = r >= t, r > t, int(((r >= t) & g).sum())
    plain = [0.0] * 4
    if tp:
        specificity = (~p & ~g).sum() / (~g).sum() if (~g).any() else 0.0
        plain = [2 * tp / (p.sum() + g.sum()), tp / g.sum(), specificity, tp / p.sum()]
    eps = np.finfo(float).eps
    if not g.any():
        total = (~strict).sum()
    elif g.all():
        total = strict.sum()
    else:
        a, b = strict - strict.mean(), g - g.mean()
        total = ((1 + 2 * a * b / (a * a + b * b + eps)) ** 2 / 4).sum()
    return [*plain, total / (g.size - 1 + eps)]


def naive_s_measure(r, g):
    """S-measure with the centroid cut on pixels."""
    if g.all() or not g.any():
        return r.mean() if g.all() else 1 - r.mean()
    eps = np.finfo(float).eps

    def bright(x):
        return 2 * x.mean() / (x.mean() ** 2 + 1 + (x.std(ddof=1) if x.size > 1 else 0) + eps)

    y, x = (int(np.floor(index.mean() + 1.5)) for index in np.nonzero(g))
    region = 0.0
    for rows in (slice(y), slice(y, None)):
        for columns in (slice(x), slice(x, None)):
            a, b = r[rows, columns].ravel(), g[rows, columns].ravel().astype(float)
            if a.size:
                a0, b0 = (np.zeros_like(v) if np.ptp(v) == 0 else v - v.mean() for v in (a, b))
                top = 4 * a.mean() * b.mean() * (a0 @ b0) / (a.size - 1 + eps)
                bottom = (a.mean() ** 2 + b.mean() ** 2) * (a0 @ a0 + b0 @ b0) / (a.size - 1 + eps)
                region += a.size / r.size * (top / (bottom + eps) if top else float(bottom == 0))
    of_object = g.mean() * bright(r[g]) + (1 - g.mean()) * bright(1 - r[~g])
    return max(0.0, (of_object + region) / 2)


@settings(max_examples=20)
@given(map_and_truth())
def test_toolbox_agrees_with_slow_loops(pair):
    probability, truth = pair
    low, high = probability.min(), probability.max()
    r = (probability - low) / (high - low) if high > low else probability
    scores, thresholds = toolbox_image(probability, truth), toolbox_thresholds()
    expected = np.transpose([naive_scores(r, truth, t) for t in thresholds])
    np.testing.assert_allclose(list(scores.curves.values()), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.mae, np.abs(r - truth).mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.s_measure, naive_s_measure(r, truth), rtol=0, atol=1e-9)


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


@given(map_and_truth())
def test_histograms_count_every_pixel_and_quarters_add_up(pair):
    levels, values = to_levels(pair[0])
    histograms = grey_histograms(levels, pair[1])
    assert histograms.sum() == pair[1].size and histograms[1].sum() == pair[1].sum()
    np.testing.assert_array_equal(quadrant_histograms(levels, pair[1]).sum(axis=0), histograms)
    assert (np.diff(values) > 0).all(), "rising, as searchsorted needs"


@given(map_and_truth(), st.booleans())
def test_counts_at_a_threshold_are_those_of_the_pixels(pair, strict):
    levels, values = to_levels(pair[0])
    thresholds = toolbox_thresholds()
    swept = counts_at(grey_histograms(levels, pair[1]), values, thresholds, strict)
    for k in range(0, 256, 17):
        positive = values[levels] > thresholds[k] if strict else values[levels] >= thresholds[k]
        assert Counts(*(int(count[k]) for count in swept)) == confusion(positive, pair[1])


@given(map_and_truth(st.floats(0, 1)))
def test_quantisation_is_that_of_saving_a_stretched_png(pair):
    probability = pair[0]
    stretched = ((probability - probability.min()) / np.ptp(probability) if np.ptp(probability)
                 else probability)
    once = np.floor(255 * stretched + 0.5) / 255
    if np.abs(255 * probability - np.floor(255 * probability + 0.5)).max() > 1e-4:
        levels, values = to_levels(probability)
        np.testing.assert_allclose(values[levels], to_levels(once)[1][to_levels(once)[0]], atol=1e-12)
    again, _ = to_levels(once.astype(np.float32))
    np.testing.assert_array_equal(again, np.floor(255 * once + 0.5))


def test_scaling_a_map_does_not_change_the_toolbox_but_changes_plain_scores():
    rng = np.random.default_rng(0)
    truth = ndimage.gaussian_filter(rng.standard_normal((40, 50)), 3) > 0
    levels = np.clip(ndimage.gaussian_filter(truth * 120.0, 2) + rng.integers(0, 8, truth.shape), 0,
                     127).round()
    levels[0, 0], levels[0, 1] = 0, 127
    dim, full = levels / 255, levels * 2 / 255
    one, two = toolbox([dim], [truth]), toolbox([full], [truth])
    assert abs(one["Sm"] - two["Sm"]) < 0.01 and abs(one["adpDice"] - two["adpDice"]) < 0.01
    assert per_image([dim], [truth])["dice"][0] == 0 < per_image([full], [truth])["dice"][0]


def test_constant_maps_and_empty_truths_follow_the_published_conventions():
    empty, full, half = np.zeros((5, 6), bool), np.ones((5, 6), bool), np.full((5, 6), 0.5)
    half = np.floor(255 * half) / 255
    assert to_levels(half)[0].max() == 127 and np.isclose(toolbox([half], [full])["MAE"], 1 - 127 / 255)
    nothing_found = toolbox([np.zeros((5, 6))], [empty])
    assert nothing_found["meanDice"] == nothing_found["maxSpe"] == 0, (
        "no true positive: zero, specificity too"
    )
    assert nothing_found["Sm"] == 1 and nothing_found["MAE"] == 0
    assert np.isclose(e_measure(Counts(0, 0, 0, 30)), 30 / 29)


def test_thresholds_are_matlabs_and_not_linspace():
    thresholds, k = toolbox_thresholds(), np.arange(256)
    assert thresholds.size == 256 and (np.diff(thresholds) < 0).all()
    assert (thresholds[:128] == 1 + k[:128] * (-1 / 255)).all()
    assert (thresholds[:127:-1] == 0 - k[:128] * (-1 / 255)).all()
    assert 0 < np.abs(thresholds - np.linspace(1, 0, 256)).max() < 3e-16


def test_the_linspace_variant_gives_other_scores(monkeypatch):
    """The guard without real data: each level of an even ramp equals a threshold but for the last bit."""
    ramp = np.tile(np.arange(256) / 255, (8, 1))
    truth = np.random.default_rng(3).random(ramp.shape) < ramp
    ours = threshold_curves([ramp], [truth])
    monkeypatch.setattr(metrics, "toolbox_thresholds", lambda: np.linspace(1, 0, 256))
    assert np.abs(threshold_curves([ramp], [truth]) - ours).to_numpy()[:, 1:].max() > 1e-4


def test_order_of_images_does_not_matter_and_curves_give_the_means():
    rng = np.random.default_rng(5)
    truths = [ndimage.gaussian_filter(rng.standard_normal((20, 20 + k)), 2) > 0 for k in range(5)]
    maps = [np.clip(t + rng.normal(0, 0.4, t.shape), 0, 1) for t in truths]
    forward, backward = toolbox(maps, truths), toolbox(maps[::-1], truths[::-1])
    np.testing.assert_allclose(list(forward.values()), list(backward.values()), rtol=0, atol=1e-12)
    curves = threshold_curves(maps, truths)
    assert list(curves) == ["threshold", "dice", "sensitivity", "specificity", "precision", "e_measure"]
    np.testing.assert_allclose([curves["dice"].mean(), curves["e_measure"].max()],
                               [forward["meanDice"], forward["maxEm"]], atol=1e-12)
    assert forward["adpIoU"] == forward["adpDice"] / (2 - forward["adpDice"])


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


# choosing a threshold ---------------------------------------------------------------------------------------


# bad input --------------------------------------------------------------------------------------------------

OK = np.zeros((4, 4)), np.eye(4)


@pytest.mark.parametrize("call, error, says", [(lambda: check_pair(np.zeros((4, 4)), np.zeros((4,
        5))), GeometryError, "map (4, 4), truth (4, 5)"), (lambda: check_pair(np.zeros((0, 4)),
        np.zeros((0, 4))), GeometryError, "at least one pixel"), (lambda: dice(np.zeros((2, 2)),
        np.zeros(4)), GeometryError, "map (2, 2), truth (4,)"), (lambda: hd95(np.zeros((2, 2)),
        np.zeros((2, 3))), GeometryError, "map (2, 2), truth (2, 3)"), (lambda: hd95(*OK,
        spacing=(1,)), GeometryError, "one positive number per axis"), (lambda: hd95(*OK,
        spacing=(1, np.nan)), GeometryError, "one positive number per axis"),
                                               (lambda: toolbox([np.zeros(4)], [np.zeros(4)]),
                                                GeometryError, "(4,)"), (lambda: toolbox([[[0.5,
        np.nan], [np.inf, -1]]], [np.eye(2)]), IntensityError,
        "1 NaN and 2 values outside [0, 1] of 4"), (lambda: per_image([np.full((4, 4), 255)],
        [OK[1]]), IntensityError, "0 NaN and 16 values outside [0, 1] of 16"),
                                               (lambda: per_image([OK[0]], [OK[1] * 255]),
                                                MaskError, "values 0, 255"), (lambda: dice(OK[0]
        + 0.5, OK[1]), MaskError, "values 0.5"), (lambda: toolbox([], []), ConfigError,
                                                  "0 maps, 0 truths"), (lambda: per_image([OK[0]],
        []), ConfigError, "1 maps, 0 truths"), (lambda: pooled_dice([], []), ConfigError,
                                                "0 maps, 0 truths"), (lambda: per_image([OK[0]],
        [OK[1]], threshold=1.5), ConfigError, "found: 1.5"), (lambda: per_image([OK[0]], [OK[1]],
        threshold=float("nan")), ConfigError, "found: nan"), (lambda: per_image([OK[0]], [OK[1]],
        empty="zeros"), ConfigError, "did you mean 'zero'?"), (lambda: hd95(*OK, empty="none"),
        ConfigError, "unknown empty rule 'none'"), (lambda: per_image([OK[0]], [OK[1]], ids=["a",
        "b"]), ConfigError, "2 ids, 1 images"), (lambda: match_stems([], ["a"]), MaskError,
                                                 "maps for: a")])
def test_bad_input_is_refused_with_what_was_found(call, error, says):
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)


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
    maps, truths = pictures
    result = evaluate_folder(save(tmp_path / "my maps", png(maps)),
                             save(tmp_path / "truth", png(truths)), tmp_path / "new" / "out")
    stems = ["9", "10", "é 1"]  # 9 comes before 10
    expected = toolbox([maps[s] for s in stems], [truths[s] for s in stems])
    np.testing.assert_allclose(values_of(result)[list(expected)], list(expected.values()), rtol=0, atol=1e-12)
    assert list(result.per_image["id"]) == stems and values_of(result)["n_resized"] == 0
    written = pd.read_csv(tmp_path / "new" / "out" / "summary.csv")
    pd.testing.assert_frame_equal(written, result.summary, rtol=1e-12)
    per = pd.read_csv(tmp_path / "new" / "out" / "per_image.csv", dtype={"id": str})
    pd.testing.assert_frame_equal(per, result.per_image, rtol=1e-12)
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == ["per_image.csv", "summary.csv"]


def test_two_evaluations_write_the_same_bytes(tmp_path, pictures):
    folders = save(tmp_path / "maps", png(pictures[0])), save(tmp_path / "truth", png(pictures[1]))
    for name in ("one", "two"):
        evaluate_folder(*folders, tmp_path / name)
    for name in ("summary.csv", "per_image.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "one" / name).read_bytes()


def test_maps_are_brought_to_the_truth_and_never_the_other_way(tmp_path, pictures):
    maps, truths = pictures
    large = {name: resize_map(m, (352, 352)) for name, m in maps.items()}
    result = evaluate_folder(save(tmp_path / "maps", png(large)), save(tmp_path / "truth", png(truths)))
    assert values_of(result)["n_resized"] == 3
    table = result.per_image.set_index("id")
    for stem, truth in truths.items():
        assert table.loc[stem, "n_truth"] == truth.sum()
        assert abs(table.loc[stem, "dice"] - dice(maps[stem] >= 0.5, truth)) < 0.1


@pytest.mark.parametrize("shape", [(7, 5), (3, 11), (20, 20)])
def test_resize_keeps_constants_range_and_eight_bits(shape):
    rng = np.random.default_rng(0)
    resized = resize_map(rng.random((9, 13)), shape)
    assert resized.shape == shape and 0 <= resized.min() and resized.max() <= 1
    np.testing.assert_allclose(255 * resized, np.round(255 * resized), atol=1e-9)
    np.testing.assert_array_equal(resize_map(np.ones((9, 13)), shape), 1)
    np.testing.assert_array_equal(resize_map(np.zeros((9, 13)), shape), 0)


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


def test_pairs_are_made_by_stem_whatever_the_suffix_and_order(tmp_path, pictures):
    maps, truths = pictures
    bmp = save(tmp_path / "maps", {f"{stem}.bmp": m for stem, m in reversed(maps.items())})
    (bmp / "notes.txt").write_text("not a picture")
    result = evaluate_folder(bmp, save(tmp_path / "truth", png(truths)))
    same = evaluate_folder(save(tmp_path / "as png", png(maps)), tmp_path / "truth")
    pd.testing.assert_frame_equal(result.summary, same.summary)


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


def test_a_full_disk_leaves_the_old_summary(tmp_path, pictures, monkeypatch):
    folders = save(tmp_path / "maps", png(pictures[0])), save(tmp_path / "truth", png(pictures[1]))
    evaluate_folder(*folders, tmp_path / "out")
    before = (tmp_path / "out" / "summary.csv").read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError):
        evaluate_folder(*folders, tmp_path / "out", threshold=0.3)
    assert (tmp_path / "out" / "summary.csv").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["per_image.csv", "summary.csv"]
