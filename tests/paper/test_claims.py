"""The register of claims: outcomes follow the numbers and nothing else, faults of the files are named, the findings stay within their words."""
import json
import math
import re
from functools import partial

import pandas as pd
import pytest
from toys import TRAIN, experiment, table, write_notebook

from covidsev.core import ConfigError, repo_root, write_csv, write_json
from covidsev.method.statistics import CONTRADICTED, NOT_TESTED, OUTCOMES, SUPPORTED, UNDECIDED, crossed_bootstrap
from covidsev.data.datasets import load_splits
from covidsev.paper import claims, tables
from covidsev.paper.claims import train_again
from covidsev.paper.experiments import load_registry
from covidsev.paper.runner import reproduce


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def statements(registry):
    return claims.load_statements(registry)


@pytest.fixture(scope="module")
def frame(registry):
    """The register of the committed results, with few draws for a bootstrap, which is not tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "crossed_bootstrap", partial(crossed_bootstrap, draws=50))
        yield claims.register("cpu", registry=registry)


@pytest.fixture
def world(tmp_path, registry):
    """A function that writes runs below a folder of its own and returns the findings there."""

    def make(rows, kind="real", metric="dice", size=160, experiment="train_single"):
        for row, values in rows.items():
            for seed, value in enumerate(values):
                folder = tmp_path / "cpu" / experiment / f"{row}-seed{seed}"
                write_csv(folder / "metrics.csv", pd.DataFrame({"subset": ["test"], "metric": [metric], "value": [value], "n": [48]}))
                write_json(folder / "run.json", {"parameters": {"size": size, "backbone": "res2net50"},
                                                 "data": {"kind": kind, "splits": {"test": {"n": 48}}}})
        return claims.read_findings("cpu", tmp_path / "cpu", registry)

    return make


def statement(**changes):
    return {"id": "x", "row": "sinfnet", "than": "unet", "metric": "dice", "direction": "higher", **changes}


@pytest.mark.parametrize("rows, outcome, opposite", [
    ({"sinfnet": [0.6, 0.61, 0.62], "unet": [0.5, 0.51, 0.52]}, SUPPORTED, CONTRADICTED),
    ({"sinfnet": [0.5, 0.51, 0.52], "unet": [0.6, 0.61, 0.62]}, CONTRADICTED, SUPPORTED),
    ({"sinfnet": [0.6, 0.4, 0.5], "unet": [0.51, 0.5, 0.5]}, UNDECIDED, UNDECIDED),
    ({"sinfnet": [0.6], "unet": [0.5]}, NOT_TESTED, NOT_TESTED),  # one seed
    ({"sinfnet": [0.6, 0.61, 0.62]}, NOT_TESTED, NOT_TESTED),  # the other row was not run
])
def test_a_comparison_has_four_outcomes_and_its_opposite_mirrors_them(world, rows, outcome, opposite):
    findings = world(rows)
    found = [claims.compare(findings, statement(direction=way)) for way in ("higher", "lower")]
    assert [each.outcome for each in found] == [outcome, opposite]
    assert all((each.why == "") == (each.outcome == SUPPORTED) for each in found)


def test_as_good_as_is_never_superiority(world):
    findings = world({"sinfnet": [0.6, 0.605, 0.61], "unet": [0.605, 0.61, 0.615]})
    assert claims.compare(findings, statement()).outcome == UNDECIDED
    assert claims.compare(findings, statement(margin=0.05)).outcome == SUPPORTED
    assert claims.compare(world({"sinfnet": [0.5, 0.505, 0.51]}), statement(margin=0.05)).outcome == CONTRADICTED
    assert "margin" in claims.decided_by(statement(kind="comparison", margin=0.05))


def test_the_experiment_of_a_claim_is_train_single_unless_it_says_so(world):
    world({"sinfnet": [0.2, 0.21], "unet": [0.1, 0.11]})
    findings = world({"multi": [0.2, 0.21], "multi_self": [0.9, 0.91]}, experiment="train_multi")
    assert claims.compare(findings, statement()).outcome == SUPPORTED
    assert claims.compare(findings, statement(experiment="train_multi", row="multi", than="multi_self")).outcome == CONTRADICTED
    assert claims.compare(findings, statement(experiment="priors")).outcome == NOT_TESTED


def test_phantoms_decide_nothing(world, statements):
    findings = world({"sinfnet": [0.9, 0.91, 0.92], "unet": [0.1, 0.11, 0.12]}, kind="phantom")
    frame = claims.judge_register(findings, statements)
    assert set(frame[frame.data == "phantom"].outcome) == {NOT_TESTED}
    assert frame.set_index("id").loc["dice: sinfnet - unet", "why"] == "phantom data decide nothing"


def test_best_needs_every_comparison_and_one_contradiction_is_enough(world):
    rows = {"sinfnet_aug_0.5": [0.7, 0.71, 0.7], "sinfnet_aug_0.4": [0.6, 0.61, 0.6]}
    best = {"rows": ["sinfnet_aug_0.5"], "than": ["sinfnet_aug_0.4", "sinfnet_aug_0.2"], "metric": "dice", "direction": "higher"}
    assert claims.compare(world(rows), best).outcome == NOT_TESTED  # one pair is open
    for third, outcome in (([0.5, 0.5, 0.51], SUPPORTED), ([0.9, 0.9, 0.91], CONTRADICTED), ([0.6, 0.7, 0.8], UNDECIDED)):
        found = claims.compare(world({**rows, "sinfnet_aug_0.2": third}), best)
        assert found.outcome == outcome and found.words.startswith("weakest of 2: ")
    one_open = {**best, "than": ["sinfnet_aug_0.2", "unet"]}
    assert claims.compare(world({**rows, "sinfnet_aug_0.2": [0.9, 0.9, 0.91]}), one_open).outcome == CONTRADICTED


@pytest.mark.parametrize("size, value, expected", [(352, 0.70, SUPPORTED), (352, 0.60, CONTRADICTED), (160, 0.70, NOT_TESTED)])
def test_printed_numbers_are_judged_on_the_drafts_terms_alone(world, statements, size, value, expected):
    findings = world({"sinfnet_aug_0.5": [value - 0.01, value, value + 0.01]}, metric="soft_dice", size=size)
    table2 = next(each for each in statements if each["id"] == "table2_draft2_single")
    found = claims.printed_number(findings, {**table2, "row": "sinfnet_aug_0.5", "printed": 0.30})
    assert found.outcome == expected and "read as 0.70" in found.words
    assert ("size 160 instead of 352" in found.why) == (size == 160)


def test_every_printed_number_of_the_drafts_is_in_the_register(frame):
    texts = " ".join(frame[frame.kind == "printed"].claim)
    for table in ("draft_table1", "draft_table2"):
        for value in tables.read_published(table)["value"].dropna():
            assert re.search(rf"{value:g}\b", texts), value


def test_register_is_complete_and_says_where(statements, registry, frame):
    assert len(frame) == len(set(frame.id)) >= len(statements) and set(frame.outcome) <= set(OUTCOMES)
    assert frame[["claim", "place", "test", "evidence"]].map(lambda text: bool(str(text).strip())).all().all()
    written = {f"{claim['metric']}: {claim['row']} - {claim['than']}" for each in registry.experiments.values() for claim in each.claims}
    assert written <= set(frame.id)


def test_new_runs_change_outcome_and_wording(world, registry, statements):
    before = claims.judge_register(world({"sinfnet": [0.5, 0.51, 0.52]}), statements)
    after = claims.judge_register(world({"sinfnet": [0.5, 0.51, 0.52], "sinfnet_aug_0.5": [0.6, 0.61, 0.62]}), statements)
    texts = [claims.findings_text(frame, registry, "cpu") for frame in (before, after)]
    assert texts[0]["impact"] != texts[1]["impact"] and "+0.100" in texts[1]["impact"] and "+0.100" not in texts[0]["impact"]


def test_findings_stay_within_their_words_whatever_comes_out(registry, frame):
    sentences = claims.read_claims()["sentences"]
    for sentence in sentences:
        wordings = [text for key, text in sentence.items() if key not in ("section", "claim")]
        assert len(wordings) == (4 if "claim" in sentence else 1) and not any(re.search(r"\d", text.replace("COVID-19", "")) for text in wordings)
    for outcome in OUTCOMES:  # the limits are checked when the text is made
        each = frame.assign(outcome=outcome, value=0.1, low=0.0, high=0.2, seeds=3)
        assert set(claims.findings_text(each, registry, "cpu")) == set(claims.SECTIONS)


GOOD = 'id = "a"\ntext = "t"\nplace = "p"\n'


@pytest.mark.parametrize("body, message", [
    ("[[claims]]\n" + GOOD + 'kind = "evry"', "did you mean 'every'"),
    ("[[claims]]\n" + GOOD + 'kind = "threshold"\nmetric = "m"', "has no 'experiment'"),
    ("[[claims]]\n" + GOOD + 'kind = "untested"\nwhy = "w"\nwho = "x"', "unknown key 'who'"),
    ("[[claims]]\n" + GOOD + 'kind = "relative"\nthan = "unet"\nrow = "unett"\nmetric = "dice"\ndirection = "lower"\nby = 1', "did you mean 'unet'"),
    ("[[claims]]\n" + GOOD + 'kind = "untested"\nwhy = "w"\n[[claims]]\n' + GOOD + 'kind = "untested"\nwhy = "w"', "the same id"),
    ("[[claims]", "cannot be read"),
    ("claims = []\n[[sentences]]\nsection = 'impact'\nclaim = 'a'\nsupported = 'yes'", "has no 'contradicted'"),
], ids=["kind", "missing key", "unknown key", "row", "twice", "not TOML", "wording"])
def test_faults_of_the_file_are_named(tmp_path, registry, body, message):
    (tmp_path / "claims.toml").write_text(body)
    with pytest.raises(ConfigError, match=message):
        claims.load_statements(registry, tmp_path / "claims.toml")


def test_verify_claims_prints_the_register_and_as_json(tmp_path):
    from click.testing import CliRunner

    from covidsev.cli import main

    shown = CliRunner().invoke(main, ["verify", "--claims", "--out", str(tmp_path)], standalone_mode=False)
    assert shown.exception is None and shown.output.startswith("| claim | place | outcome |") and "not tested." in shown.output
    lines = json.loads(CliRunner().invoke(main, ["verify", "--claims", "--json", "--out", str(tmp_path)], standalone_mode=False).output)
    assert {"id", "place", "outcome", "data", "seeds", "n", "low", "high"} <= set(lines[0])


def test_saved_register_reads_back(tmp_path, registry, frame):
    findings = claims.read_findings("cpu", registry=registry)
    claims.save_findings(findings, frame, claims.findings_text(frame, registry, "cpu"), tmp_path)
    again = tables.read_csv(tmp_path / "tables/claims.csv", keep_default_na=False, na_values=[""])
    assert list(again.id) == list(frame.id) and math.isclose(again.value.sum(), frame.value.sum())
    assert str(repo_root()) not in (tmp_path / "tables/claims.md").read_text(encoding="utf-8")


SCORED = """
import json, pathlib
out = pathlib.Path(output)
said = {"profile": profile, "row": row, "seed": seed, "epochs": epochs, "start": start}
(out / "run.json").write_text(json.dumps({"parameters": said, "data": {"kind": "real"}, "threads": 1}))
lines = [f"test,{name},{0.1 * epochs + 0.01 * seed},4" for name in ("dice", "meanDice")]
(out / "metrics.csv").write_text("\\n".join(["subset,metric,value,n", *lines]))
"""


def test_a_row_that_is_trained_again_lies_inside_or_not(tmp_path):
    write_notebook(tmp_path / "work.ipynb", TRAIN, SCORED)
    (tmp_path / "toy.toml").write_text(table("profiles.smoke", title="toy", seeds=[0, 1, 2], rows={"train_single": ["a", "b"]})
                                       + experiment("train_single", rows={"a": {}, "b": {}}))
    registry, quiet = load_registry(tmp_path / "toy.toml"), {"echo": lambda line: None}
    reproduce("smoke", rows=["a"], registry=registry, root=tmp_path / "first", **quiet)
    before = {"registry": registry, "committed": tmp_path / "first/results/smoke", **quiet}
    same = train_again("smoke", ["a"], [1], tmp_path / "again", **before)
    assert same[["metric", "value", "committed", "seeds", "inside", "threads"]].round(9).to_numpy().tolist() == [
        [name, 0.31, 0.31, 3, True, 1] for name in ("dice", "meanDice")]
    # mean .31, deviation .01, three seeds: .31 ± 4.303 (.01) (4/3)^.5
    assert same[["low", "high"]].to_numpy()[0] == pytest.approx([0.2603, 0.3597], abs=1e-4)
    other = train_again("smoke", ["a"], [1, 7], tmp_path / "again", overrides={"epochs": 4}, **before)
    assert other["inside"].tolist() == [False] * 4 and other["committed"].isna().tolist() == [False, False, True, True]
    with pytest.raises(ConfigError, match="did you mean|committed runs"):
        train_again("smoke", ["b"], [0], tmp_path / "again", **before)  # never run


def test_the_counts_of_data_sets_are_those_of_the_data(data_root):
    table = tables.read_published("data_sets").set_index(["data_set", "quantity"])["value"]
    splits = load_splits("covid-semiseg", root=data_root)
    assert len(splits.train) + len(splits.test) == table["covid-semiseg", "labelled slices"]
    for name, file, key, more in (("ictcf", "ictcf-tables/patients.csv", "patients", 0),
                                  ("medseg", "medseg9/slices.csv", "labelled slices", 100)):
        if (path := data_root / file).is_file():  # the other 100 slices are not distributed with the nine volumes
            assert len(tables.read_csv(path)) + more == table[name, key]
