"""From scans to folders of results: whole or absent, resumable, failures apart, nothing private in any file."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from covidsev.severity import cases
from covidsev.severity.cases import (MANIFEST, find_all, finished, prepare, process_case,
                                     process_cases)
from covidsev.severity.inputs import Options, check_options, list_cases
from covidsev.severity.reports import Shown
from covidsev.method.unets import build_network
from covidsev.core import (CheckpointError, ChecksumError, ConfigError, CovidSevError, GeometryError, MaskError,
                           RunLockedError)
from covidsev.method.inference import ModelInfo, save_model
from covidsev.severity.lungs import LungSegmentationError
from covidsev.data.phantom import phantom_volume, to_uint8
from covidsev.core import run_lock, sha256_file
from covidsev.data.scans import turn_picture

def ras(planes):
    return planes[:, ::-1, ::-1].transpose(2, 1, 0)


def save(path, array, spacing):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])).to_filename(path)
    return path


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Two patients as NIfTI files, with masks of infection, lungs and lobes, and a file of (untrained) weights."""
    folder = tmp_path_factory.mktemp("clinic")
    for seed, name in ((5, "anna"), (6, "ben")):
        patient = phantom_volume(seed, (14, 80, 80), ggo_fraction=0.2)
        spacing = patient.spacing_mm[::-1]
        save(folder / "scans" / f"{name}.nii.gz", ras(patient.hu).astype(np.int16), spacing)
        save(folder / "masks" / f"{name}.nii.gz", ras((patient.labels > 0).astype(np.uint8)), spacing)
        save(folder / "classes" / f"{name}_mask.nii.gz", ras(patient.labels), spacing)
        save(folder / "lungs" / f"{name}_lungs.nii.gz", ras(patient.lungs), spacing)
        save(folder / "lobes" / f"{name}.nii.gz", ras(patient.lobes), spacing)
    torch.manual_seed(0)
    info = ModelInfo("single", "infnet", 64, backbone="small", threshold=0.45, data_kind="phantom")
    save_model(folder / "single.safetensors", build_network("infnet", "small"), info)
    return folder


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Drawing takes most of the time of a small case; where pictures do not matter, there is a small one."""
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(cases, "_pictures", lambda *_: [Shown("slice", np.zeros((4, 4, 3), np.uint8))])


@pytest.fixture
def real_pictures():
    """Asked for by tests that want the real ones."""


@pytest.fixture
def given(clinic):
    return Options(infection=clinic / "masks", lungs=clinic / "lungs")


def tree(folder):
    """Every file below a folder, without the lock, with its hash."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", ".tables.json")}


