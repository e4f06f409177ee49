"""Validation of severity: what each change does, real slices against known answers, and notebooks with and without results."""
import ast
import json
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from covidsev.paper import experiments
from covidsev.data import show as figures
from covidsev.paper import severity_figures as sf
from covidsev.paper import validation as va
from covidsev.core import LeakageError, repo_root
from covidsev.method.metrics import dsc
from covidsev.core import write_text
from covidsev.severity.score import MIN_FRACTIONS

FOLDER = repo_root() / "nbs" / "experiments"
COMPUTE = ("severity_phantom", "severity_masks", "severity_predicted", "severity_ictcf")
RENDER = ("table6_severity", "figure_severity")
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
def study() -> tuple[pd.DataFrame, pd.DataFrame]:
    return va.phantom_study(5, TINY)


@pytest.fixture(scope="module")
def results(study, tmp_path_factory) -> Path:
    """Results of the four studies, tiny and of phantoms."""
    root = tmp_path_factory.mktemp("results")
    cases, regions = study
    va.save_study(root / "severity_phantom", {"n": 5, "shape": list(TINY), "study_seed": 0}, {"kind": "phantom"},
                  {"cases": cases, "regions": regions, "metrics": va.phantom_metrics(cases, regions)})
    play("severity_masks", n=6, size=64, output=str(root / "severity_masks"))
    play("severity_ictcf", n=3, shape=list(TINY), output=str(root / "severity_ictcf" / "brightness-seed0"))
    return root


def test_a_higher_floor_and_a_higher_threshold_never_add(study):
    cases, _ = study
    for change in ("min_fraction", "min_fraction, specks"):
        table = cases[cases.change == change].pivot(index="case", columns="setting", values="ct_ss")
        assert (np.diff(table[list(map(str, MIN_FRACTIONS))].astype(int), axis=1) <= 0).all(), change
    shares = cases[cases.change == "threshold"].pivot(index="case", columns="setting", values="po")
    assert (np.diff(shares[list(map(str, va.THRESHOLDS))].astype(float), axis=1) <= 0).all()


def test_specks_make_twenty_and_the_floor_takes_them_back(study):
    cases, _ = study
    healthy = cases[(cases.case == cases.case.iloc[0]) & cases.change.str.startswith("min_fraction")].set_index(["change", "setting"])
    assert healthy.loc[("min_fraction, specks", "0.0"), "ct_ss"] == 20
    assert healthy.loc[("min_fraction", "0.0"), "ct_ss"] == 0


def test_what_is_not_changed_stays_true(study):
    cases, regions = study
    by = {name: table.set_index("case") for name, table in cases[cases.change == "lungs"].groupby("setting")}
    assert by["given lungs"].po.tolist() == by["lobe mask"].po.tolist()
    sums = regions.groupby("case", sort=False).score_lobes.sum()
    assert sums.astype(int).to_dict() == by["lobe mask"].ct_ss.astype(int).to_dict()
    repaired, raw = by["classical lungs"], by["classical lungs, no repair"]
    assert (repaired.lung_dice.dropna() >= raw.lung_dice.dropna() - 1e-12).all()


def test_the_probability_map_crosses_one_half_at_the_border():
    truth = np.zeros((40, 40), bool)
    truth[10:25, 8:30] = True
    plain = va.probability_map(truth, np.random.default_rng(0), noise=0)
    assert ((plain >= 0.5) == truth).all() and plain[17, 18] > plain[10, 8] > 0.5 > plain[9, 8]
    assert 0.6 < dsc(va.probability_map(truth, np.random.default_rng(0), noise=2.0) >= 0.5, truth) < 1


def test_failed_lungs_keep_their_row_and_reason(monkeypatch):
    truth = va.phantom_truth(2, 5, TINY)
    nothing = va.Truth(truth.case_id, truth.extent, np.full_like(truth.hu, -1000), truth.lungs, truth.lobes, truth.infection, truth.spacing_mm)
    rows = {row["setting"]: row for row in va.lung_rows(nothing)}
    assert set(rows) == set(va.LUNG_SOURCES) and rows["lobe mask"]["ct_ss"] is not None
    assert rows["classical lungs"]["ct_ss"] is None and rows["classical lungs"]["problem"]


