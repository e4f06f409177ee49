"""The one command, end to end on a tiny phantom: everything is made, the second time nothing is, and equal runs write equal bytes."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from covidsev.core import read_json, repo_root
from covidsev.paper import experiments, runner
from covidsev.paper.experiments import load_registry
from covidsev.paper.claims import check_sums
from covidsev.paper.runner import Places

TINY = {"epochs": 2, "size": 32, "n_train": 4, "n_test": 4, "warmup_epochs": 0}
FILES = ("metrics.csv", "per_image.csv", "history.csv")


SHOWN = ("table1_test_loss", "table2_dice", "figure_qualitative")


def run(root, **options):
    """`reproduce` of two rows with one seed and what shows them, below `root`; returns the plan and what was printed."""
    lines = []
    options = {"only": ["train_single", *SHOWN], "rows": ["sinfnet", "unet"], "seeds": [0], "overrides": TINY, "echo": lines.append, **options}
    return runner.reproduce("smoke", root=root, **options), "\n".join(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything of the smoke profile, tiny, made once for all tests of this file."""
    root = tmp_path_factory.mktemp("made")
    _, text = run(root, jobs=2)
    return root, text


def test_everything_is_made(made):
    root, text = made
    assert "] 5/5" in text and "FAILED" not in text
    for row in ("sinfnet", "unet"):
        folder = root / "results/smoke/train_single" / f"{row}-seed0"
        assert {*FILES, "run.json", "timing.json", "executed.ipynb"} <= {path.name for path in folder.iterdir()}
        assert set(pd.read_csv(folder / "metrics.csv").columns) == {"subset", "metric", "value", "n"}
    for name in ("table1_test_loss", "table2_dice"):
        assert {path.suffix for path in (root / "results/smoke/tables").glob(f"{name}.*")} == {".csv", ".md", ".tex"}
    assert {path.name for path in (root / "figures/smoke").iterdir()} == {"qualitative.svg", "qualitative.png"}
    assert not list(root.rglob("*.failed.ipynb")) and not list(root.rglob("*.partial"))
    assert {path.name for path in (root / "checkpoints/smoke/train_single/unet-seed0").rglob("*.pt")} == {"last.pt"}


def test_run_record_says_what_was_done(made):
    record = read_json(made[0] / "results/smoke/train_single/sinfnet-seed0/run.json")
    assert {name: record["parameters"][name] for name in TINY} == TINY
    assert record["data"]["kind"] == "phantom" and record["data"]["splits"]["test"]["n"] == 4
    assert record["environment"]["packages"]["torch"] and record["init"] == "scratch"
    assert set(record["cache"]) == {"parameters", "notebook", "code", "data", "needs"}
    assert "train_step" in record["cache"]["code"] and "caption" not in record["cache"]["code"]
    text = (made[0] / "results/smoke/train_single/sinfnet-seed0/run.json").read_text()
    assert str(made[0]) not in text and os.uname().nodename not in text and str(Path.home()) + "/" not in text


def test_tables_show_what_was_run_and_what_was_not(made):
    table = pd.read_csv(made[0] / "results/smoke/tables/table2_dice.csv")
    here = table[table.subset == "test"].set_index("row")
    metrics = pd.read_csv(made[0] / "results/smoke/train_single/unet-seed0/metrics.csv").set_index(["subset", "metric"])["value"]
    assert here.loc["unet", "dice"] == pytest.approx(metrics["test", "dice"], nan_ok=True)
    assert here.loc["unet", "seeds"] == 1 and here.loc["sinfnet_aug_0.4", "seeds"] == 0
    assert pd.isna(here.loc["sinfnet_aug_0.4", "dice"])
    text = (made[0] / "results/smoke/tables/table2_dice.md").read_text(encoding="utf-8")
    assert "phantom · smoke · seed 0 · n = 4" in text and "not run" in text and "not tested" in text
    assert "| supported |" not in text  # a phantom proves nothing


def test_second_time_nothing_runs(made):
    before = {path: path.stat().st_mtime_ns for path in made[0].rglob("*") if path.is_file() and path.name != "manifest.json"}
    plan, text = run(made[0])
    assert [each.reasons for each in plan] == [[]] * len(plan) and text.count("cached") == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_explain_names_the_changed_parameter_and_runs_nothing(made):
    plan, text = run(made[0], explain=True, overrides={**TINY, "epochs": 3})
    assert "parameter epochs: 2 -> 3" in text
    assert all(each.reasons for each in plan)  # the tables need the runs
    assert pd.read_csv(made[0] / "results/smoke/train_single/unet-seed0/history.csv").shape[0] == 2