def damage(clinic, tmp_path):
    """A copy of the scans in which one file is cut short."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for path in (clinic / "scans").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[:len(content) // 2] if path.name.startswith("ben") else content)
    return folder


def test_a_folder_of_results(clinic, given, tmp_path):
    batch = process_cases(clinic / "scans", tmp_path / "out", given)
    assert (batch.exit_code, [row["case_id"] for row in batch.rows], batch.failures) == (0, ["anna", "ben"], [])
    names = {"severity.json", "lungs.nii.gz", "overlay.png", "report.html", MANIFEST}
    assert {path.name for path in (tmp_path / "out" / "anna").iterdir()} == names  # no infection: it was given
    result = json.loads((tmp_path / "out" / "anna" / "severity.json").read_text())
    assert result["schema"] == "covidsev.severity/1" and result["ct_ss"] == batch.rows[0]["ct_ss"] and result["ct_ss"] > 0
    assert result["lungs"]["source"] == "given" and result["model"] == {} and set(result["input"]["masks"]) == {"infection", "lungs"}
    assert result["run_id"] == batch.run_id == json.loads((tmp_path / "out" / "anna" / MANIFEST).read_text())["run_id"]
    for name, kept in result["files"].items():
        assert (tmp_path / "out" / "anna" / kept).is_file(), name
    lines = (tmp_path / "out" / "severity.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("schema,case_id") and lines[1].split(",")[1] == "anna"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "anna/report.html" in page and not (tmp_path / "out" / "failures.csv").exists()


def test_two_runs_write_the_same_bytes(clinic, given, tmp_path):
    """Row 69: also from another place, into another place."""
    first, second = tmp_path / "a", tmp_path / "deep" / "b c é"
    process_cases(clinic / "scans", first, given)
    process_cases(clinic / "scans", second, given)
    assert tree(first) == tree(second) and len(tree(first)) > 10
    everything = b"".join(path.read_bytes() for path in first.rglob("*") if path.suffix in {".json", ".csv", ".html"})
    for private in (str(tmp_path), str(clinic)):
        assert private.encode() not in everything


def test_resume_takes_over_what_is_whole(clinic, given, tmp_path):
    """Row 60: by manifest, key and hash of every file."""
    out, scans = tmp_path / "out", clinic / "scans"
    process_cases(scans, out, given)
    before = tree(out)
    assert process_cases(scans, out, given, resume=True).n_resumed == 2 and tree(out) == before
    for name in ("lungs.nii.gz", "severity.json"):
        path = out / "ben" / name
        path.write_bytes(path.read_bytes()[:-7])
        assert process_cases(scans, out, given, resume=True).n_resumed == 1 and tree(out) == before, name
        path.unlink()
        assert process_cases(scans, out, given, resume=True).n_resumed == 1 and tree(out) == before, name
    (out / "ben" / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="not a result of this library"):
        process_cases(scans, out, given, resume=True)
    for other in (replace(given, min_fraction=0.03), replace(given, lungs=None)):
        fresh = tmp_path / str(other.min_fraction)
        process_cases(scans / "anna.nii.gz", fresh, replace(given, infection=clinic / "masks" / "anna.nii.gz",
                                                            lungs=clinic / "lungs" / "anna_lungs.nii.gz"))
        changed = replace(other, infection=clinic / "masks" / "anna.nii.gz",
                          lungs=other.lungs and clinic / "lungs" / "anna_lungs.nii.gz")
        assert process_cases(scans / "anna.nii.gz", fresh, changed, resume=True).n_resumed == 0


def test_resume_notices_a_changed_input(clinic, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("scans", "masks"):
        (tmp_path / f"{name}.nii.gz").write_bytes((clinic / name / "anna.nii.gz").read_bytes())
    options = Options(infection=tmp_path / "masks.nii.gz")
    first = process_cases(tmp_path / "scans.nii.gz", out, options).rows[0]
    empty = np.zeros((80, 80, 14), np.uint8)
    save(tmp_path / "masks.nii.gz", empty, nibabel.load(tmp_path / "scans.nii.gz").header.get_zooms())
    again = process_cases(tmp_path / "scans.nii.gz", out, options, resume=True)
    assert again.n_resumed == 0 and first["ct_ss"] > 0 and again.rows[0]["ct_ss"] == 0


def test_an_empty_infection_mask_is_a_result(clinic, tmp_path):
    """Row 23."""
    header = nibabel.load(clinic / "scans" / "anna.nii.gz").header
    mask = save(tmp_path / "none.nii.gz", np.zeros((80, 80, 14), np.uint8), header.get_zooms())
    result = process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "out", Options(infection=mask))
    assert (result["ct_ss"], result["ct_ss_strict"], result["po"], result["severe"]) == (0, 0, 0.0, False)
    assert result["mosmed_class"] == 0 and result["not_computed"]["mean_hu"]


def test_one_bad_case_does_not_stop_the_others(clinic, given, tmp_path, capsys):
    scans, lines = damage(clinic, tmp_path), []
    batch = process_cases(scans, tmp_path / "out", given, echo=lines.append)
    assert batch.exit_code == 3 and [row["case_id"] for row in batch.rows] == ["anna"]
    assert [(one["case"], one["error"]) for one in batch.failures] == [("ben", "ReadError")]
    text = (tmp_path / "out" / "failures.csv").read_text()
    assert text.startswith("case,error,message\nben,ReadError,") and "truncated or corrupt" in text
    assert str(tmp_path) not in text and lines[1].startswith("ben: failed: ReadError: the file is truncated")
    assert not (tmp_path / "out" / "ben").exists() and "ben" in (tmp_path / "out" / "report.html").read_text()
    assert capsys.readouterr().err == ""


def test_an_old_result_never_shows_as_new(clinic, given, tmp_path):
    """Row 64."""
    out, scans = tmp_path / "out", tmp_path / "scans"
    process_cases(clinic / "scans", out, given)
    old = tree(out / "ben")
    batch = process_cases(damage(clinic, tmp_path), out, given)
    assert [one["case"] for one in batch.failures] == ["ben"]
    assert not (out / "ben").exists() and tree(out / "superseded" / "ben") == old
    assert "ben" not in (out / "severity.csv").read_text()
    (scans / "ben.nii.gz").write_bytes((clinic / "scans" / "ben.nii.gz").read_bytes())
    assert process_cases(scans, out, given, resume=True).n_resumed == 1 and tree(out / "ben") == old


def test_an_interrupted_run_leaves_the_tables_of_the_run_before(clinic, given, tmp_path, monkeypatch):
    """They say of which run they are; nothing half made is left."""
    out = tmp_path / "out"
    process_cases(clinic / "scans", out, given)
    before = tree(out)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "find_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process_cases(clinic / "scans", out, replace(given, min_fraction=0.02))
    assert tree(out) == before
    monkeypatch.undo()
    assert process_cases(clinic / "scans", out, given, resume=True).n_resumed == 2


MOMENTS = ["find_all", "write_mask", "case_html", "_seal"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_failure_at_any_moment_leaves_nothing(clinic, given, tmp_path, monkeypatch, moment):
    def broken(*_, **__):
        raise OSError(5, "Input/output error", str(tmp_path / "secret"))

    out = tmp_path / "out"
    monkeypatch.setattr(cases, moment, broken)
    batch = process_cases(clinic / "scans", out, given)
    assert [one["message"] for one in batch.failures] == ["Input/output error"] * 2
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".tables.json", "failures.csv", "report.html", "severity.csv"]


@pytest.mark.parametrize("moment", [*MOMENTS, "csv_text"])
def test_a_full_disk_stops_the_batch_and_keeps_everything(clinic, given, tmp_path, monkeypatch, moment):
    """It is no fault of the case: no row of failures, nothing superseded, the tables as they were."""
    out, calls, real = tmp_path / "out", [], getattr(cases, moment)
    process_cases(clinic / "scans", out, given)
    before = tree(out)

    def full(*given, **more):
        calls.append(1)
        if len(calls) > 1 or moment == "csv_text":
            raise OSError(28, "No space left on device")
        return real(*given, **more)

    monkeypatch.setattr(cases, moment, full)
    changed = replace(given, min_fraction=0.02)
    with pytest.raises(CovidSevError, match="(?s)the run stops here; what is finished stays.*No space left.*--resume"):
        process_cases(clinic / "scans", out, changed)
    monkeypatch.undo()
    kept = tree(out)
    assert {name: kept[name] for name in before if "/" not in name} == {name: before[name] for name in before if "/" not in name}
    assert not (out / "superseded").exists() and not (out / "failures.csv").exists()
    assert {name: kept[name] for name in before if name.startswith("ben/")} == {
        name: before[name] for name in before if name.startswith("ben/")} or moment == "csv_text"
    resumed = process_cases(clinic / "scans", out, changed, resume=True)
    assert resumed.failures == [] and resumed.n_resumed == (2 if moment == "csv_text" else 1)


@pytest.mark.parametrize("name", ["report.html", "failures.csv", "severity.csv"])
def test_files_of_the_user_are_not_touched(clinic, given, tmp_path, name):
    """Also a table of ours that somebody has edited, a folder that looks half made, and a file in a case folder."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"(?s)so it stays.*{name}.*-o OUT"):
        process_cases(clinic / "scans", out, given)
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == [name] and (out / name).read_text() == "mine"
    (out / name).unlink()
    (out / ".x.part").mkdir()
    (out / ".x.part" / "mine").write_text("mine")
    process_cases(clinic / "scans", out, given)
    (out / "anna" / "note.txt").write_text("mine")
    process_cases(clinic / "scans", out, given)
    assert (out / ".x.part" / "mine").read_text() == (out / "superseded" / "anna" / "note.txt").read_text() == "mine"
    if (out / name).is_file():
        (out / name).write_text((out / name).read_text() + "mine")
        with pytest.raises(ConfigError, match="so it stays"):
            process_cases(clinic / "scans", out, given)


