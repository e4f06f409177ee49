"""The audit: each experiment does what its sentence says, on any input, and each number in a sentence was computed."""
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from covidsev.paper import audit
from covidsev.core import ConfigError, CovidSevError, DataMissingError, IntensityError
from covidsev.severity.score import extent_score
from covidsev.paper.tables import read_published

maps = st.lists(st.floats(0, 1), min_size=2, max_size=40).map(np.array)


@pytest.fixture(scope="module")
def memories():
    return [audit.memorise(seed, patients=2, epochs=8) for seed in (0, 1)]


@pytest.fixture(scope="module")
def results(memories):
    return audit.run_audit(memories)


def fake_run(folder, name, loss_sum, loss_mean, dice, kind="real", shared=1):
    place = folder / "train_single" / name
    place.mkdir(parents=True)
    pd.DataFrame([("test", "test_loss_sum", loss_sum, 4), ("test", "test_loss_mean", loss_mean, 4), ("test", "soft_dice", dice, 4),
                  ("val", "soft_dice", 0.0, 4)], columns=["subset", "metric", "value", "n"]).to_csv(place / "metrics.csv", index=False)
    pd.DataFrame({"id": list("abcd"), "group": list("abcd"), "dice": [1.0, 0.5, 0.5, 0.6],
                  "shares_scan": [k < shared for k in range(4)]}).to_csv(place / "per_image.csv", index=False)
    (place / "run.json").write_text(f'{{"data": {{"kind": "{kind}", "splits": {{}}}}, "parameters": {{}}, "init": "scratch"}}')
    return place


# ------------------------------------------------------------------ ranks and printed numbers

@given(st.permutations(range(6)))
def test_the_exact_p_is_a_share_of_all_orders(order):
    rho, p = audit.rank_correlation(range(6), order)
    assert -1 <= rho <= 1 and 0 < p <= 1 and (p * math.factorial(6)) == pytest.approx(round(p * math.factorial(6)))
    assert audit.rank_correlation(range(6), [-value for value in order])[0] == pytest.approx(-rho)


@pytest.mark.parametrize("n", [7, 9])
def test_exact_and_approximate_correlation_have_one_rho(n):
    from scipy.stats import spearmanr

    x, y = np.random.default_rng(n).random((2, n))
    assert audit.rank_correlation(x, y)[0] == pytest.approx(spearmanr(x, y).statistic)


def test_ties_and_constants():
    assert math.isnan(audit.rank_correlation([1, 2, 3], [5, 5, 5])[0])
    assert audit.rank_correlation([1, 1, 2], [3, 3, 4])[0] == pytest.approx(1)


def test_printed_pairs_are_the_published_cells():
    pairs = audit.printed_pairs()
    table = read_published("draft_table2")
    for line in pairs[pairs.draft == "2"].itertuples():
        cell = table[(table.row_key == line.row_key) & (table.column == line.column)].value
        assert float(cell.iloc[0]) == line.dice
    assert not pairs.isna().any().any() and "1" not in set(pairs.draft)  # draft 1 prints no Dice


def test_a_table_of_published_numbers_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(audit.tables, "repo_root", lambda: tmp_path)
    with pytest.raises(DataMissingError, match="published numbers is missing"):
        audit.printed_pairs()


def test_loss_readings_divide_draft_1():
    table = audit.loss_readings()
    for name, by in audit.loss_divisors().items():
        assert (table[f"draft 1 / {name}"] * by).to_numpy() == pytest.approx(table["draft 1 / as printed"].to_numpy())
    assert (table["draft 1 / as printed"] > 4 * table["draft 2"]).all()  # more than the number of maps


# ------------------------------------------------------------------ mechanisms

@given(st.integers(0, 2**31 - 1), st.floats(1, 100))
def test_any_weights_are_inert_in_the_released_entropy(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits, weights = torch.randn(2, 1, 8, 8, generator=generator), scale * torch.rand(2, 1, 8, 8, generator=generator) + 0.1
    mask = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask)
    assert audit.published_entropy(logits, mask, weights).item() == pytest.approx(plain.item(), rel=1e-4)


