"""From scans to folders of results: whole or absent, resumable, failures apart, nothing private in any file."""
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from toys import PLANTED, dicom_series, write_nifti, write_weights

from covidsev.core import (CheckpointError, ConfigError, CovidSevError, GeometryError, MaskError, read_json,
                           sha256_file)
from covidsev.data.phantom import to_uint8
from covidsev.data.scans import turn_picture
from covidsev.severity import cases
from covidsev.severity.cases import MANIFEST, finished, process_case, process_cases
from covidsev.severity.inputs import Options
from covidsev.severity.lungs import LungSegmentationError


def save(path, array, spacing):
    return write_nifti(path, array, np.diag([*spacing, 1.0]))


def raising(error):
    def broken(*_, **__):
        raise error
    return broken


@pytest.fixture
def given(clinic):
    return Options(infection=clinic / "masks", lungs=clinic / "lungs")


def tree(folder):
    """Every file below a folder, without the lock, with its hash."""
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", ".tables.json")}


def test_a_folder_of_results(clinic, given, tmp_path):
    batch = process_cases(clinic / "scans", tmp_path / "out", given)
    assert (batch.exit_code, [row["case_id"] for row in batch.rows], batch.failures) == (0, ["anna", "ben"], [])
    home = tmp_path / "out" / "anna"
    names = {"severity.json", "lungs.nii.gz", "overlay.png", "report.html", MANIFEST}
    assert {path.name for path in home.iterdir()} == names  # no infection: it was given
    result = read_json(home / "severity.json")
    assert result["schema"] == "covidsev.severity/1" and result["ct_ss"] == batch.rows[0]["ct_ss"] > 0
    assert result["lungs"]["source"] == "given" and result["model"] == {}
    assert set(result["input"]["masks"]) == {"infection", "lungs"} and set(result["files"].values()) <= names
    assert result["run_id"] == batch.run_id == read_json(home / MANIFEST)["run_id"]
    lines = (tmp_path / "out" / "severity.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("schema,case_id") and lines[1].split(",")[1] == "anna"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "anna/report.html" in page and not (tmp_path / "out" / "failures.csv").exists()


def test_two_runs_write_the_same_bytes(clinic, given, tmp_path):
    """Row 69: also from another place, into another place."""
    first, second = tmp_path / "a", tmp_path / "deep" / "b c é"
    for out in (first, second):
        process_cases(clinic / "scans", out, given)
    assert tree(first) == tree(second) and len(tree(first)) > 10
    texts = b"".join(path.read_bytes() for path in first.rglob("*") if path.suffix in {".json", ".csv", ".html"})
    assert str(tmp_path).encode() not in texts and str(clinic).encode() not in texts


def test_resume_takes_over_what_is_whole(clinic, given, tmp_path):
    """Row 60: by manifest, key and hash of every file."""
    out, scans = tmp_path / "out", clinic / "scans"
    process_cases(scans, out, given)
    before = tree(out)

    def resumed(options=given):
        return process_cases(scans, out, options, resume=True).n_resumed

    assert resumed() == 2 and tree(out) == before
    for name in ("lungs.nii.gz", "severity.json"):
        path = out / "ben" / name
        for damage in (lambda path: path.write_bytes(path.read_bytes()[:-7]), Path.unlink):
            damage(path)
            assert resumed() == 1 and tree(out) == before, name
    for other in (replace(given, min_fraction=0.03), replace(given, lungs=None)):
        assert resumed(other) == 0
    (out / "ben" / MANIFEST).unlink()
    pytest.raises(ConfigError, resumed).match("not a result of this library")


def test_resume_notices_a_changed_input(clinic, tmp_path):
    mask, out = shutil.copy(clinic / "masks" / "anna.nii.gz", tmp_path), tmp_path / "out"
    scan, options = clinic / "scans" / "anna.nii.gz", Options(infection=mask)
    first = process_cases(scan, out, options).rows[0]
    save(Path(mask), np.zeros((80, 80, 14), np.uint8), nibabel.load(scan).header.get_zooms())
    again = process_cases(scan, out, options, resume=True)
    assert again.n_resumed == 0 and first["ct_ss"] > 0
    result = read_json(out / "anna" / "severity.json")  # row 23: an empty mask is a result
    assert (result["ct_ss"], result["ct_ss_strict"], result["po"], result["severe"]) == (0, 0, 0.0, False)
    assert result["mosmed_class"] == 0 and result["not_computed"]["mean_hu"]


def test_one_bad_case_does_not_stop_the_others_and_its_old_result_never_shows_as_new(clinic, given, tmp_path, capsys):
    """Row 64."""
    scans, out, lines = shutil.copytree(clinic / "scans", tmp_path / "scans"), tmp_path / "out", []
    process_cases(scans, out, given)
    old = tree(out / "ben")
    whole = (scans / "ben.nii.gz").read_bytes()
    (scans / "ben.nii.gz").write_bytes(whole[:len(whole) // 2])
    batch = process_cases(scans, out, given, echo=lines.append)
    assert batch.exit_code == 3 and [row["case_id"] for row in batch.rows] == ["anna"]
    text = (out / "failures.csv").read_text()
    assert text.startswith("case,error,message\nben,ReadError,") and "truncated or corrupt" in text
    assert str(tmp_path) not in text and lines[1].startswith("ben: failed: ReadError: the file is truncated")
    assert not (out / "ben").exists() and tree(out / "superseded" / "ben") == old
    assert "ben" in (out / "report.html").read_text() and "ben" not in (out / "severity.csv").read_text()
    assert capsys.readouterr().err == ""
    (scans / "ben.nii.gz").write_bytes(whole)
    assert process_cases(scans, out, given, resume=True).n_resumed == 1 and tree(out / "ben") == old


def test_an_interrupted_run_leaves_the_tables_of_the_run_before(clinic, given, tmp_path, monkeypatch):
    """They say of which run they are; nothing half made is left."""
    out = tmp_path / "out"
    process_cases(clinic / "scans", out, given)
    before = tree(out)
    monkeypatch.setattr(cases, "find_all", raising(KeyboardInterrupt))
    pytest.raises(KeyboardInterrupt, process_cases, clinic / "scans", out, replace(given, min_fraction=0.02))
    assert tree(out) == before
    monkeypatch.undo()
    assert process_cases(clinic / "scans", out, given, resume=True).n_resumed == 2


MOMENTS = ["find_all", "write_mask", "case_html", "_seal"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_failure_at_any_moment_leaves_nothing(clinic, given, tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    monkeypatch.setattr(cases, moment, raising(OSError(5, "Input/output error", str(tmp_path / "secret"))))
    batch = process_cases(clinic / "scans", out, given)
    assert [one["message"] for one in batch.failures] == ["Input/output error"] * 2
    left = {".lock", ".tables.json", "failures.csv", "report.html", "severity.csv"}
    assert {path.name for path in out.iterdir()} == left


@pytest.mark.parametrize("moment", [*MOMENTS, "csv_text"])
def test_a_full_disk_stops_the_batch_and_keeps_everything(clinic, given, tmp_path, monkeypatch, moment):
    """It is no fault of the case: no row of failures, nothing superseded, the tables as they were."""
    out, calls, real, in_tables = tmp_path / "out", [], getattr(cases, moment), moment == "csv_text"
    process_cases(clinic / "scans", out, given)
    before = tree(out)

    def full(*given, **more):
        calls.append(1)
        if len(calls) > 1 or in_tables:
            raise OSError(28, "No space left on device")
        return real(*given, **more)

    monkeypatch.setattr(cases, moment, full)
    changed = replace(given, min_fraction=0.02)
    with pytest.raises(CovidSevError, match="(?s)the run stops here; what is finished stays.*No space left.*--resume"):
        process_cases(clinic / "scans", out, changed)
    monkeypatch.undo()
    kept = tree(out)
    same = {name for name in before if "/" not in name or (name.startswith("ben/") and not in_tables)}
    assert {name: kept[name] for name in same} == {name: before[name] for name in same}
    assert not (out / "superseded").exists() and not (out / "failures.csv").exists()
    resumed = process_cases(clinic / "scans", out, changed, resume=True)
    assert resumed.failures == [] and resumed.n_resumed == (2 if in_tables else 1)


@pytest.mark.parametrize("name", ["report.html", "failures.csv", "severity.csv"])
def test_files_of_the_user_are_not_touched(clinic, given, tmp_path, name):
    """Also a table of ours that somebody has edited, a folder that looks half made, and a file in a case folder."""
    out, scan = tmp_path / "out", clinic / "scans"
    out.mkdir()
    (out / name).write_text("mine")
    pytest.raises(ConfigError, process_cases, scan, out, given).match(f"(?s)so it stays.*{name}.*-o OUT")
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == [name] and (out / name).read_text() == "mine"
    (out / name).unlink()
    (out / ".x.part").mkdir()
    (out / ".x.part" / "mine").write_text("mine")
    process_cases(scan, out, given)
    (out / "anna" / "note.txt").write_text("mine")
    process_cases(scan, out, given)
    assert (out / ".x.part" / "mine").read_text() == (out / "superseded" / "anna" / "note.txt").read_text() == "mine"
    if (out / name).is_file():
        (out / name).write_text((out / name).read_text() + "mine")
        pytest.raises(ConfigError, process_cases, scan, out, given).match("so it stays")


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
        (tmp_path / name).mkdir()
        scan = shutil.copy(clinic / "scans" / f"{name}.nii.gz", tmp_path / name / "scan.nii.gz")
        results.append(process_case(scan, tmp_path / "out", Options(infection=clinic / "masks" / f"{name}.nii.gz")))
    kept = read_json(tmp_path / "out" / "superseded" / "scan" / "severity.json")
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
    return subprocess.Popen([sys.executable, "-c", _CHILD, *(clinic / "scans", out, clinic / "masks", clinic / "lungs")],
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
            manifest = read_json(out / case / MANIFEST)
            assert {name: sha256_file(out / case / name) for name in manifest["files"]} == manifest["files"]
    (out / ".ben.covidsev.partial").mkdir(exist_ok=True)  # what a kill may leave at any time
    (out / ".ben.covidsev.partial" / "lungs.nii.gz").write_bytes(b"half")
    batch = process_cases(clinic / "scans", out, given, resume=True)  # the lock of a killed process is free
    assert batch.exit_code == 0 and tree(out) == tree(whole)


def test_lungs_of_an_earlier_run_can_be_given(anna, tmp_path):
    """The slow part is not computed twice: its mask is a file."""
    first = process_case(anna.scan, tmp_path / "a", anna.options())
    again = process_case(anna.scan, tmp_path / "b", anna.options(lungs=tmp_path / "a" / "anna" / "lungs.nii.gz"))
    assert again["regions"] == first["regions"] and again["lungs"]["source"] == "given"


def test_prediction_writes_the_mask(anna, network, tmp_path):
    result = process_case(anna.scan, tmp_path / "a", network)
    assert result["model"]["sha256"] == sha256_file(network.weights) and result["model"]["threshold"] == 0.45
    path = tmp_path / "a" / "anna" / "infection.nii.gz"
    mask, source = nibabel.load(path), nibabel.load(anna.scan)
    assert mask.shape == source.shape and np.allclose(mask.affine, source.affine) and mask.get_data_dtype() == np.uint8
    only = process_case(anna.scan, tmp_path / "c", replace(network, task="segment"))
    assert only["n_infected"] == np.count_nonzero(mask.get_fdata()) and only["lesion_ml"] > 0
    names = {"segment.json", "infection.nii.gz", "overlay.png", MANIFEST}
    assert {path.name for path in (tmp_path / "c" / "anna").iterdir()} == names


def test_weights_are_part_of_the_key(anna, network, tmp_path):
    out, options = tmp_path / "out", replace(network, task="segment")
    process_cases(anna.scan, out, options)
    assert process_cases(anna.scan, out, options, resume=True).n_resumed == 1
    other = replace(options, weights=write_weights(tmp_path / "other.safetensors", seed=9))
    assert process_cases(anna.scan, out, other, resume=True).n_resumed == 0


def test_a_scan_is_no_file_of_weights(anna, tmp_path):
    pytest.raises(CheckpointError, process_cases, anna.scan, tmp_path / "out", Options(weights=anna.scan))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"]


def test_masks_of_many_kinds(anna, clinic, tmp_path):
    classes = process_case(anna.scan, tmp_path / "a", Options(infection=clinic / "classes" / "anna_mask.nii.gz"))
    assert classes["ggo_source"] == "labels" and 0 < classes["ggo_share"] < 1
    plain = process_case(anna.scan, tmp_path / "b", anna.options())
    assert plain["ggo_source"] == "hu" and plain["ct_ss"] == classes["ct_ss"]
    lobes = process_case(anna.scan, tmp_path / "c", anna.options(lobes=clinic / "lobes" / "anna.nii.gz"))
    assert (lobes["method"], lobes["lungs"]["source"]) == ("lobes", "lobes")


def test_wrong_masks(anna, tmp_path):
    """Row 17: places that differ; row 24."""
    affine, nothing = nibabel.load(anna.scan).affine, np.zeros((80, 80, 14), np.uint8)
    empty = write_nifti(tmp_path / "empty.nii.gz", nothing, affine)
    moved = write_nifti(tmp_path / "moved.nii.gz", nothing, affine + np.outer([1, 0, 0, 0], [0, 0, 0, 5.0]))
    with pytest.raises(GeometryError, match="(?s)different places.*--ignore-affine"):
        process_case(anna.scan, tmp_path / "out", Options(infection=moved))
    result = process_case(anna.scan, tmp_path / "out", Options(infection=moved, ignore_affine=True))
    assert result["ct_ss"] == 0 and any(text.startswith("ignore_affine") for text in result["warnings"])
    with pytest.raises(LungSegmentationError, match="lung mask is empty"):
        process_case(anna.scan, tmp_path / "x", Options(infection=empty, lungs=empty))
    assert not (tmp_path / "x" / "anna").exists()


def test_values_of_masks_and_their_remedies(anna, tmp_path):
    lungs, infection = (np.asarray(nibabel.load(path).dataobj) for path in (anna.lungs, anna.mask))
    spacing = nibabel.load(anna.scan).header.get_zooms()
    swapped = save(tmp_path / "swapped.nii.gz", np.array([0, 2, 1], np.uint8)[lungs], spacing)
    odd = save(tmp_path / "odd.nii.gz", 3 * infection, spacing)
    for options, error, words in (
            (anna.options(lungs=swapped), GeometryError, "right lung lies on patient's left.*--label-map lungs:1=2,2=1"),
            (anna.options(lobes=odd), MaskError, "--label-map lobes:3=1"),
            (Options(infection=odd), MaskError, "--label-map infection:3=1")):
        pytest.raises(error, process_case, anna.scan, tmp_path / "x", options).match(f"(?s){words}")
    plain = process_case(anna.scan, tmp_path / "out", anna.options(lungs=anna.lungs))
    mended = process_case(anna.scan, tmp_path / "out", anna.options(lungs=swapped, label_map={"lungs": {1: 2, 2: 1}}))
    assert mended["ct_ss"] == plain["ct_ss"] and mended["regions"] == plain["regions"]
    cut = process_case(anna.scan, tmp_path / "y", Options(infection=odd, lungs=anna.lungs, binarize={"infection": 1.5}))
    assert cut["lesion_ml"] == plain["lesion_ml"]


def test_pairing(clinic, tmp_path):
    """Row 18: by name, and every leftover is listed before anything is computed."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("anna_mask", "carl"):
        shutil.copy(clinic / "masks" / "anna.nii.gz", masks / f"{name}.nii.gz")
    with pytest.raises(MaskError, match="(?s)2 cases, 2 masks.*ben: no mask; carl: no case"):
        process_cases(clinic / "scans", tmp_path / "out", Options(infection=masks))
    (masks / "carl.nii.gz").rename(masks / "ben.nii.gz")
    (masks / "ben_mask.nii.gz").write_bytes(b"")
    for options, error, words in (
            (Options(infection=masks), MaskError, "ben: 2 masks"),
            (Options(infection=masks / "ben.nii.gz"), ConfigError, "one infection mask for 2 cases"),
            (Options(lobes=tmp_path / "nowhere"), ConfigError, "check --lobes")):
        pytest.raises(error, process_cases, clinic / "scans", tmp_path / "out", options).match(words)
    assert not (tmp_path / "out").exists()


def picture_folder(source, folder, mask=False):
    """The slices of a volume as PNG files, top first."""
    folder.mkdir(parents=True)
    array = np.asarray(nibabel.load(source).dataobj)
    for k in range(array.shape[2]):
        plane = turn_picture(array[:, :, array.shape[2] - 1 - k])
        Image.fromarray(255 * plane if mask else to_uint8(plane)).save(folder / f"Jane_{k:02d}.png")
    return folder


def test_stacks_and_slices(anna, tmp_path):
    scans, masks = picture_folder(anna.scan, tmp_path / "jane"), picture_folder(anna.mask, tmp_path / "masks", mask=True)
    options = Options(infection=masks, window=(-600, 1500))
    stack = process_cases(scans, tmp_path / "a", options)
    assert stack.failures == [] and stack.rows[0]["ct_ss"] is not None and stack.rows[0]["lesion_ml"] is None
    assert len(list((tmp_path / "a" / "jane" / "lungs").glob("Jane_*.png"))) == 14
    options = replace(options, pictures="slices")
    slices = process_cases(scans, tmp_path / "b", options)
    assert len(slices.rows) + len(slices.failures) == 14 and len(slices.rows) >= 8
    assert {one["error"] for one in slices.failures} <= {"LungSegmentationError"}  # above and below the lungs
    assert all(row["ct_ss"] is None and row["method"] == "slice-quadrant" for row in slices.rows)


def test_a_slice_without_lungs_can_still_be_segmented(network, tmp_path):
    """The slices of COVID-SemiSeg are cropped to the lungs, so that no body is around them."""
    Image.fromarray(np.full((60, 70), 90, np.uint8)).save(tmp_path / "crop.png")
    result = process_case(tmp_path / "crop.png", tmp_path / "out", replace(network, task="segment"))
    assert any(text.startswith("no_lungs") for text in result["warnings"]) and result["lungs"] is None
    with pytest.raises(LungSegmentationError, match="--lungs MASK"):
        process_case(tmp_path / "crop.png", tmp_path / "out", network)


def test_lungs_that_cannot_be_ones_do_not_crop(anna, network, tmp_path, monkeypatch):
    """A network of real slices gets the box of the lungs, but not that of a mask of 1 % of the body."""
    boxes = []
    monkeypatch.setattr("covidsev.method.inference.segment", lambda scan, segmenter, lungs, **_: boxes.append(lungs is not None)
                        or np.zeros(scan.hu.shape, np.uint8))
    hu = turn_picture(np.asarray(nibabel.load(anna.scan).dataobj)[:, :, 7])
    body = np.pad(np.where(hu < -200, 30, hu)[8:-8, 8:-8], 8, constant_values=-1000)
    body[36:44, 36:44] = -850
    options = replace(network, task="segment", window=(-600, 1500))
    for name, picture in (("whole", hu), ("solid", body)):
        Image.fromarray(to_uint8(picture)).save(tmp_path / f"{name}.png")
        result = process_case(tmp_path / f"{name}.png", tmp_path / "out", options)
    assert boxes == [True, False] and any(text.startswith("lung_area_implausible") for text in result["warnings"])


def test_no_private_word_in_any_output(anna, network, tmp_path, capfd, real_pictures):
    """Row 36: names planted in tags, in NIfTI headers and in file names; nothing of them comes out."""
    source, folder, lines = nibabel.load(anna.scan), tmp_path / "in", []
    hu = np.asarray(source.dataobj)
    dicom_series(folder / PLANTED[0], hu[::-1, ::-1], range(14), PixelSpacing=list(map(float, source.header.get_zooms()[1::-1])))
    image = nibabel.Nifti1Image(hu, source.affine)
    image.header["descrip"], image.header["aux_file"], image.header["db_name"] = (word.encode() for word in PLANTED[:3])
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", PLANTED[3].encode()))
    image.to_filename(folder / f"{PLANTED[0]}_{PLANTED[1]}.nii.gz")
    (folder / f"broken_{PLANTED[0]}.nii.gz").write_bytes(PLANTED[0].encode())
    (folder / f"mixed_{PLANTED[0]}").mkdir()
    for number, width in ((1, 64), (2, 70)):
        Image.fromarray(np.zeros((64, width), np.uint8)).save(folder / f"mixed_{PLANTED[0]}" / f"{PLANTED[0]}_{number}.png")
    batch = process_cases(folder, tmp_path / "out", replace(network, id_salt="s"), echo=lines.append)
    assert len(batch.rows) == 2 and {one["error"] for one in batch.failures} == {"ReadError", "GeometryError"}
    written = list((tmp_path / "out").rglob("*"))
    contents = [nibabel.load(path).to_bytes() if path.suffix == ".gz" else path.read_bytes()
                for path in written if path.is_file()]
    texts = [*(str(path.relative_to(tmp_path)) for path in written), *lines, str(batch), *capfd.readouterr()]
    for word in PLANTED:
        assert not [1 for content in (*contents, *map(str.encode, texts)) if word.encode() in content.upper()], word
    assert len({row["case_id"] for row in batch.rows}) == 2 and all(len(row["case_id"]) == 12 for row in batch.rows)


def test_places_that_cannot_be_written(clinic, anna, network, given, tmp_path):
    """Row 37: before any computing."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="results cannot be written here"):
        process_cases(clinic / "scans", tmp_path / "file", given)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ConfigError, match="there are|not a file|no case"):
        process_cases(tmp_path / "nowhere", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()
    # results pointed at the scans themselves: a series in a folder must not be replaced by its results
    study = tmp_path / "study"
    (study / "anna").mkdir(parents=True)
    shutil.copy(anna.scan, study / "anna" / "scan.nii.gz")
    before = tree(study)
    pytest.raises(ConfigError, process_cases, study, study, network).match("so it stays")
    assert tree(study) == before


def test_names_that_are_odd(anna, network, tmp_path):
    """Row 37: spaces, unicode, a leading dash; row 71: a formula and markup."""
    folder, names = tmp_path / "scans é", ["-o", "=2+5", "<b>two words ångström"]
    folder.mkdir()
    for name in names:
        shutil.copy(anna.scan, folder / f"{name}.nii.gz")
    batch = process_cases(folder, tmp_path / "out", replace(network, task="segment"))
    assert batch.failures == [] and {row["case_id"] for row in batch.rows} == set(names)
    assert "\n'=2+5," in (tmp_path / "out" / "segment.csv").read_text()


def test_strict_makes_warnings_errors(anna, tmp_path):
    lungs = nibabel.load(anna.lungs)
    one = save(tmp_path / "one.nii.gz", np.uint8(np.asarray(lungs.dataobj) == 1), lungs.header.get_zooms())
    result = process_case(anna.scan, tmp_path / "out", anna.options(lungs=one))
    assert [text.split(":")[0] for text in result["warnings"]].count("single_lung") == 1 and result["ct_ss"] is None
    with pytest.raises(LungSegmentationError, match="(?s)suspicious.*single_lung.*--strict"):
        process_case(anna.scan, tmp_path / "out", anna.options(lungs=one, strict=True))


@pytest.mark.parametrize("wrong, hint", [
    ({"task": "sevrity"}, "did you mean 'severity'"), ({"lung_engine": "lungmsk"}, "did you mean 'lungmask'"),
    ({"threshold": 1.5}, "threshold cannot be used"), ({"level": 0}, "level cannot be used"),
    ({"batch_size": 0}, "at least 1"), ({"device": "cuda:77"}, "--device cpu"),
    ({"label_map": {"lung": {}}}, "did you mean 'lungs'"), ({"pictures": "slice"}, "did you mean 'slices'")])
def test_options_are_checked_first(clinic, given, tmp_path, wrong, hint):
    with pytest.raises(ConfigError, match=hint):
        process_cases(clinic / "scans", tmp_path / "out", replace(given, **wrong))
    assert not (tmp_path / "out").exists()