def test_a_manifest_that_is_none_is_not_ours(clinic, given, tmp_path):
    for k, content in enumerate(("[" * 100_000, "[]", '{"files": 3, "key": 1, "run_id": 2}', "{")):
        folder = tmp_path / str(k) / "anna"
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text(content)
        assert not finished(folder, {})
        with pytest.raises(ConfigError, match="so it stays"):
            process_cases(clinic / "scans", tmp_path / str(k), given)
        assert (folder / MANIFEST).read_text() == content


def test_nobody_takes_the_place_of_another(clinic, tmp_path):
    """The scans of two people under one name: the first result is put aside and not lost."""
    results = []
    for name in ("anna", "ben"):
        scan = tmp_path / name / "scan.nii.gz"
        scan.parent.mkdir()
        scan.write_bytes((clinic / "scans" / f"{name}.nii.gz").read_bytes())
        results.append(process_case(scan, tmp_path / "out", Options(infection=clinic / "masks" / f"{name}.nii.gz")))
    kept = json.loads((tmp_path / "out" / "superseded" / "scan" / "severity.json").read_text())
    assert kept["input"]["sha256"] == results[0]["input"]["sha256"] != results[1]["input"]["sha256"]


def test_a_bug_is_isolated_and_shown(clinic, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "score_scan", lambda *_, **__: 1 / 0)
    batch = process_cases(clinic / "scans", tmp_path, given)
    assert {one["error"] for one in batch.failures} == {"ZeroDivisionError"} and "Traceback" in capsys.readouterr().err


