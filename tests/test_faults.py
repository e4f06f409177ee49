"""Faults as a user meets them, from the command to the folder of results: what is said, what is kept, and that the other cases finish."""
import json
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from toys import write_nifti as save

from covidsev.severity import cases
from covidsev.severity.cases import process_case, process_cases
from covidsev.severity.inputs import Options, list_cases
from covidsev.cli import main
from covidsev.method.unets import build_network
from covidsev.core import sha256_file
from covidsev.method.inference import ModelInfo, save_model
from covidsev.data.phantom import phantom_volume


def ras(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes[:, ::-1, ::-1].transpose(2, 1, 0))


@pytest.fixture(scope="module")
def patient():
    """HU, lungs, lobes and infection (X, Y, Z), and the affine, of one phantom."""
    one = phantom_volume(5, (14, 80, 80), ggo_fraction=0.2)
    arrays = {"hu": ras(one.hu).astype(np.int16), "lungs": ras(one.lungs), "lobes": ras(one.lobes),
              "infection": ras((one.labels > 0).astype(np.uint8))}
    return arrays | {"affine": np.diag([*one.spacing_mm[::-1], 1.0])}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of (untrained) weights."""
    torch.manual_seed(0)
    info = ModelInfo("single", "infnet", 64, backbone="small", threshold=0.45, data_kind="phantom")
    return save_model(tmp_path_factory.mktemp("weights") / "single.safetensors", build_network("infnet", "small"), info)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Drawing takes most of the time of a small case, and no fault is in it."""
    monkeypatch.setattr(cases, "_pictures", lambda *_: [])
    monkeypatch.setattr(cases, "contact_sheet", lambda _: np.zeros((4, 4, 3), np.uint8))


def cut(path, start: int, stop: int | None):
    path.write_bytes(path.read_bytes()[start:stop])


# a folder with one good scan, and one of every kind of broken scan: name -> type of error, and what must be said

BROKEN = {
    "web page.nii.gz": ("ReadError", "looks like an HTML"), "pointer.nii.gz": ("ReadError", "Git-LFS pointer"),
    "empty.nii.gz": ("ReadError", "an empty file"), "magic.nii": ("ReadError", "neither NIfTI, nor DICOM, nor a picture"),
    "short.nii": ("ReadError", "truncated or corrupt"), "short packed.nii.gz": ("ReadError", "truncated or corrupt"),
    "giant.nii": ("ReadError", "claims 35,181,150,961,663 voxels, the file has"),
    "negative.nii": ("ReadError", "negative or zero dimension"), "complex.nii": ("ReadError", "data type complex"),
    "nan affine.nii": ("GeometryError", "sform of the header holds NaN"), "singular.nii": ("GeometryError", "singular"),
    "no orientation.nii": ("GeometryError", "--assume-orientation RAS"),
    "pixdim.nii": ("GeometryError", "sform and voxel sizes disagree"), "tilted.nii": ("GeometryError", "more than 45"),
    "two volumes.nii": ("ReadError", "--volume 0 to --volume 1"), "five axes.nii": ("ReadError", "a 5-D array is not a CT scan"),
    "nan.nii": ("IntensityError", "--nan-fill -1024"), "raw.nii": ("IntensityError", "--hu-offset -1024"),
    "no lung.nii": ("LungSegmentationError", "no lung was found"), "tiny": ("ReadError", "too small"),
    "wide": ("IntensityError", "16-bit"), "bomb": ("ReadError", "nothing was decoded"), "cut": ("ReadError", "truncated or damaged"),
    "colour": ("IntensityError", "colour"), "twice": ("MaskError", "a is there 2 times"),
    "sizes": ("GeometryError", "differ in size or bits")}


def picture(folder, name: str, array: np.ndarray):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return folder / name


def break_files(root, hu, affine):
    """The files whose text or bytes are wrong."""
    for name, text in (("web page", b"<!DOCTYPE html><html>404"), ("pointer", b"version https://git-lfs.github.com/spec/v1\n"),
                       ("empty", b"")):
        (root / f"{name}.nii.gz").write_bytes(text)
    magic = save(root / "magic.nii", hu, affine)
    magic.write_bytes(magic.read_bytes()[:344] + b"XXXX" + magic.read_bytes()[348:])
    cut(save(root / "short.nii", hu, affine), 0, -5)
    cut(save(root / "short packed.nii.gz", hu, affine), 0, -500)