def test_slices_without_data_give_empty_tables_that_can_be_written(tmp_path):
    slices, known, data = va.slices_of("covid19-ct-seg-slices", tmp_path, 0, 0, 0)
    assert (list(slices), known, data["kind"]) == ([], {}, "none") and "COVIDSEV_DATA" in data["missing"]
    space = play("severity_masks", dataset="covid19-ct-seg-slices", lesions="mosmed", data_root=str(tmp_path), output=str(tmp_path / "out"))
    assert set(space["missing"].status) == {"not reproduced here"} and space["worst"] is None
    for path in (tmp_path / "out").glob("*.csv"):
        assert len(pd.read_csv(path).columns) > 1, path.name
    shown = play("table6_severity", results=str(tmp_path), output=str(tmp_path / "table"))
    assert shown["scans"].iloc[0, 0] == shown["lesions"].iloc[0, 0] == "not reproduced here"


def test_networks_that_saw_the_pool_are_refused(tmp_path):
    for start in ("pseudo_labels/loop", "pseudo_labels/released", "pretext/infnet_coach_unlabelled"):
        with pytest.raises(LeakageError, match="has seen the 20 cases"):
            va.check_independent({"start": start})
    folder = tmp_path / "train_single" / "x-seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"parameters": {"start": "pseudo_labels/loop"}}))
    (folder / "best.pt").write_bytes(b"x")
    with pytest.raises(LeakageError):
        va.trained_segment(folder / "best.pt", tmp_path, "train_single/x-seed0")


def test_rows_of_the_registry_have_not_seen_the_pool():
    registry = experiments.load_registry()
    for study in ("severity_predicted", "severity_ictcf"):
        for row in registry.experiments[study].rows.values():
            experiment, _, trained = row["parameters"]["network"].partition("/")
            if experiment:
                va.check_independent(registry.experiments[experiment].rows[trained]["parameters"])
    assert not {"severity_predicted", "severity_ictcf"} & set(registry.profiles["cpu"].rows)  # they need unpublished weights


def test_labels_of_ictcf_and_what_is_left_out(tmp_path):
    patients = va.write_phantom_patients(tmp_path, 3, TINY)
    table = va.class_study([*patients, ("a", "Mild", []), ("b", "Control (Community-acquired pneumonia)", []),
                            ("c", "Suspected", []), ("d", None, []), ("e", "Critical", [])], va.bright_segment())
    assert table["class"].tolist()[:3] == list(va.CLASSES) and table["class"].isna().tolist()[3:7] == [True] * 4
    assert table.problem.tolist()[3:7] == ["excluded: Mild", "excluded: Control (Community-acquired pneumonia)",
                                           "excluded: Suspected", "excluded: no label"]
    assert table.problem.iloc[7].startswith("the slices of a patient need one size")  # a class, but no slices
    assert set(va.class_metrics(table)["value"].isna()) == {True, False} or va.class_metrics(table)["value"].isna().all()


def test_ictcf_trees_of_users_are_found_and_read(tmp_path):
    """Patient N/CT/*.jpg with the table of patients; of two series the one with most slices is taken."""
    root = tmp_path / "ictcf"
    va.write_phantom_patients(root, 3, TINY)
    (root / "Patient 1" / "second").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "Patient 1" / "second" / "IMG-0001-00001.jpg")
    (root / "patients.csv").write_text("Patient,Morbidity\nPatient 1,Regular\nPatient 2,Severe\nPatient 3,Mild\n")
    patients, data = va.patients_of("ictcf", tmp_path, 0, (), 0)
    assert data == {"kind": "real", "name": "ictcf", "patients": 3}
    assert [(name, label, len(paths)) for name, label, paths in patients] == [
        ("Patient 1", "regular", 16), ("Patient 2", "severe", 16), ("Patient 3", "mild", 16)]
    assert va.not_reproduced(tmp_path).set_index("question").status.iloc[0] == "data are here: run the command"
    table = va.class_study(patients, va.bright_segment())
    assert table["po"].notna().tolist() == [True, True, False]
    truth = va.phantom_truth(1, 3, TINY)
    assert table["po"].iloc[1] == pytest.approx(truth.extent, abs=0.15)  # brightness is no method, but no other patient