_CHILD = """
import sys
from covidsev.severity import cases
from covidsev.severity.cases import Options, process_cases
cases._pictures = lambda *_: []
cases.contact_sheet = lambda _: cases.np.zeros((4, 4, 3), "uint8")
process_cases(sys.argv[1], sys.argv[2], Options(infection=sys.argv[3], lungs=sys.argv[4]), resume=True)
"""


def start(clinic, out):
    return subprocess.Popen([sys.executable, "-c", _CHILD, clinic / "scans", out, clinic / "masks", clinic / "lungs"],
                            stderr=subprocess.PIPE, text=True)


def test_kill_and_resume(clinic, given, tmp_path):
    """Rows 60 and 61: SIGKILL while a case is written; the rerun gives what one run would have given."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    process_cases(clinic / "scans", whole, given)
    process, deadline = start(clinic, out), time.monotonic() + 100
    while not list(out.glob(".*.partial/lungs.nii.gz")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "severity.csv").exists()
    for case in ("anna", "ben"):  # a folder with its own name is whole
        if (out / case).exists():
            manifest = json.loads((out / case / MANIFEST).read_text())
            assert {name: sha256_file(out / case / name) for name in manifest["files"]} == manifest["files"]
    (out / ".ben.partial").mkdir(exist_ok=True)  # what a kill may leave at any time
    (out / ".ben.partial" / "lungs.nii.gz").write_bytes(b"half")
    batch = process_cases(clinic / "scans", out, given, resume=True)  # the lock of a killed process is free
    assert batch.exit_code == 0 and tree(out) == tree(whole)


def test_two_runs_on_one_folder(clinic, given, tmp_path):
    """Row 61."""
    with run_lock(tmp_path / "out"):
        before = tree(tmp_path)
        with pytest.raises(RunLockedError, match=r"(?s)another run is writing here.*process \d+ on"):
            process_cases(clinic / "scans", tmp_path / "out", given)
        assert tree(tmp_path) == before


def test_lungs_of_an_earlier_run_can_be_given(clinic, tmp_path):
    """The slow part is not computed twice: its mask is a file."""
    scan, mask = clinic / "scans" / "anna.nii.gz", clinic / "masks" / "anna.nii.gz"
    first = process_case(scan, tmp_path / "a", Options(infection=mask))
    again = process_case(scan, tmp_path / "b", Options(infection=mask, lungs=tmp_path / "a" / "anna" / "lungs.nii.gz"))
    assert again["regions"] == first["regions"] and again["lungs"]["source"] == "given"


def test_prediction_writes_the_mask(clinic, tmp_path):
    options = Options(weights=clinic / "single.safetensors", phantom=True)
    result = process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "a", options)
    assert result["model"]["sha256"] == sha256_file(options.weights) and result["model"]["threshold"] == 0.45
    mask = nibabel.load(tmp_path / "a" / "anna" / "infection.nii.gz")
    source = nibabel.load(clinic / "scans" / "anna.nii.gz")
    assert mask.shape == source.shape and np.allclose(mask.affine, source.affine) and mask.get_data_dtype() == np.uint8
    again = process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "b",
                         Options(infection=tmp_path / "a" / "anna" / "infection.nii.gz"))
    assert (again["ct_ss"], again["po"]) == (result["ct_ss"], result["po"])  # what was predicted can be given
    only = process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "c", replace(options, task="segment"))
    assert only["n_infected"] == np.count_nonzero(mask.get_fdata()) and only["lesion_ml"] > 0
    assert {path.name for path in (tmp_path / "c" / "anna").iterdir()} == {"segment.json", "infection.nii.gz",
                                                                          "overlay.png", MANIFEST}


def test_weights_are_part_of_the_key(clinic, tmp_path):
    scan, out = clinic / "scans" / "anna.nii.gz", tmp_path / "out"
    options = Options(task="segment", weights=clinic / "single.safetensors", phantom=True)
    process_cases(scan, out, options)
    torch.manual_seed(9)
    info = ModelInfo("single", "infnet", 64, backbone="small", threshold=0.45, data_kind="phantom")
    other = save_model(tmp_path / "other.safetensors", build_network("infnet", "small"), info)
    assert process_cases(scan, out, options, resume=True).n_resumed == 1
    assert process_cases(scan, out, replace(options, weights=other), resume=True).n_resumed == 0


def test_never_without_weights_or_mask(clinic, tmp_path):
    for task in ("severity", "segment"):
        with pytest.raises(ConfigError, match="(?s)prediction needs trained weights.*--weights FILE"):
            process_cases(clinic / "scans", tmp_path / "out", Options(task=task))
    with pytest.raises(CheckpointError):
        process_cases(clinic / "scans", tmp_path / "out", Options(weights=clinic / "scans" / "anna.nii.gz"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"]


def test_masks_of_many_kinds(clinic, tmp_path):
    scan = clinic / "scans" / "anna.nii.gz"
    classes = process_case(scan, tmp_path / "a", Options(infection=clinic / "classes" / "anna_mask.nii.gz"))
    assert classes["ggo_source"] == "labels" and 0 < classes["ggo_share"] < 1
    plain = process_case(scan, tmp_path / "b", Options(infection=clinic / "masks" / "anna.nii.gz"))
    assert plain["ggo_source"] == "hu" and plain["ct_ss"] == classes["ct_ss"]
    lobes = process_case(scan, tmp_path / "c", Options(infection=clinic / "masks" / "anna.nii.gz",
                                                       lobes=clinic / "lobes" / "anna.nii.gz"))
    assert (lobes["method"], lobes["lungs"]["source"]) == ("lobes", "lobes")


def test_wrong_masks(clinic, tmp_path):
    """Rows 16 and 17: shapes and places that differ; the message names both."""
    scan, zooms = clinic / "scans" / "anna.nii.gz", nibabel.load(clinic / "scans" / "anna.nii.gz").header.get_zooms()
    small = save(tmp_path / "small.nii.gz", np.zeros((80, 80, 13), np.uint8), zooms)
    with pytest.raises(GeometryError, match=r"(?s)image and mask differ in shape.*80, 80, 13.*80, 80, 14"):
        process_case(scan, tmp_path / "out", Options(infection=small))
    affine = np.diag([*zooms, 1.0])
    affine[0, 3] = 5.0
    nibabel.Nifti1Image(np.zeros((80, 80, 14), np.uint8), affine).to_filename(tmp_path / "moved.nii.gz")
    with pytest.raises(GeometryError, match="(?s)different places.*--ignore-affine"):
        process_case(scan, tmp_path / "out", Options(infection=tmp_path / "moved.nii.gz"))
    result = process_case(scan, tmp_path / "out", Options(infection=tmp_path / "moved.nii.gz", ignore_affine=True))
    assert result["ct_ss"] == 0 and any(text.startswith("ignore_affine") for text in result["warnings"])
    empty = save(tmp_path / "empty.nii.gz", np.zeros((80, 80, 14), np.uint8), zooms)
    with pytest.raises(LungSegmentationError, match="lung mask is empty"):  # row 24
        process_case(scan, tmp_path / "x", Options(infection=empty, lungs=empty))
    assert not (tmp_path / "x" / "anna").exists()


def test_values_of_masks_and_their_remedies(clinic, tmp_path):
    scan = clinic / "scans" / "anna.nii.gz"
    lungs = nibabel.load(clinic / "lungs" / "anna_lungs.nii.gz")
    infection = clinic / "masks" / "anna.nii.gz"
    swapped = save(tmp_path / "swapped.nii.gz", np.array([0, 2, 1], np.uint8)[np.asarray(lungs.dataobj)],
                   lungs.header.get_zooms())
    with pytest.raises(GeometryError, match="(?s)right lung lies on patient's left.*--label-map lungs:1=2,2=1"):
        process_case(scan, tmp_path / "out", Options(infection=infection, lungs=swapped))
    mended = process_case(scan, tmp_path / "out", Options(infection=infection, lungs=swapped,
                                                          label_map={"lungs": {1: 2, 2: 1}}))
    plain = process_case(scan, tmp_path / "out", Options(infection=infection, lungs=clinic / "lungs" / "anna_lungs.nii.gz"))
    assert mended["ct_ss"] == plain["ct_ss"] and mended["regions"] == plain["regions"]
    odd = save(tmp_path / "odd.nii.gz", 3 * np.asarray(nibabel.load(infection).dataobj), lungs.header.get_zooms())
    with pytest.raises(MaskError, match="--label-map lobes:3=1"):
        process_case(scan, tmp_path / "x", Options(infection=infection, lobes=odd))
    with pytest.raises(MaskError, match="--label-map infection:3=1"):
        process_case(scan, tmp_path / "x", Options(infection=odd))
    cut = process_case(scan, tmp_path / "y", Options(infection=odd, binarize={"infection": 1.5}))
    assert cut["lesion_ml"] == process_case(scan, tmp_path / "z", Options(infection=infection))["lesion_ml"]


def test_pairing(clinic, tmp_path):
    """Row 18: by name, and every leftover is listed before anything is computed."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("anna_mask", "carl"):
        (masks / f"{name}.nii.gz").write_bytes((clinic / "masks" / "anna.nii.gz").read_bytes())
    with pytest.raises(MaskError, match="(?s)2 cases, 2 masks.*ben: no mask; carl: no case"):
        process_cases(clinic / "scans", tmp_path / "out", Options(infection=masks))
    (masks / "carl.nii.gz").rename(masks / "ben.nii.gz")
    (masks / "ben_mask.nii.gz").write_bytes(b"")
    with pytest.raises(MaskError, match="ben: 2 masks"):
        process_cases(clinic / "scans", tmp_path / "out", Options(infection=masks))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="one infection mask for 2 cases"):
        list_cases(clinic / "scans", Options(infection=masks / "ben.nii.gz"))
    with pytest.raises(ConfigError, match="check --lobes"):
        list_cases(clinic / "scans", Options(lobes=tmp_path / "nowhere"))


