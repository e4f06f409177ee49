"""The networks that come with the repository: files, cards, records and the numbers behind them belong together."""

import json

import pandas as pd
import pytest
import torch

from covidsev.core import repo_root, sha256_file
from covidsev.method.inference import load_model

WEIGHTS = repo_root() / "weights"
RESULTS = repo_root() / "results" / "cpu"
FILES = sorted(WEIGHTS.glob("scan_*.safetensors"))

pytestmark = pytest.mark.skipif(not FILES, reason="no weights in this checkout")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def shipped(request):
    """Path, network, what the file says of itself, and the record beside it."""
    path = request.param
    network, info = load_model(path)
    return path, network, info, json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def test_together_they_are_small():
    assert {path.stem for path in FILES} == {"scan_infection", "scan_lungs"}
    assert sum(path.stat().st_size for path in FILES) <= 15e6


def test_file_record_and_card_say_the_same(shipped):
    path, network, info, record = shipped
    assert record["sha256"] == sha256_file(path)
    assert path.stem == f"scan_{info.structure}" and info.data_kind == "real"
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    for words in ("Not a medical device", record["sha256"], record["licence"], "CC BY-NC-SA 4.0"):
        assert words in card, words
    logits = network(torch.rand(1, 1, info.size, info.size)).s_3
    assert logits.shape == (1, 1, info.size, info.size) and logits.isfinite().all()


def test_no_slice_of_a_test_scan_was_trained_on(shipped):
    _, _, info, record = shipped
    run = RESULTS / "scan_network" / f"{info.row}-seed{info.seed}"
    card = pd.read_csv(run / "data.csv")
    assert not card.apply(lambda column: column.astype(str).str.contains("corona")).to_numpy().any()
    by_source = card.groupby("source")["size"].sum().to_dict()
    assert by_source == record["trained_on"]["n_by_source"]
    assert info.slices["train"] == card["size"].sum()


def test_the_numbers_are_those_of_the_results(shipped):
    _, _, info, record = shipped
    metrics = pd.read_csv(RESULTS / "scan_test" / "metrics.csv")
    rows = metrics[metrics.seed == info.seed].set_index(["quantity", "metric"])["value"]
    measured = record["measured"]
    assert measured["lung_dice"] == pytest.approx(rows["lungs", "Dice"])
    assert measured["dice_in_lung"] == pytest.approx(rows["infection", "Dice in the lung"])
    assert measured["share_icc"] == pytest.approx(rows["infected share in the experts' lungs", "ICC(2,1)"])
    assert measured["ct_ss_mae"] == pytest.approx(rows["CT-SS", "mean absolute error"])