@pytest.mark.parametrize("name, words, computed", [("structure_loss", "code: structure_loss changed", True), ("caption", "cached", False)])
def test_explain_names_changed_library_code_but_not_changed_drawing(made, monkeypatch, name, words, computed):
    whole = experiments.source_key

    def edited(source, without=()):
        found = whole(source, without)
        return {**found, name: "0" * 16} if name in found else found

    monkeypatch.setattr(experiments, "source_key", edited)
    plan, text = run(made[0], explain=True)
    assert words in text and [bool(each.reasons) for each in plan if each.run.kind == "compute"] == [computed, computed]
    assert all(each.reasons for each in plan if each.run.kind == "render")


def test_explain_names_the_edited_notebook(made, monkeypatch):
    whole = experiments.notebook_key
    monkeypatch.setattr(experiments, "notebook_key", lambda path: "0" * 64 if Path(path).stem == "train_single" else whole(path))
    assert "notebook train_single.ipynb changed" in run(made[0], explain=True)[1]


def test_changed_output_is_made_again_from_the_rest(made):
    table = made[0] / "results/smoke/tables/table1_test_loss.csv"
    good = table.read_bytes()
    table.write_text("edited by hand")
    assert [(each.path, each.status) for each in check_sums(Places(made[0]), "smoke") if each.status != "exact"] == [
        ("results/smoke/tables/table1_test_loss.csv", "differs")]
    plan, text = run(made[0])
    assert [each.run.name for each in plan if each.reasons] == ["table1_test_loss"]
    assert "was changed after the run" in text and table.read_bytes() == good
    assert {each.status for each in check_sums(Places(made[0]), "smoke")} == {"exact"}


def test_manifest_lists_every_result_file(made):
    files = {entry["path"] for entry in read_json(made[0] / "results/smoke/manifest.json")["files"]}
    there = {path.relative_to(made[0]).as_posix() for folder in ("results", "figures") for path in (made[0] / folder).rglob("*")
             if path.is_file() and path.name not in ("manifest.json", "timing.json", "executed.ipynb", ".lock")}
    assert files == there


# sockets that leave this machine are refused, as on a machine without a network
OFFLINE = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(101, "Network is unreachable")
    return connect(self, address)
socket.socket.connect = refuse
"""


def test_another_process_place_locale_and_hash_seed_write_the_same_bytes_offline(made, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(OFFLINE)
    (tmp_path / "elsewhere ü").mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Pacific/Auckland", "LC_ALL": "C.UTF-8", "COVIDSEV_QUIET": "1",
                   "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(repo_root())])}
    command = [sys.executable, "-c", "from covidsev.cli import main; main()", "reproduce", "--only", "train_single", "--row", "unet",
               "--seed", "0", "--out", str(tmp_path / "elsewhere ü")]
    pairs = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    subprocess.run([*command, *pairs], check=True, cwd=repo_root() / "nbs", env=environment, stdout=subprocess.DEVNULL)
    one, other = (root / "results/smoke/train_single/unet-seed0" for root in (made[0], tmp_path / "elsewhere ü"))
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    records = [{**read_json(folder / "run.json"), "commit": ""} for folder in (one, other)]  # someone may commit meanwhile
    assert records[0] == records[1]


def test_real_data_run_end_to_end_writes_no_picture(data_root, tmp_path):
    """Two epochs on the real slices: numbers come out, the maps stay in checkpoints/, no picture reaches figures/."""
    runner.reproduce("cpu", ["train_single", "figure_qualitative"], ["unet"], [0], allow_dirty=True, root=tmp_path, data=data_root, echo=lambda line: None,
                          overrides={"epochs": 1, "size": 64, "warmup_epochs": 0, "n_train": 8, "n_test": 6})
    folder = tmp_path / "results/cpu/train_single/unet-seed0"
    record = read_json(folder / "run.json")
    assert record["data"]["kind"] == "real" and set(record["cache"]["data"]) == {"train", "test"}
    assert (tmp_path / "checkpoints/cpu/local/maps/unet-seed0.npz").is_file()
    assert (tmp_path / "checkpoints/cpu/local/qualitative.png").is_file()
    assert not list((tmp_path / "results").rglob("*.png")) and not (tmp_path / "figures").exists()


def test_registry_rows_are_a_few_lines_each():
    text = (load_registry().folder / "experiments.toml").read_text(encoding="utf-8")
    for block in text.split("[experiments.train_single.rows.")[1:]:
        assert len([line for line in block.split("\n[")[0].splitlines()[1:] if line and not line.startswith("#")]) <= 4