@given(maps)
def test_a_stretched_map_reaches_one_or_was_constant(values):
    stretched = audit.stretch(values)
    assert stretched.min() == 0 and stretched.max() <= 1
    if np.ptp(values) > 1e-3:
        assert stretched.max() > 0.9999
        assert (np.argsort(stretched, kind="stable") == np.argsort(values, kind="stable")).all()
    if np.ptp(values) == 0:
        assert not stretched.any()


@pytest.mark.parametrize("bad", [np.array([0.5, np.nan]), np.array([-0.1, 0.2]), np.zeros(0)])
def test_stretch_refuses_what_is_no_map(bad):
    with pytest.raises(IntensityError):
        audit.stretch(bad)


@given(st.floats(0, 3))
def test_the_script_never_scores_more_than_ct_ss(ratio):
    script, ours = audit.published_extent(ratio), extent_score(min(ratio, 1.0))
    assert script == ours or script == 0


@given(st.floats(0, 1), st.floats(0, 1))
def test_ct_ss_is_monotone_where_the_script_is_not(a, b):
    low, high = sorted((a, b))
    assert extent_score(low) <= extent_score(high)
    assert audit.published_extent(0.49) > audit.published_extent(0.5) and audit.published_extent(0.99) > audit.published_extent(1.0)


@pytest.mark.parametrize("network, native", [(32, 64), (48, 64), (64, 64)])
def test_two_grids_scale_by_the_square_of_the_sides(network, native):
    found = audit.two_grids(0.4, network, native)
    assert found["factor"] == pytest.approx(found["theory"], abs=0.01) and found["theory"] == (network / native) ** 2


@pytest.mark.parametrize("mode", ["side", "area"])
@pytest.mark.parametrize("size", [64, 352])
def test_simulated_cutouts_have_the_expected_area(mode, size):
    table = audit.cutout_table(4000, size).query("mode == @mode")
    assert table.simulated.to_numpy() == pytest.approx(table.expected.to_numpy(), rel=0.08)
    limit = table.c**2 if mode == "side" else table.c
    assert (table.largest <= 1.03 * limit).all()


def test_cutout_area_refuses_another_meaning():
    with pytest.raises(ConfigError, match="cutout_mode"):
        audit.erased_mean(0.5, "sides")


@given(st.floats(0, 1))
def test_entropy_is_highest_at_one_half(share):
    assert 0 <= audit.binary_entropy(share) <= 1 and audit.binary_entropy(share) == pytest.approx(audit.binary_entropy(1 - share), abs=1e-9)


def test_schedule_of_a_short_run_is_constant():
    table = audit.rate_table(40)
    assert table.published.nunique() == table.step.nunique() == 1 and len(table) == 40


def test_labels_at_their_own_size_do_not_change():
    labels = np.random.default_rng(0).integers(0, 3, (40, 40)).astype(np.uint8)
    assert audit.resized_labels(labels, 40) == {"pixels": 1600, "wrong": 0, "ggo": 0}
    assert audit.resized_labels(np.zeros((40, 40), np.uint8), 97)["wrong"] == 0
    only_two = np.kron(np.eye(4, dtype=np.uint8) * 2, np.ones((10, 10), np.uint8))
    assert audit.resized_labels(only_two, 97)["ggo"] > 0  # a class that is nowhere in the labels


# ------------------------------------------------------------------ tiny networks

def test_memory_is_deterministic_and_leaves_nothing_behind(memories, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.tempfile, "tempdir", str(tmp_path))
    again = audit.memorise(0, patients=2, epochs=8)
    assert all(np.array_equal(a, b) for name in again.maps for a, b in zip(again.maps[name], memories[0].maps[name]))
    assert not list(tmp_path.iterdir())


def test_one_network_cannot_say_what_it_remembers(memories):
    with pytest.raises(ConfigError, match="one that did not"):
        audit.memory_scores(memories[:1])


def test_swapping_networks_changes_no_own_score(memories):
    forward, backward = (audit.memory_scores(each).set_index(["slices", "seed"]).sort_index() for each in (memories, memories[::-1]))
    pd.testing.assert_frame_equal(forward, backward)


