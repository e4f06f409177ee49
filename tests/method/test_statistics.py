"""Agreement and discrimination: known answers, properties, and a reason wherever there is no number."""
import importlib.util
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from covidsev.method import statistics as ag
from covidsev.core import ConfigError

SOME = settings(max_examples=40, deadline=None)
scores = st.lists(st.integers(0, 40), min_size=10, max_size=30)


def labels_for(n: int, seed: int) -> np.ndarray:
    """n labels with at least five of each class."""
    return np.random.default_rng(seed).permutation(np.r_[np.ones(5), np.zeros(5), np.arange(n - 10) % 2])


def by_pairs(values: np.ndarray, labels: np.ndarray) -> float:
    """The AUC as its definition says: all pairs of a severe and a mild patient."""
    high, low = values[labels == 1], values[labels == 0]
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low]))


@SOME
@given(scores, st.integers(0, 99))
def test_auc_is_the_share_of_ordered_pairs(values, seed):
    values, labels = np.array(values, float), labels_for(len(values), seed)
    found = ag.auc(values, labels)
    if np.ptp(values) == 0:
        assert found.value is None and "same for everyone" in found.reason
        return
    assert found.value == pytest.approx(by_pairs(values, labels), abs=1e-12)
    assert found.value == pytest.approx(stats.mannwhitneyu(values[labels == 1], values[labels == 0]).statistic
                                        / ((labels == 1).sum() * (labels == 0).sum()), abs=1e-12)
    assert ag.auc(-values, labels).value == pytest.approx(1 - found.value, abs=1e-12)
    fpr, tpr, cuts = ag.roc_points(values, labels)
    assert np.trapezoid(tpr, fpr) == pytest.approx(found.value, abs=1e-12)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and len(cuts) == len(np.unique(values)) + 1
    if found.low is not None:
        assert 0 <= found.low <= found.value <= found.high <= 1


def delong_variance(values: np.ndarray, other: np.ndarray, labels: np.ndarray) -> float:
    """The variance of a difference of two AUC, written out as in DeLong et al. (1988)."""
    def components(x):
        high, low = x[labels == 1], x[labels == 0]
        psi = (high[:, None] > low) + 0.5 * (high[:, None] == low)
        return psi.mean(axis=1), psi.mean(axis=0)
    (a10, a01), (b10, b01) = components(values), components(other)
    s10, s01 = np.cov(a10, b10), np.cov(a01, b01)
    contrast = np.array([1, -1])
    return float(contrast @ (s10 / len(a10) + s01 / len(a01)) @ contrast)


def test_paired_delong_by_matrices():
    rng = np.random.default_rng(3)
    labels = labels_for(60, 0)
    first, second = (np.round(labels * shift + rng.normal(size=60), 1) for shift in (1.5, 0.6))
    found = ag.compare_auc(first, second, labels)
    error = np.sqrt(delong_variance(first, second, labels))
    assert found.difference == pytest.approx(by_pairs(first, labels) - by_pairs(second, labels), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(found.difference) / error), rel=1e-9)
    one = ag.auc(first, labels)
    assert one.high - one.value == pytest.approx(1.959964 * np.sqrt(delong_variance(first, first * 0, labels)), rel=1e-6)


def test_the_interval_of_delong_covers():
    """600 cohorts with a known AUC of Phi(1 / sqrt 2): the interval holds it about 95 times of 100."""
    rng, true, hits = np.random.default_rng(1), stats.norm.cdf(1 / np.sqrt(2)), 0
    labels = np.r_[np.ones(40), np.zeros(60)]
    for _ in range(600):
        found = ag.auc(labels + rng.normal(size=100), labels)
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 600 <= 0.98


@pytest.mark.parametrize("values, labels, reason", [
    (np.arange(12), np.ones(12), "one class only: 12 severe, 0 not"),
    (np.arange(12), np.zeros(12), "one class only: 0 severe, 12 not"),
    (np.ones(12), [0, 1] * 6, "the score is the same for everyone"),
    (np.arange(12), [1] * 4 + [0] * 8, "too few: 4 severe patients"),
    (np.arange(12), [1] * 8 + [0] * 4, "too few: 4 patients who are not severe"),
    ([], [], "one class only: 0 severe, 0 not"),
    ([None] * 8 + [1.0, 2.0], [0, 1] * 5, "too few"),
])
def test_no_curve_without_two_classes_that_can_be_told_apart(values, labels, reason):
    assert ag.auc(values, labels).value is None and ag.auc(values, labels).reason.startswith(reason)
    assert ag.compare_auc(values, values, labels).difference is None
    assert [len(each) for each in ag.roc_points(values, labels)] == [0, 0, 0]
    rows = {row["metric"]: row for row in ag.discrimination_rows(values, labels)}
    assert rows["AUC (DeLong)"]["value"] is rows["AUC (bootstrap)"]["value"] is None
    assert rows["AUC (bootstrap)"]["reason"].startswith(reason)
    if "same" not in reason:  # at a cut, one score for everyone still calls everyone
        assert {rows[name]["value"] for name in ("sensitivity", "specificity", "ppv", "npv")} == {None}