def picture_folder(clinic, folder, mask=False):
    """The slices of a patient as PNG files, top first."""
    folder.mkdir(parents=True)
    array = np.asarray(nibabel.load(clinic / ("masks" if mask else "scans") / "anna.nii.gz").dataobj)
    for k in range(array.shape[2]):
        plane = turn_picture(array[:, :, array.shape[2] - 1 - k])
        Image.fromarray(255 * plane if mask else to_uint8(plane)).save(folder / f"Jane_{k:02d}.png")
    return folder


def test_stacks_and_slices(clinic, tmp_path):
    scans, masks = picture_folder(clinic, tmp_path / "jane"), picture_folder(clinic, tmp_path / "masks", mask=True)
    stack = process_cases(scans, tmp_path / "a", Options(infection=masks, window=(-600, 1500)))
    assert stack.failures == [] and stack.rows[0]["ct_ss"] is not None and stack.rows[0]["lesion_ml"] is None
    assert len(list((tmp_path / "a" / "jane" / "lungs").glob("Jane_*.png"))) == 14
    options = Options(infection=masks, window=(-600, 1500), pictures="slices")
    slices = process_cases(scans, tmp_path / "b", options)
    assert len(slices.rows) + len(slices.failures) == 14 and len(slices.rows) >= 8
    assert {one["error"] for one in slices.failures} <= {"LungSegmentationError"}  # above and below the lungs
    assert all(row["ct_ss"] is None and row["method"] == "slice-quadrant" for row in slices.rows)
    middle = process_case(scans / "Jane_07.png", tmp_path / "c", replace(options, infection=masks / "Jane_07.png",
                                                                         level=0.5))
    assert middle["method"] == "slice" and middle["bounds"] and middle["ct_ss"] is None


