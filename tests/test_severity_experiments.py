"""Validation of severity: what each change does, real slices against known answers, and notebooks with and without results."""
import ast
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from covidsev.core import LeakageError, read_json, repo_root, write_json, write_text
from covidsev.data import show
from covidsev.data.phantom import to_uint8
from covidsev.data.scans import turn_picture
from covidsev.data.sources import get_source
from covidsev.method.training import save_checkpoint
from covidsev.method.unets import build_network
from covidsev.paper import experiments, tables
from covidsev.paper import validation as va

FOLDER = repo_root() / "nbs" / "experiments"
TINY = (16, 64, 64)


def play(name: str, **given) -> dict:
    """Runs the code cells of a notebook with parameters; returns its globals."""
    cells = experiments.code_cells(FOLDER / f"{name}.ipynb")
    space = {**experiments.plain_literals(cells[0]["source"]), **given}
    for cell in cells[1:]:
        exec(compile(ast.parse(cell["source"]), name, "exec"), space)
    plt.close("all")
    return space


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Results of three studies, tiny and of phantoms."""
    root = tmp_path_factory.mktemp("results")
    for name, folder, sizes in (("severity_phantom", "severity_phantom", {"n": 5, "shape": list(TINY)}),
                                ("severity_masks", "severity_masks", {"n": 6, "size": 64}),
                                ("severity_ictcf", "severity_ictcf/brightness-seed0", {"n": 3, "shape": list(TINY)})):
        play(name, output=str(root / folder), **sizes)
    return root


@pytest.fixture(scope="module")
def cases(results) -> pd.DataFrame:
    return va.read_study(results, "severity_phantom", "cases")


def test_a_higher_floor_never_adds_and_takes_specks_back(cases):
    floors = ["0.0", "0.001", "0.005", "0.01", "0.02", "0.05"]
    for change in ("min_fraction", "min_fraction, specks"):
        table = cases[cases.change == change].pivot(index="case", columns="setting", values="ct_ss")
        assert (np.diff(table[floors].astype(int), axis=1) <= 0).all(), change
    first = cases[cases.case == cases.case.iloc[0]].set_index(["change", "setting"]).ct_ss
    assert first["min_fraction, specks", "0.0"] == 20 and first["min_fraction", "0.0"] == 0


def test_the_repair_never_costs_lung(cases):
    by = {name: table.set_index("case") for name, table in cases[cases.change == "lungs"].groupby("setting")}
    repaired, raw = by["classical lungs"], by["classical lungs, no repair"]
    assert (repaired.lung_dice.dropna() >= raw.lung_dice.dropna() - 1e-12).all()


def test_failed_lungs_keep_their_row_and_reason(monkeypatch, tmp_path):
    made, air = va.phantom_truth, np.full(TINY[::-1], -1000, np.float32)
    monkeypatch.setattr(va, "phantom_truth", lambda *given: made(*given)._replace(hu=air))
    cases = play("severity_phantom", n=5, shape=list(TINY), output=str(tmp_path))["cases"]
    here = cases[cases.change == "lungs"].groupby("setting")
    assert here.ct_ss.count().to_dict() == {name: 5 * (k < 2) for k, name in enumerate(va.LUNG_SOURCES)}
    assert here.get_group("classical lungs").problem.ne("").all()


def test_slices_without_data_give_empty_tables_that_can_be_written(tmp_path):
    slices, known, data = va.slices_of("covid19-ct-seg-slices", tmp_path, 0, 0, 0)
    assert (list(slices), known, data["kind"]) == ([], {}, "none") and "COVIDSEV_DATA" in data["missing"]
    space = play("severity_masks", dataset="covid19-ct-seg-slices", lesions="mosmed", data_root=str(tmp_path),
                 output=str(tmp_path / "out"))
    assert set(space["missing"].status) == {"not reproduced here"} and space["gaps"].empty
    for path in (tmp_path / "out").glob("*.csv"):
        assert len(pd.read_csv(path).columns) > 1, path.name
    shown = play("table6_severity", results=str(tmp_path), output=str(tmp_path / "table"))
    assert shown["scans"].iloc[0, 0] == shown["lesions"].iloc[0, 0] == "not reproduced here"


def trained_run(results: Path, **parameters) -> Path:
    """A run of an untrained network, as the runner leaves it; returns its file of weights."""
    folder = results / "train_single" / "x-seed0"
    made = {"model": "infnet", "backbone": "small", "size": 64, "start": "scratch", **parameters}
    write_json(folder / "run.json", {"parameters": made, "data": {"kind": "phantom"}})
    torch.manual_seed(0)
    save_checkpoint(folder / "last.pt", {"weights": build_network("infnet", "small").state_dict()})
    return folder / "last.pt"


@pytest.mark.parametrize("start", ["pseudo_labels/loop", "pseudo_labels/released", "pretext/infnet_coach_unlabelled",
                                   "pretext/infnet_pool"])
def test_networks_that_saw_the_pool_are_refused(tmp_path, start):
    weights = trained_run(tmp_path, start=start)
    with pytest.raises(LeakageError, match="has seen the 20 cases"):
        va.trained_segment(weights, tmp_path, "train_single/x-seed0")


def test_masks_of_a_trained_run(tmp_path, monkeypatch):
    from covidsev.paper import runs

    weights = trained_run(tmp_path)
    monkeypatch.setattr(runs, "checkpoint_of", lambda *_: weights)
    space = play("severity_predicted", network="train_single/x", n=3, size=64, results=str(tmp_path),
                 output=str(tmp_path / "severity_predicted" / "x-seed0"))
    assert len(space["per_slice"]) == 3 and space["per_slice"].dice.between(0, 1).all()
    assert set(space["metrics"].comparison) >= {"infection: predicted against drawn", "infection: automatic"}
    assert space["record"]["data"]["network"] == "train_single/x-seed0"


def test_rows_of_the_registry_have_not_seen_the_pool():
    registry = experiments.load_registry()
    for study in ("severity_predicted", "severity_ictcf"):
        for row in registry.experiments[study].rows.values():
            experiment, _, trained = row["parameters"]["network"].partition("/")
            if experiment:
                va.check_independent(registry.experiments[experiment].rows[trained]["parameters"])
        assert study not in registry.profiles["cpu"].rows  # they need unpublished weights


def ictcf_tree(root: Path) -> Path:
    """Two patients of iCTCF as JPGs, top first, and the table of four; one of them with a second, shorter series."""
    pictures = {root / "Patient 1/second/IMG-0001-00001.jpg": np.zeros((64, 64), np.uint8)}
    for k in range(2):
        volume = to_uint8(va.phantom_truth(k, 3, TINY).hu)
        pictures |= {root / f"Patient {k + 1}/CT/IMG-0001-{n + 1:05d}.jpg": turn_picture(volume[..., -1 - n])
                     for n in range(volume.shape[2])}
    for path, picture in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(picture)).save(path, quality=95)
    (root / "patients.csv").write_text("Patient,Morbidity\nPatient 1,Mild\nPatient 2,Severe\n")
    return root


def test_ictcf_trees_of_users_are_found_and_scored(tmp_path):
    """Patient N/CT/*.jpg with the table of patients; mild is left out and never a class."""
    ictcf_tree(tmp_path / "ictcf")
    assert len(list(get_source("ictcf").find(tmp_path))) == 3
    space = play("severity_ictcf", dataset="ictcf", data_root=str(tmp_path), output=str(tmp_path / "out"))
    table = space["cases"].set_index("case")
    assert space["data"] == {"kind": "real", "name": "ictcf", "patients": 2, "missing": ""}
    assert table.loc["Patient 1", "problem"] == "excluded: mild" and pd.isna(table.loc["Patient 1", "class"])
    assert table.loc["Patient 2", "class"] == "Severe" and table.loc["Patient 2", "slices"] == 16
    assert table.loc["Patient 2", "po"] == pytest.approx(va.phantom_truth(1, 3, TINY).extent, abs=0.15)  # brightness is no method


@pytest.mark.parametrize("name", ["table6_severity", "figure_severity"])
def test_render_with_everything_and_with_nothing(name, results, tmp_path, monkeypatch):
    # the library notebook draws each figure, full and empty; here only what is put into which file matters
    monkeypatch.setattr(show, "captioned", lambda fig, text: fig)
    monkeypatch.setattr(tables, "save_figure", lambda fig, stem: [write_text(f"{stem}.{end}", "") for end in ("svg", "png")])
    small, files = {"shape": list(TINY)} if name == "figure_severity" else {}, []
    for kind, given in (("phantom", results), ("none", tmp_path / "no results")):
        play(name, results=str(given), output=str(tmp_path / kind), **small)
        files.append({path.relative_to(tmp_path / kind).as_posix() for path in (tmp_path / kind).rglob("*.*")})
        assert read_json(tmp_path / kind / "run.json")["data"]["kind"] == kind
    # a table says what was not run; a figure of which nothing was run is not written
    assert set(experiments.load_registry().experiments[name].outputs) <= files[1] <= files[0]
    assert (files[0] == files[1]) == (name == "table6_severity")


def test_the_table_prints_reasons_and_the_published_point(results, tmp_path):
    play("table6_severity", results=str(results), output=str(tmp_path))
    text = (tmp_path / "tables" / "table6_severity.md").read_text(encoding="utf-8")
    assert "None: one class only" in text or "None: too few" in text
    assert "0.833 [0.608, 0.942]" in text and "not reproduced here" in text and "--only severity_ictcf" in text


def test_real_slices_give_the_ratios_that_others_counted(data_root, monkeypatch, tmp_path):
    if not (data_root / "covid19-ct-seg-slices").is_dir():
        pytest.skip("needs the 20-case slices in the data folder")
    _, known, card = va.slices_of("covid19-ct-seg-slices", data_root, 0, 0, 0)
    chosen = list(va.real_slices(data_root, "covid19-ct-seg-slices", ("radiopaedia_7_85703_0", "radiopaedia_29_86490_1")))
    with_picture = max((one for one in chosen if one.image is not None), key=lambda one: (one.lungs > 0).sum())
    slices = [one._replace(image=None) for one in chosen if one is not with_picture] + [with_picture]
    monkeypatch.setattr(va, "slices_of", lambda *_: (slices, known, card))
    space = play("severity_masks", lesions="", output=str(tmp_path))
    assert len(space["per_slice"]) == 30 and space["gaps"].max() < 5.1e-5
    found = space["lungs"].set_index("lungs").lung_dice
    assert found["expert"] == 1 and found["classical"] > 0.9


def test_real_lesions_are_all_of_one_class(data_root, monkeypatch, tmp_path):
    if not (data_root / "mosmed").is_dir():
        pytest.skip("needs the MosMed masks in the data folder")
    space = play("severity_masks", n=3, size=64, output=str(tmp_path))
    samples = [sample for sample in get_source("mosmed").find(data_root) if "infection" in sample.masks][:2]
    rows = pd.DataFrame(map(space["lesion_row"], samples))
    assert set(rows["class"]) == {"CT-1"} and (rows.largest_ml <= rows.lesion_ml).all()
