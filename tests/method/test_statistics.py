"""Agreement and discrimination: known answers, properties, and a reason wherever there is no number."""

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


@SOME
@given(scores, st.integers(0, 99))
def test_auc_is_the_share_of_ordered_pairs(values, seed):
    values, labels = np.array(values, float), labels_for(len(values), seed)
    found, (high, low) = ag.auc(values, labels), (values[labels == one] for one in (1, 0))
    if np.ptp(values) == 0:
        assert found.value is None and "same for everyone" in found.reason
        return
    assert found.value == pytest.approx(stats.mannwhitneyu(high, low).statistic / (len(high) * len(low)), abs=1e-12)
    assert ag.auc(-values, labels).value == pytest.approx(1 - found.value, abs=1e-12)
    fpr, tpr, cuts = ag.roc_points(values, labels)
    assert np.trapezoid(tpr, fpr) == pytest.approx(found.value, abs=1e-12)
    assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all() and len(cuts) == len(np.unique(values)) + 1
    assert found.low is None or 0 <= found.low <= found.value <= found.high <= 1


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


@SOME
@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_stays_inside(k, n):
    if k > n:
        with pytest.raises(ConfigError, match=f"{k} of {n}"):
            ag.wilson(k, n)
        return
    found = ag.wilson(k, n)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


@SOME
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(-9, 9))
def test_icc_is_free_of_scale_and_order_and_sees_a_shift(seed, scale, shift):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(12, 1)) + 0.3 * rng.normal(size=(12, 3))
    found = ag.icc(table)
    assert ag.icc(scale * table + shift).value == pytest.approx(found.value, rel=1e-6, abs=1e-9)
    assert ag.icc(table[rng.permutation(12)][:, ::-1]).value == pytest.approx(found.value, abs=1e-9)
    assert found.low <= found.value <= found.high
    same = ag.icc(np.c_[table[:, 0], table[:, 0]])
    assert same.value == 1 and same.low is None and "constant" in same.reason
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


@pytest.mark.parametrize("low, high, direction, margin, outcome", [
    (-0.001, 0.02, "higher", 0, "undecided"), (0, 0.02, "higher", 0, "undecided"),
    (-0.02, -0.001, "lower", 0, "supported"), (0.001, 0.02, "lower", 0, "contradicted"),
    (-0.021, 0.1, "higher", 0.02, "undecided"), (-0.01, 0.015, "lower", 0.02, "supported"),
    (0.03, 0.04, "same", 0.02, "contradicted"), (-0.04, -0.03, "same", 0.02, "contradicted"),
    (np.nan, np.nan, "same", 0.02, "not tested"), (0.1, np.nan, "higher", 0, "not tested")])
def test_a_statement_has_four_outcomes(low, high, direction, margin, outcome):
    """Beside those of the notebook."""
    assert ag.verdict(low, high, direction, margin) == outcome and outcome in ag.OUTCOMES


@pytest.mark.parametrize("direction, margin, says", [
    ("better", 0, "unknown direction"), ("higher", -0.01, "margin"), ("same", 0, "margin"), ("lower", np.nan, "margin")])
def test_a_statement_that_cannot_be_tested_is_refused(direction, margin, says):
    with pytest.raises(ConfigError, match=says):
        ag.verdict(0, 1, direction, margin)