def test_a_slice_without_lungs_can_still_be_segmented(clinic, tmp_path):
    """The slices of COVID-SemiSeg are cropped to the lungs, so that no body is around them."""
    Image.fromarray(np.full((60, 70), 90, np.uint8)).save(tmp_path / "crop.png")
    result = process_case(tmp_path / "crop.png", tmp_path / "out", Options(task="segment", weights=clinic / "single.safetensors", phantom=True))
    assert any(text.startswith("no_lungs") for text in result["warnings"]) and result["lungs"] is None
    with pytest.raises(LungSegmentationError, match="--lungs MASK"):
        process_case(tmp_path / "crop.png", tmp_path / "out", Options(weights=clinic / "single.safetensors", phantom=True))


def test_lungs_that_cannot_be_ones_do_not_crop(clinic, tmp_path, monkeypatch):
    """A network of real slices gets the box of the lungs, but not that of a mask of 1 % of the body."""
    boxes = []
    monkeypatch.setattr(cases, "segment", lambda scan, segmenter, lungs, **_: boxes.append(lungs is not None)
                        or np.zeros(scan.hu.shape, np.uint8))
    hu = turn_picture(np.asarray(nibabel.load(clinic / "scans" / "anna.nii.gz").dataobj)[:, :, 7])
    Image.fromarray(to_uint8(hu)).save(tmp_path / "whole.png")
    options = Options(task="segment", weights=clinic / "single.safetensors", phantom=True, window=(-600, 1500))
    process_case(tmp_path / "whole.png", tmp_path / "out", options)
    body, bubble = np.where(hu < -200, 30, hu), np.s_[36:44, 36:44]
    body[:8], body[-8:], body[:, :8], body[:, -8:], body[bubble] = -1000, -1000, -1000, -1000, -850
    Image.fromarray(to_uint8(body)).save(tmp_path / "solid.png")
    result = process_case(tmp_path / "solid.png", tmp_path / "out", options)
    assert boxes == [True, False] and any(text.startswith("lung_area_implausible") for text in result["warnings"])