def break_headers(root, hu, affine):
    """The files whose header cannot be believed."""
    fields = {"giant": {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "negative": {"dim": [3, 80, -80, 14, 1, 1, 1, 1]},
              "complex": {"datatype": 32}, "nan affine": {"srow_x": [np.nan, 0, 0, 0]}, "singular": {"srow_x": [0] * 4},
              "no orientation": {"sform_code": 0, "qform_code": 0}, "pixdim": {"pixdim": [1, 9, 9, 9, 0, 0, 0, 0]},
              "five axes": {"dim": [5, 80, 80, 14, 1, 1, 1, 1]}}
    for name, wrong in fields.items():
        save(root / f"{name}.nii", hu, affine, **wrong)
    shear = affine.copy()
    shear[1, 2] = 1.2 * affine[2, 2]
    save(root / "tilted.nii", hu, shear)
    save(root / "two volumes.nii", np.stack([hu, hu], -1), affine)


def break_values(root, patient):
    """The files whose voxels are no chest CT."""
    hu, affine = patient["hu"], patient["affine"]
    save(root / "nan.nii", np.where(hu > 0, np.float32(np.nan), hu.astype(np.float32)), affine)
    save(root / "raw.nii", hu + np.int16(1024), affine)
    save(root / "no lung.nii", np.where(patient["lungs"] > 0, np.int16(30), hu), affine)


def break_pictures(root):
    """Folders of pictures, one fault in each."""
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    picture(root / "tiny", "a.png", grey[:20])
    picture(root / "wide", "a.png", grey.astype(np.uint16) * 100)
    size = (60_000).to_bytes(4, "big")
    bomb = picture(root / "bomb", "a.png", grey)
    content = bytearray(bomb.read_bytes())
    content[16:24] = size + size
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    bomb.write_bytes(content)
    cut(picture(root / "cut", "a.png", grey), 0, -900)
    picture(root / "colour", "a.png", np.dstack([grey, grey, 255 - grey]))
    picture(root / "twice", "a.png", grey)
    picture(root / "twice", "a.bmp", grey)
    picture(root / "sizes", "a.png", grey)
    picture(root / "sizes", "b.png", np.vstack([grey, grey]))


@pytest.fixture(scope="module")
def broken(tmp_path_factory, patient):
    root = tmp_path_factory.mktemp("broken")
    save(root / "good.nii.gz", patient["hu"], patient["affine"])
    break_files(root, patient["hu"], patient["affine"])
    break_headers(root, patient["hu"], patient["affine"])
    break_values(root, patient)
    break_pictures(root)
    return root


def test_each_broken_scan_is_explained_and_the_good_one_is_finished(broken, weights, tmp_path):
    batch = process_cases(broken, tmp_path / "out", Options(weights=weights, phantom=True))
    assert batch.exit_code == 3 and [row["case_id"] for row in batch.rows] == ["good"]
    expected = {name.removesuffix(".gz").removesuffix(".nii"): answer for name, answer in BROKEN.items()}
    found = {one["case"]: (one["error"], one["message"]) for one in batch.failures}
    assert {name: error for name, (error, _) in found.items()} == {name: error for name, (error, _) in expected.items()}
    table = (tmp_path / "out" / "failures.csv").read_text()
    for name, (_, words) in expected.items():
        message = found[name][1]
        assert words in message, (name, message)
        assert "do: " in message and str(broken) not in message, (name, message)
        assert words in table
    left = {path.name for path in (tmp_path / "out").iterdir()} - {".lock", ".tables.json"}
    assert left == {"good", "severity.csv", "failures.csv", "report.html"}


# what is read with a word on it has that word in its result

def test_every_remedy_that_was_used_is_recorded(patient, weights, tmp_path):
    hu = patient["hu"].astype(np.float32)[..., None]
    hu[0, :5, 0] = np.nan
    path = save(tmp_path / "one.nii.gz", hu, patient["affine"], sform_code=0, qform_code=0, scl_slope=0)
    options = Options(task="segment", weights=weights, phantom=True, assume_orientation="RAS", nan_fill=-1024.0)
    result = process_case(path, tmp_path / "out", options)
    said = {text.split(":")[0]: text for text in result["warnings"]}
    assert {"orientation_assumed", "squeezed", "scl_invalid", "nan_filled"} <= set(said)
    assert said["orientation_assumed"].endswith("RAS") and said["nan_filled"].endswith("5 voxels")
    assert result["warnings"] == json.loads((tmp_path / "out" / "one" / "segment.json").read_text())["warnings"]
    assert "orientation_assumed: RAS" in process_cases(path, tmp_path / "all", options).rows[0]["warnings"]


def test_infection_outside_the_lungs_is_a_warning_and_never_more_than_all_of_the_lung(patient, tmp_path):
    scan = save(tmp_path / "one.nii.gz", patient["hu"], patient["affine"])
    whole = (patient["lungs"] > 0).astype(np.uint8)
    for corner in np.s_[:18, :18], np.s_[-18:, :18], np.s_[:18, -18:], np.s_[-18:, -18:]:
        whole[corner] = 1  # in the air around the patient
    everywhere = save(tmp_path / "mask.nii.gz", whole, patient["affine"])
    lungs = save(tmp_path / "lungs.nii.gz", patient["lungs"], patient["affine"])
    lobes = save(tmp_path / "lobes.nii.gz", patient["lobes"], patient["affine"])
    result = process_case(scan, tmp_path / "out", Options(infection=everywhere, lungs=lungs, lobes=lobes))
    (said,) = [text for text in result["warnings"] if text.startswith("infection_outside_lung")]
    assert f"{result['outside_fraction']:.1%}" in said and result["outside_fraction"] > 0.2
    assert result["po"] == result["po_right"] == result["po_left"] == 1
    assert result["partial"] == result["partial_max"] == 2 * result["n_observed"] > 0
    page = (tmp_path / "out" / "one" / "report.html").read_text()
    assert 0 < page.index("infection_outside_lung") < page.index('id="scores"')


# places


def test_relative_paths_links_and_a_loop_of_links(patient, tmp_path, monkeypatch):
    folder = tmp_path / "one two" / "scans"
    save(folder / "a.nii.gz", patient["hu"], patient["affine"])
    options = Options(infection=save(tmp_path / "mask.nii.gz", patient["infection"], patient["affine"]))
    (tmp_path / "link").symlink_to(folder)
    (folder.parent / "deep").mkdir()
    monkeypatch.chdir(folder.parent / "deep")
    rows = [process_cases(path, tmp_path / str(k), options).rows for k, path in enumerate(("../scans", "../../one two/scans/.", tmp_path / "link"))]
    assert rows[0] == rows[1] == rows[2] and [row["case_id"] for row in rows[0]] == ["a"]
    (folder / "round").symlink_to(folder)  # a folder that holds itself
    assert [case.id for case in list_cases(folder)] == ["a", "round"]
    loop = folder / "loop"
    loop.symlink_to(loop)
    out = CliRunner().invoke(main, ["severity", str(loop), "--infection", str(tmp_path / "mask.nii.gz"), "-o", str(tmp_path / "o")])
    assert out.exit_code == 2 and not (tmp_path / "o").exists()
    assert "not a file or folder that can be read" in out.output and "check the path" in out.output


# pages and tables

def test_a_name_that_is_a_script_is_only_text_in_every_page(patient, tmp_path):
    names = ["<script>alert(1)<", "<img src=x onerror=alert(2)>", "=cmd|' '!A1", "@sum", "bad<b>"]
    for name in names:
        save(tmp_path / "scans" / f"{name}.nii.gz", patient["hu"], patient["affine"])
        save(tmp_path / "masks" / f"{name}.nii.gz", patient["infection"], patient["affine"])
        save(tmp_path / "lungs" / f"{name}.nii.gz", patient["lungs"], patient["affine"])
    cut(tmp_path / "scans" / "bad<b>.nii.gz", 0, 400)
    options = Options(infection=tmp_path / "masks", lungs=tmp_path / "lungs")
    batch = process_cases(tmp_path / "scans", tmp_path / "out", options)
    assert (len(batch.rows), [one["case"] for one in batch.failures]) == (4, ["bad<b>"])
    pages = list((tmp_path / "out").rglob("report.html"))
    assert len(pages) == 5
    for page in pages:
        assert not re.search(r"<script|<img src=x|<b>", page.read_text())
    text = (tmp_path / "out" / "severity.csv").read_text()
    assert "'=cmd|" in text and "'@sum" in text and not re.search(r"(^|,)[=@]", text, re.M)


# processes

def test_results_do_not_depend_on_hash_seed_locale_time_zone_or_place(patient, tmp_path, monkeypatch):
    places = [tmp_path / "here", tmp_path / "there é"]
    for place in places:
        for part in ("hu", "infection", "lungs"):
            save(place / part / "one.nii.gz", patient[part], patient["affine"])
    monkeypatch.chdir(places[0])
    process_cases("hu", "out", Options(infection="infection", lungs="lungs"))
    code = ("from covidsev.severity import cases\ncases._pictures = lambda *_: []\n"
            "cases.contact_sheet = lambda _: cases.np.zeros((4, 4, 3), 'uint8')\n"
            "cases.process_cases('hu', 'out', cases.Options(infection='infection', lungs='lungs'))")
    subprocess.run([sys.executable, "-c", code], cwd=places[1], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "de_DE.UTF-8", "TZ": "Asia/Tokyo"})
    first, second = ({path.relative_to(place).as_posix(): sha256_file(path) for path in (place / "out").rglob("*")
                      if path.is_file() and path.name != ".lock"} for place in places)
    assert first == second and len(first) == 8