def test_pictures_stack_with_the_top_slice_last(tmp_path):
    (_, _, paths), = va.write_phantom_patients(tmp_path, 1, TINY)
    truth = va.phantom_truth(0, 1, TINY)
    volume = va.stack_pictures(paths)
    assert volume.shape == truth.hu.shape
    assert np.abs(volume.astype(int) - va.to_uint8(truth.hu)).mean() < 3  # JPEG
    assert [path.name for path in paths] == sorted(path.name for path in paths)


@pytest.mark.parametrize("name", [*COMPUTE, *RENDER])
def test_notebooks_have_their_shape(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 60
    assert all(len("".join(cell["source"]).strip().splitlines()) <= 12 or "parameters" in cell["metadata"].get("tags", [])
               for cell in cells if cell["cell_type"] == "code"), name
    assert not any(cell.get("outputs") for cell in cells)
    assert experiments.lint_notebook(FOLDER / f"{name}.ipynb") == []


@pytest.mark.parametrize("name", RENDER)
def test_render_with_everything_and_with_nothing(name, results, tmp_path, monkeypatch):
    # the library notebook draws each figure, full and empty; here only what is put into which file matters
    monkeypatch.setattr(sf, "captioned", lambda fig, text: fig)
    monkeypatch.setattr(figures, "save_figure", lambda fig, stem: [write_text(f"{stem}.{end}", "") for end in ("svg", "png")])
    whole, empty = tmp_path / "whole", tmp_path / "empty"
    small = {"shape": list(TINY)} if name == "figure_severity" else {}
    play(name, results=str(results), output=str(whole), **small)
    play(name, results=str(tmp_path / "no results"), output=str(empty), **small)
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert files == {path.relative_to(empty).as_posix() for path in empty.rglob("*") if path.is_file()}
    assert set(experiments.load_registry().experiments[name].outputs) <= files
    record = json.loads((whole / "run.json").read_text())
    assert record["data"]["kind"] == "phantom" and json.loads((empty / "run.json").read_text())["data"]["kind"] == "none"


def test_the_table_prints_reasons_and_the_published_point(results, tmp_path):
    play("table6_severity", results=str(results), output=str(tmp_path))
    text = (tmp_path / "tables" / "table6_severity.md").read_text(encoding="utf-8")
    assert "None: one class only" in text or "None: too few" in text
    assert "0.833 [0.608, 0.942]" in text and "not reproduced here" in text and "--only severity_ictcf" in text


def test_the_worst_are_chosen_by_rank(study):
    cases, _ = study
    here = cases[cases.change == "lungs"].pivot(index="case", columns="setting", values="po").astype(float)
    gap = (here["classical lungs"] - here["lobe mask"]).abs().fillna(np.inf)
    assert gap[sf.worst_cases(cases, n=2)].tolist() == sorted(gap, reverse=True)[:2]


def test_real_slices_give_the_ratios_that_others_counted(data_root):
    if not (data_root / "covid19-ct-seg-slices").is_dir():
        pytest.skip("needs the 20-case slices in the data folder")
    wanted = list(va.real_slices(data_root, scans=("radiopaedia_7_85703_0", "radiopaedia_29_86490_1")))
    slices, lungs = va.slice_study([one._replace(image=None) for one in wanted])
    table = va.scan_table(slices, va.known_ratios(data_root))
    assert len(slices) == 30 and va.largest_gap(table) < 5.1e-5 and len(lungs) == 0
    one = max((one for one in wanted if one.image is not None), key=lambda one: (one.lungs > 0).sum())
    found = {row["lungs"]: row["lung_dice"] for row in va.expert_lung_rows(one)}
    assert found["expert"] == 1 and found["classical"] > 0.9
    assert {1, 2} == set(np.unique(one.lungs)) - {0}


def test_real_lesions_are_all_of_one_class(data_root):
    if not (data_root / "mosmed").is_dir():
        pytest.skip("needs the MosMed masks in the data folder")
    samples = [sample for sample in islice(va.get_source("mosmed").find(data_root), 60) if "infection" in sample.masks][:2]
    rows = pd.DataFrame([va.lesion_row(sample) for sample in samples])
    assert set(rows["class"]) == {"CT-1"} and (rows.largest_ml <= rows.lesion_ml).all()