def test_a_constant_score_at_a_cut_calls_everyone_or_nobody():
    found = ag.at_cut([25] * 12, [0, 1] * 6)
    assert (found["sensitivity"].value, found["specificity"].value) == (1.0, 0.0)
    assert found["npv"].value is None and found["npv"].reason == "nobody to take a share of"


def test_yang_by_counts_and_wilson():
    table = np.r_[np.full(15, 20), np.full(3, 19), np.full(5, 20), np.full(79, 19)]
    found = ag.at_cut(table, np.r_[np.ones(18), np.zeros(84)])
    assert found["sensitivity"][:3] == pytest.approx((15 / 18, 0.6078, 0.9416), abs=1e-4)
    assert found["specificity"][:3] == pytest.approx((79 / 84, 0.8681, 0.9744), abs=1e-4)
    centre, z2 = 15 / 18, 1.959964**2
    half = 1.959964 / (1 + z2 / 18) * np.sqrt(centre * (1 - centre) / 18 + z2 / (4 * 18**2))
    middle = (centre + z2 / 36) / (1 + z2 / 18)
    assert found["sensitivity"][1:3] == pytest.approx((middle - half, middle + half), abs=1e-6)


@SOME
@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_stays_inside(k, n):
    if k > n:
        with pytest.raises(ConfigError, match=f"{k} of {n}"):
            ag.wilson(k, n)
        return
    found = ag.wilson(k, n)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_icc_of_shrout_and_fleiss_and_of_perfect_readers():
    table = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    assert ag.icc(table)[:3] == pytest.approx((0.29, 0.019, 0.761), abs=1e-3)
    same = ag.icc(np.c_[range(8), range(8)])
    assert same.value == 1 and same.low is None and "constant" in same.reason


@SOME
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(-9, 9))
def test_icc_is_free_of_scale_and_order_and_sees_a_shift(seed, scale, shift):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 3))
    found = ag.icc(table)
    assert ag.icc(scale * table + shift).value == pytest.approx(found.value, rel=1e-6, abs=1e-9)
    assert ag.icc(table[rng.permutation(12)][:, ::-1]).value == pytest.approx(found.value, abs=1e-9)
    assert found.low <= found.value <= found.high
    assert ag.icc(table + [0, 0, 50]).value < found.value