def write_dicom(folder, array, spacing, who):
    """A series with a patient's name, number, birth date and institution in it."""
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True)
    series = pydicom.uid.generate_uid()
    for k in range(array.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        tags = pydicom.dataset.FileDataset(str(folder / f"{k}.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
        tags.SOPClassUID, tags.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        tags.Modality, tags.SeriesInstanceUID = "CT", series
        tags.PatientName, tags.PatientID, tags.PatientBirthDate, tags.InstitutionName = who
        tags.SeriesDescription = tags.ProtocolName = who[0]
        tags.ImagePositionPatient, tags.ImageOrientationPatient = [0, 0, k * spacing[2]], [1, 0, 0, 0, 1, 0]
        tags.PixelSpacing, tags.RescaleSlope, tags.RescaleIntercept = [spacing[1], spacing[0]], 1, -1024
        pixels = (array[::-1, ::-1, k].T + 1024).astype(np.uint16)
        tags.Rows, tags.Columns = pixels.shape
        tags.BitsAllocated, tags.BitsStored, tags.HighBit, tags.PixelRepresentation = 16, 16, 15, 0
        tags.SamplesPerPixel, tags.PhotometricInterpretation = 1, "MONOCHROME2"
        tags.PixelData = np.ascontiguousarray(pixels).tobytes()
        tags.save_as(folder / f"{k}.dcm")


def test_no_private_word_in_any_output(clinic, tmp_path, capfd, real_pictures):
    """Row 36: names planted in tags, in NIfTI headers and in file names; nothing of them comes out."""
    who = ("Zabrinski^Ottilie", "PID-4711-XQ", "19610523", "Klinikum Nirgendwo")
    source = nibabel.load(clinic / "scans" / "anna.nii.gz")
    hu = np.asarray(source.dataobj)
    write_dicom(tmp_path / "in" / "Zabrinski_Ottilie", hu, source.header.get_zooms(), who)
    image = nibabel.Nifti1Image(hu, source.affine)
    image.header["descrip"], image.header["aux_file"], image.header["db_name"] = b"Zabrinski 1961", b"PID-4711-XQ", b"Ottilie"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Klinikum Nirgendwo"))
    image.to_filename(tmp_path / "in" / "ottilie_PID-4711.nii.gz")
    (tmp_path / "in" / "broken_zabrinski.nii.gz").write_bytes(b"Zabrinski^Ottilie")
    Path(tmp_path / "in" / "mixed_Ottilie").mkdir()
    for name in ("Zabrinski_1.png", "Zabrinski_2.png"):
        size = (64, 64) if name.endswith("1.png") else (64, 70)
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "in" / "mixed_Ottilie" / name)
    options = Options(task="severity", weights=clinic / "single.safetensors", phantom=True, id_salt="s")
    lines = []
    batch = process_cases(tmp_path / "in", tmp_path / "out", options, echo=lines.append)
    assert len(batch.rows) == 2 and {one["error"] for one in batch.failures} == {"ReadError", "GeometryError"}
    written = list((tmp_path / "out").rglob("*"))
    contents = [path.read_bytes() if path.suffix != ".gz" else nibabel.load(path).to_bytes()
                for path in written if path.is_file()]
    words = [b"zabrinski", b"ottilie", b"pid-4711", b"19610523", b"nirgendwo"]
    everything = [*contents, *(str(path.relative_to(tmp_path)).encode() for path in written),
                  "\n".join(lines).encode(), str(batch).encode(), "".join(capfd.readouterr()).encode()]
    for word in words:
        assert not [1 for content in everything if word in content.lower()], word
    assert len({row["case_id"] for row in batch.rows}) == 2 and all(len(row["case_id"]) == 12 for row in batch.rows)


def test_places_that_cannot_be_written(clinic, given, tmp_path):
    """Row 37: before any computing."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="results cannot be written here"):
        process_cases(clinic / "scans", tmp_path / "file", given)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="there are|not a file|no case"):
        process_cases(tmp_path / "nowhere", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()
    # results pointed at the scans themselves: a series in a folder must not be replaced by its results
    series = tmp_path / "study" / "anna"
    series.mkdir(parents=True)
    (series / "scan.nii.gz").write_bytes((clinic / "scans" / "anna.nii.gz").read_bytes())
    before = tree(tmp_path / "study")
    with pytest.raises(ConfigError, match="so it stays"):
        process_cases(tmp_path / "study", tmp_path / "study", Options(weights=clinic / "single.safetensors", phantom=True))
    assert tree(tmp_path / "study") == before


def test_names_that_are_odd(clinic, tmp_path):
    """Row 37: spaces, unicode, a leading dash; row 71: a formula and markup."""
    folder = tmp_path / "scans é"
    folder.mkdir()
    names = ["-o", "=2+5", "<b>two words ångström"]
    for name in names:
        (folder / f"{name}.nii.gz").write_bytes((clinic / "scans" / "anna.nii.gz").read_bytes())
    batch = process_cases(folder, tmp_path / "out", Options(weights=clinic / "single.safetensors", phantom=True, task="segment"))
    assert batch.failures == [] and {row["case_id"] for row in batch.rows} == set(names)
    assert "\n'=2+5," in (tmp_path / "out" / "segment.csv").read_text()


def test_strict_makes_warnings_errors(clinic, tmp_path):
    lungs = nibabel.load(clinic / "lungs" / "anna_lungs.nii.gz")
    one = save(tmp_path / "one.nii.gz", np.where(np.asarray(lungs.dataobj) == 1, 1, 0).astype(np.uint8), lungs.header.get_zooms())
    options = Options(infection=clinic / "masks" / "anna.nii.gz", lungs=one)
    result = process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "out", options)
    assert [text.split(":")[0] for text in result["warnings"]].count("single_lung") == 1 and result["ct_ss"] is None
    with pytest.raises(LungSegmentationError, match="(?s)suspicious.*single_lung.*--strict"):
        process_case(clinic / "scans" / "anna.nii.gz", tmp_path / "out", replace(options, strict=True))


def test_options_are_checked_first(clinic, tmp_path):
    wrong = [({"task": "sevrity"}, "did you mean 'severity'"), ({"lung_engine": "lungmsk"}, "did you mean 'lungmask'"),
             ({"threshold": 1.5}, "threshold cannot be used"), ({"level": 0}, "level cannot be used"),
             ({"batch_size": 0}, "at least 1"), ({"device": "cuda:77"}, "--device cpu"),
             ({"label_map": {"lung": {}}}, "did you mean 'lungs'"), ({"pictures": "slice"}, "did you mean 'slices'")]
    for values, hint in wrong:
        with pytest.raises(ConfigError, match=hint):
            process_cases(clinic / "scans", tmp_path / "out", Options(infection=clinic / "masks", **values))
    assert not (tmp_path / "out").exists()
    check_options(Options())


def test_every_option_but_places_decides(given):
    base = prepare(given)
    for name, value in {"situs_inversus": True, "min_fraction": 0.0, "hu_offset": -1024.0, "strict": True,
                        "label_map": {"lungs": {1: 2}}, "lung_engine": "lungmask"}.items():
        assert prepare(replace(given, **{name: value})).run_id != base.run_id, name
    assert prepare(replace(given, device="auto", infection="other")).run_id == base.run_id


def test_finished_wants_everything(clinic, given, tmp_path):
    setup = prepare(replace(given, infection=clinic / "masks" / "anna.nii.gz", lungs=None))
    case = list_cases(clinic / "scans" / "anna.nii.gz", setup.options)[0]
    process_case(case.path, tmp_path, case=case, setup=setup)
    key = setup.key(case)
    assert finished(tmp_path / "anna", key) and not finished(tmp_path / "anna", {**key, "input": "0"})
    assert not finished(tmp_path / "nobody", key)
    (tmp_path / "anna" / MANIFEST).write_text("[]")
    assert not finished(tmp_path / "anna", key)
    assert find_all(case, setup).predicted is False
