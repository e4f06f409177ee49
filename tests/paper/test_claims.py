"""The register of claims: outcomes follow the numbers and nothing else, faults of the files are named, the findings stay within their words."""
import json
import math
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covidsev.paper import claims
from covidsev.paper import tables
from covidsev.paper.claims import FAIL, NOT_TESTED, OUTCOMES, PASS
from covidsev.core import ConfigError, repo_root
from covidsev.paper.experiments import load_registry
from covidsev.core import write_csv, write_json

NUMBERS = st.floats(-1, 1, allow_nan=False)


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def statements(registry):
    return claims.load_statements(registry)


@pytest.fixture
def world(tmp_path, registry):
    """A function that writes runs of train_single below a folder of its own and returns the findings there."""

    def make(rows, kind="real", metric="dice", size=160):
        for row, values in rows.items():
            for seed, value in enumerate(values):
                folder = tmp_path / "results/cpu/train_single" / f"{row}-seed{seed}"
                write_csv(folder / "metrics.csv", pd.DataFrame({"subset": ["test"], "metric": [metric], "value": [value], "n": [48]}))
                write_json(folder / "run.json", {"parameters": {"size": size, "backbone": "res2net50"}, "data": {"kind": kind, "splits": {"test": {"n": 48}}}})
        return claims.read_findings("cpu", tmp_path, registry)

    return make


@given(NUMBERS, st.floats(0, 1), NUMBERS)
def test_outcome_is_a_matter_of_the_interval_alone(low, width, bar):
    high = low + width
    outcome, doubt = claims.decide(low, high, "higher", bar)
    assert (outcome == PASS) == (low > bar) and (doubt == "") == (outcome == PASS)
    assert (doubt == "the opposite holds") == (high < bar)
    assert claims.decide(-high, -low, "lower", -bar)[0] == outcome
    if outcome == PASS:  # a lower bar is easier
        assert claims.decide(low, high, "higher", bar - 0.1)[0] == PASS


@pytest.mark.parametrize("rows, expected", [
    ({"sinfnet": [0.6, 0.61, 0.62], "unet": [0.5, 0.51, 0.52]}, PASS),
    ({"sinfnet": [0.5, 0.51, 0.52], "unet": [0.6, 0.61, 0.62]}, FAIL),
    ({"sinfnet": [0.6, 0.4, 0.5], "unet": [0.5, 0.5, 0.5]}, FAIL),
    ({"sinfnet": [0.6], "unet": [0.5]}, NOT_TESTED),  # one seed
    ({"sinfnet": [0.6, 0.61, 0.62]}, NOT_TESTED),  # the other row was not run
])
def test_comparison_says_what_the_tables_say(world, statements, rows, expected):
    findings = world(rows)
    claim = next(each for each in statements if each["id"] == "dice: sinfnet - unet")
    found = claims.compare(findings, claim)
    assert found.outcome == expected
    judged = tables.judge(claim, tables.collect(findings.runs["train_single"]), "real")
    assert judged["outcome"] == expected and (found.doubt == "") == (expected == PASS)


def test_phantoms_decide_nothing(world, statements):
    findings = world({"sinfnet": [0.9, 0.91, 0.92], "unet": [0.1, 0.11, 0.12]}, kind="phantom")
    frame = claims.judge_register(findings, statements)
    assert set(frame[frame.data == "phantom"].outcome) == {NOT_TESTED}
    assert frame.set_index("id").loc["dice: sinfnet - unet", "doubt"] == "phantom data decide nothing"


def test_best_needs_every_comparison(world):
    rows = {"sinfnet_aug_0.5": [0.7, 0.71, 0.7], "sinfnet_aug_0.4": [0.6, 0.61, 0.6]}
    best = {"rows": ["sinfnet_aug_0.5"], "than": ["sinfnet_aug_0.4", "sinfnet_aug_0.2"], "metric": "dice", "direction": "higher"}
    assert claims.compare_every(world(rows), best).outcome == NOT_TESTED  # one pair is open
    assert claims.compare_every(world({**rows, "sinfnet_aug_0.2": [0.5, 0.5, 0.51]}), best).outcome == PASS
    assert claims.compare_every(world({**rows, "sinfnet_aug_0.2": [0.9, 0.9, 0.91]}), best).outcome == FAIL
    one_open = {**best, "than": ["sinfnet_aug_0.2", "unet"]}
    assert claims.compare_every(world({**rows, "sinfnet_aug_0.2": [0.9, 0.9, 0.91]}), one_open).outcome == FAIL  # one that fails is enough


@pytest.mark.parametrize("size, value, expected", [(352, 0.70, PASS), (352, 0.60, FAIL), (160, 0.70, NOT_TESTED)])
def test_printed_numbers_are_judged_on_the_drafts_terms_alone(world, statements, size, value, expected):
    findings = world({"sinfnet_aug_0.5": [value - 0.01, value, value + 0.01]}, metric="soft_dice", size=size)
    table2 = next(each for each in statements if each["id"] == "table2_draft2_single")
    found = claims.printed_number(findings, table2, "sinfnet_aug_0.5", 0.30)
    assert found.outcome == expected and "read as 0.70" in found.words
    assert ("size 160 instead of 352" in found.doubt) == (size == 160)