def test_icc_interval_covers():
    """Readers with true ICC 1 / 1.5: the interval of 300 cohorts of 25 patients holds it."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        table = rng.normal(size=(25, 1)) + np.sqrt(0.5) * rng.normal(size=(25, 2))
        found = ag.icc(table)
        hits += found.low <= 1 / 1.5 <= found.high
    assert 0.91 <= hits / 300 <= 0.99


@SOME
@given(st.integers(0, 10**6))
def test_kappa_symmetric_bounded_and_one_for_agreement(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 5, (2, 20))
    table = ag.confusion_table(first, second, range(5))
    value = ag.kappa_of(table)
    assert table.sum() == 20 and ag.kappa_of(table.T) == pytest.approx(value) and value <= 1
    assert ag.kappa_of(ag.confusion_table(first, first, range(5))) == 1
    differences = (first[:, None] - second) ** 2  # kappa as 1 - mean square over that of all pairs
    assert value == pytest.approx(1 - ((first - second) ** 2).mean() / differences.mean())


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="an oracle only")
def test_against_scikit_learn():
    from sklearn.metrics import cohen_kappa_score, roc_auc_score

    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 50))
    assert ag.kappa_of(ag.confusion_table(first, second, range(5))) == pytest.approx(
        cohen_kappa_score(first, second, weights="quadratic"))
    assert ag.auc_value(first, second > 2) == pytest.approx(roc_auc_score(second > 2, first))


def test_bland_altman_covers_and_sees_a_slope():
    rng, hits = np.random.default_rng(4), 0
    for _ in range(300):
        found = ag.bland_altman(rng.normal(size=30), np.zeros(30))
        hits += found.upper_low <= 1.959964 <= found.upper_high
    assert 0.91 <= hits / 300 <= 0.99
    truth = rng.random(40)
    assert ag.bland_altman(1.3 * truth + rng.normal(0, 0.01, 40), truth).slope_p < 1e-6
    assert ag.bland_altman(truth + 0.1, truth).bias == pytest.approx(0.1)


def test_gaps_are_left_out_in_pairs():
    found = ag.bland_altman([1, 2, None, 4, 5, 6, 7], [1, 2, 3, float("nan"), 5, 6, 7])
    assert found.n == 5 and found.bias == 0
    with pytest.raises(ConfigError, match="2 and 3 scores"):
        ag.pairs([1, 2], [1, 2, 3])
    with pytest.raises(ConfigError, match="a label is 0 or 1"):
        ag.auc([1, 2, 3], [0, 1, 2])
    with pytest.raises(ConfigError, match="Suspected"):
        ag.confusion_table(["Suspected"], ["mild"], ["mild", "severe"])


def test_the_bootstrap_draws_patients_and_redraws_what_says_nothing():
    values, labels = np.arange(10.0), np.r_[np.zeros(9), 1]
    found = ag.bootstrap(ag.auc_value, values, labels)  # every third draw misses the only severe patient
    assert found == ag.bootstrap(ag.auc_value, values, labels) and found.n == 10
    lonely = ag.bootstrap(lambda x: float(x.mean()), np.r_[np.zeros(50), np.ones(50)], groups=["a"] * 50 + ["b"] * 50)
    assert lonely.n == 2 and (lonely.low, lonely.high) == (0, 1)
    never = ag.bootstrap(lambda x: 1.0 if len(set(x)) == len(x) else None, np.arange(40.0), draws=20)
    assert never.low is None and "empty draws" in never.reason
    with pytest.raises(ConfigError, match="3 of 2"):
        ag.bootstrap(lambda x: 1.0, [1, 2], groups=["a", "b", "c"])


def test_rows_carry_a_value_or_a_reason():
    rng = np.random.default_rng(9)
    for rows in (ag.agreement_rows(rng.random(20), rng.random(20)), ag.agreement_rows([1, 2], [2, 1]),
                 ag.agreement_rows([3] * 9, [3] * 9), ag.discrimination_rows(rng.random(20), [0, 1] * 10, 0.5)):
        for row in rows:
            assert set(row) == {"metric", "value", "low", "high", "n", "reason"}
            assert row["value"] is not None or row["reason"], row
            assert row["value"] is None or np.isfinite(row["value"])


# arms of a table ----------------------------------------------------------------------------------------------------


def test_intervals_over_seeds_cover_the_mean_and_the_next_run():
    rng, hits = np.random.default_rng(5), np.zeros(2)
    for _ in range(600):
        *seeds, new = rng.normal(0.7, 0.01, 4)
        hits += [np.prod(np.subtract(ag.mean_interval(seeds)[1:], 0.7)) < 0,
                 np.prod(np.subtract(ag.prediction_interval(seeds)[1:], new)) < 0]
    assert (abs(hits / 600 - 0.95) < 0.03).all()
    assert ag.mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert np.isnan(ag.mean_interval([])).all() and np.isnan(ag.prediction_interval([0.4])[1:]).all()


def test_welch_is_scipys_and_covers_with_unequal_spreads():
    rng, hits = np.random.default_rng(6), 0
    for _ in range(600):
        one, other = rng.normal(0.7, 0.02, 3), rng.normal(0.68, 0.005, 5)
        found = ag.welch(one, other)
        hits += found.low <= 0.02 <= found.high
    assert found.p_value == pytest.approx(stats.ttest_ind(one, other, equal_var=False).pvalue)
    assert found[:3] == pytest.approx(np.negative(ag.welch(other, one)[:3])[[0, 2, 1]])
    assert 0.92 <= hits / 600 <= 0.98
    for sets in (([], [1, 2]), ([1], [1, 2]), ([1, 1], [2, 2])):
        assert np.isnan(ag.welch(*sets)[1:]).all()


def test_the_crossed_bootstrap_covers_where_seeds_and_scans_vary():
    rng, hits = np.random.default_rng(7), 0
    groups = np.repeat(np.arange(12), 4)
    for _ in range(200):
        scan, gain = rng.normal(0, 0.1, 12), rng.normal(0, 0.03, 12)
        arms = [0.6 + rng.normal(0, 0.01, (6, 1)) + effect[groups] + rng.normal(0, 0.02, (6, 48))
                for effect in (scan + gain + 0.05, scan)]
        found = ag.crossed_bootstrap(*arms, groups, draws=400)
        hits += found.low <= 0.05 <= found.high
    assert 0.86 <= hits / 200 <= 0.99  # a percentile interval of six seeds is a little narrow
    assert found == ag.crossed_bootstrap(*arms, groups, draws=400) != ag.crossed_bootstrap(*arms, groups, draws=400, seed=1)
    alone = ag.crossed_bootstrap(*arms)
    assert found.value == alone.value == pytest.approx(arms[0].mean() - arms[1].mean())
    assert found.high - found.low > 1.3 * (alone.high - alone.low)  # slices of a scan are not new evidence


def test_the_crossed_bootstrap_of_one_row_draws_scans_and_leaves_gaps_out():
    values = np.array([0.2, 0.5, np.nan, 0.9])
    assert ag.crossed_bootstrap(values).value == pytest.approx(np.nanmean(values))
    assert ag.crossed_bootstrap(values)[1:] == pytest.approx((0.2, 0.9), abs=0.11)
    for few in ([[0.5, 0.6]], [[0.5], [0.6]]):
        assert np.isnan(ag.crossed_bootstrap(few)[1:]).all()
    assert np.isnan(ag.crossed_bootstrap([1, 2], groups=["a", "a"])[1:]).all()
    with pytest.raises(ConfigError, match="3 scans"):
        ag.crossed_bootstrap([[1, 2], [3, 4]], groups=["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"\[2, 3\] slices"):
        ag.crossed_bootstrap(np.ones((2, 2)), np.ones((2, 3)))


@pytest.mark.parametrize("low, high, direction, margin, outcome", [(0.001, 0.02, "higher", 0,
        "supported"), (-0.02, -0.001, "higher", 0, "contradicted"), (-0.001, 0.02, "higher", 0,
        "undecided"), (0, 0.02, "higher", 0, "undecided"), (-0.02, -0.001, "lower", 0, "supported"),
        (0.001, 0.02, "lower", 0, "contradicted"), (-0.015, 0.008, "higher", 0.02, "supported"),
        (-0.05, -0.021, "higher", 0.02, "contradicted"), (-0.021, 0.1, "higher", 0.02, "undecided"),
        (-0.01, 0.015, "lower", 0.02, "supported"), (-0.01, 0.01, "same", 0.02, "supported"), (0.03,
        0.04, "same", 0.02, "contradicted"), (-0.04, -0.03, "same", 0.02, "contradicted"), (-0.01,
        0.03, "same", 0.02, "undecided"), (np.nan, np.nan, "same", 0.02, "not tested"), (0.1,
        np.nan, "higher", 0, "not tested")])
def test_a_statement_has_four_outcomes(low, high, direction, margin, outcome):
    assert ag.verdict(low, high, direction, margin) == outcome and outcome in ag.OUTCOMES


@pytest.mark.parametrize("direction, margin, says", [
    ("better", 0, "unknown direction"), ("higher", -0.01, "margin"), ("same", 0, "margin"), ("lower", np.nan, "margin")])
def test_a_statement_that_cannot_be_tested_is_refused(direction, margin, says):
    with pytest.raises(ConfigError, match=says):
        ag.verdict(0, 1, direction, margin)


def test_wilcoxon_is_paired_two_sided_and_counts_what_it_leaves_out():
    rng = np.random.default_rng(4)
    hard = rng.uniform(0.2, 0.9, 30)  # images differ much more than networks
    better = np.clip(hard + 0.02 + rng.normal(0, 0.01, 30), 0, 1)
    found = ag.paired_wilcoxon(better, hard)
    assert found.p_value < 1e-4 and found.median_difference > 0.01 and found.n_pairs == 30
    assert ag.paired_wilcoxon(hard, better).p_value == found.p_value
    gaps = better.copy()
    gaps[[3, 7]] = np.nan
    assert ag.paired_wilcoxon(gaps, hard)[2:] == (28, 2, 0)
    assert ag.paired_wilcoxon(hard, hard) == ag.PairedTest(1.0, 0.0, 30, 0, 30)
    with pytest.raises(ConfigError, match="1 and 2 scores"):
        ag.paired_wilcoxon([1], [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(ag.paired_wilcoxon([np.nan, 1.0], [0.0, np.nan]).p_value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_textbook_procedure(p_values):
    corrected, m = ag.holm(p_values), len(p_values)
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for i, k in enumerate(sorted(range(m), key=lambda k: p_values[k])):
            if p_values[k] * (m - i) > alpha:
                break
            rejected.add(k)
        assert {k for k in range(m) if corrected[k] <= alpha} == rejected
    assert (corrected >= np.array(p_values)).all() and (corrected <= 1).all()
    np.testing.assert_array_equal(ag.holm([*p_values, np.nan])[:-1], corrected)