def test_evaluation_leaves_the_network_as_it_was(memories):
    memory = memories[0]
    before = {name: value.clone() for name, value in memory.model.state_dict().items()}
    audit.loss_in_mode(memory.model, memory.sets["unseen"], memory.size, 2, True)
    assert all(torch.equal(value, before[name]) for name, value in memory.model.state_dict().items())
    assert not memory.model.training


def test_healthy_slices_are_healthy_and_become_infected_by_stretching():
    healthy = audit.healthy_slices(2)
    assert not any(healthy.infection(k).any() for k in range(2))
    table = audit.stretched_shares(audit.random_maps(healthy, 64, [3]))
    assert table["empty"].all() and not table["empty stretched"].any()


# ------------------------------------------------------------------ the whole

def test_every_entry_is_measured_once_or_more(results):
    assert {each.entry for each in results} == set(audit.ENTRIES)
    assert not (audit.summary(results)["effect measured"] == "not measured here").any()


def test_no_sentence_has_a_gap_and_every_result_says_its_data(results):
    for each in results:
        assert not re.search(r"[{}]|nan", each.effect) and each.data in audit.KINDS and each.n > 0 and each.unit
        assert each.values and all(math.isfinite(value) for value in each.values.values())


def test_sentences_are_written_from_numbers():
    one = audit.measured("leak", "theory", 1, "x", "half is {value:.1f}", value=0.5)
    assert one.effect == "half is 0.5"
    with pytest.raises(KeyError):
        audit.measured("leak", "theory", 1, "x", "{forgotten}")


def test_saved_results_come_back_and_are_the_same_bytes(results, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        audit.save_audit(tmp_path / name, results)
    assert audit.read_audit(tmp_path / "a") == results
    for name in ("audit.csv", "effects.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(DataMissingError, match="has not been run"):
        audit.read_audit(tmp_path)


# ------------------------------------------------------------------ our runs

def test_without_runs_nothing_is_said(tmp_path):
    assert audit.audit_runs({}) == []
    from covidsev.paper.experiments import load_registry

    assert audit.finished_runs(tmp_path, load_registry(), "smoke") == {}


def test_our_runs_are_read_and_counted(tmp_path):
    runs = {("a", seed): fake_run(tmp_path, f"a-seed{seed}", 4 * (1 + seed), 1 + seed, 0.9 - 0.1 * seed) for seed in range(3)}
    runs[("b", 0)] = fake_run(tmp_path, "b-seed0", 2.0, 2.0, 0.1)
    dice, sums, shared = audit.audit_runs(runs)
    assert dice.values["rho_full"] == pytest.approx(-1) and dice.values["full"] == 3 and dice.n == 4 and dice.data == "real"
    assert (sums.values["low"], sums.values["high"]) == (1, 4)
    assert shared.values["change"] == pytest.approx(np.mean([0.5, 0.5, 0.6]) - np.mean([1.0, 0.5, 0.5, 0.6]))
    assert shared.values["shared"] == 1 and shared.values["n_shared"] == 1


def test_no_shared_slice_no_line(tmp_path):
    runs = {("a", seed): fake_run(tmp_path, f"a-seed{seed}", 4, 1 + seed, 0.5 + seed, "phantom", shared=0) for seed in range(2)}
    assert [each.entry for each in audit.audit_runs(runs)] == ["loss_sums"]


# ------------------------------------------------------------------ published maps, where they are

def test_published_maps_are_missing_politely(tmp_path):
    assert audit.published_root(tmp_path) is None
    with pytest.raises(CovidSevError, match="published maps are not here"):
        audit.published_map_shares(tmp_path)


def test_the_published_maps_are_stretched(data_root, published_root):
    table = audit.published_map_shares(audit.published_root(data_root))
    assert table.groupby("model").size().eq(48).all() and set(table.model) == set(audit.PUBLISHED_MAPS)
    reach = (table.smallest == 0) & (table.largest == 1)
    assert reach.mean() > 0.99
    none = table[(table.model == "consolidation") & (table.truth == 0)]
    assert len(none) == 10 and (none.share > 0).sum() >= 9