def test_every_printed_number_of_the_drafts_is_in_the_register(statements):
    frame = claims.register("smoke")
    texts = " ".join(frame[frame.kind == "printed"].claim)
    for table in ("draft_table1", "draft_table2"):
        for value in tables.read_published(table)["value"].dropna():
            assert re.search(rf"{value:g}\b", texts), value


def test_register_is_complete_and_says_where(statements, registry):
    frame = claims.register("smoke", registry=registry)
    assert len(frame) == len(set(frame.id)) >= len(statements) and set(frame.outcome) <= set(OUTCOMES)
    assert frame[["claim", "place", "test", "evidence"]].map(lambda text: bool(str(text).strip())).all().all()
    written = [claim for each in registry.experiments.values() for claim in each.claims]
    assert {claims.comparison_id(claim) for claim in written} <= set(frame.id)
    assert sum(claims.tally(frame).values()) == len(frame)


def test_new_runs_change_outcome_and_wording(world, registry, statements):
    before = claims.judge_register(world({"sinfnet": [0.5, 0.51, 0.52]}), statements)
    after = claims.judge_register(world({"sinfnet": [0.5, 0.51, 0.52], "sinfnet_aug_0.5": [0.6, 0.61, 0.62]}), statements)
    texts = [claims.findings_text(frame, registry, "cpu") for frame in (before, after)]
    assert texts[0]["impact"] != texts[1]["impact"] and "+0.100" in texts[1]["impact"] and "+0.100" not in texts[0]["impact"]


def test_findings_stay_within_their_words_whatever_comes_out():
    sentences = claims.read_claims()["sentences"]
    for section, limit in claims.LIMITS.items():
        assert 0 < claims.longest_wording(sentences, section) <= limit


def test_no_number_of_the_findings_is_typed():
    for sentence in claims.read_claims()["sentences"]:
        for key in set(sentence) - {"section", "claim"}:
            assert not re.search(r"\d", sentence[key].replace("COVID-19", "")), sentence[key]


def test_each_sentence_has_a_wording_for_each_outcome(registry, statements):
    for sentence in claims.read_claims()["sentences"]:
        if "claim" in sentence:
            assert {"pass", "fail", "untested"} <= set(sentence)
            for outcome, doubt in ((PASS, ""), (FAIL, "the interval covers 0"), (FAIL, "the opposite holds"), (NOT_TESTED, "not run")):
                assert claims.choose_wording(sentence, {"outcome": outcome, "doubt": doubt})


GOOD = 'id = "a"\ntext = "t"\nplace = "p"\n'


@pytest.mark.parametrize("body, message", [
    ("[[claims]]\n" + GOOD + 'kind = "evry"', "did you mean 'every'"),
    ("[[claims]]\n" + GOOD + 'kind = "threshold"\nmetric = "m"', "has no 'experiment'"),
    ("[[claims]]\n" + GOOD + 'kind = "untested"\nwhy = "w"\nwho = "x"', "unknown key 'who'"),
    ("[[claims]]\n" + GOOD + 'kind = "count"\nexperiment = "train_single"\nrow = "unett"\nvalue = 1', "did you mean 'unet'"),
    ("[[claims]]\n" + GOOD + 'kind = "untested"\nwhy = "w"\n[[claims]]\n' + GOOD + 'kind = "untested"\nwhy = "w"', "the same id"),
    ("[[claims]", "cannot be read"),
], ids=["kind", "missing key", "unknown key", "row", "twice", "not TOML"])
def test_faults_of_the_file_are_named(tmp_path, registry, body, message):
    (tmp_path / "claims.toml").write_text(body)
    with pytest.raises(ConfigError, match=message):
        claims.load_statements(registry, tmp_path / "claims.toml")


def test_verify_claims_prints_the_register_and_as_json(tmp_path):
    from click.testing import CliRunner

    from covidsev.cli import main

    shown = CliRunner().invoke(main, ["verify", "--claims", "--out", str(tmp_path)], standalone_mode=False)
    assert shown.exception is None and shown.output.startswith("| claim | place | outcome |") and "NOT TESTED." in shown.output
    lines = json.loads(CliRunner().invoke(main, ["verify", "--claims", "--json", "--out", str(tmp_path)], standalone_mode=False).output)
    assert {"id", "place", "outcome", "data", "seeds", "n", "low", "high"} <= set(lines[0])


def test_saved_register_reads_back(tmp_path):
    frame = claims.register("smoke")
    claims.save_claims(frame, tmp_path / "claims", "Claims")
    again = tables.read_csv(tmp_path / "claims.csv", keep_default_na=False, na_values=[""])
    assert list(again.id) == list(frame.id) and math.isclose(again.value.sum(), frame.value.sum())
    assert str(repo_root()) not in (tmp_path / "claims.md").read_text(encoding="utf-8")
