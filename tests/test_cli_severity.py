"""`covidsev segment` and `covidsev severity` as a user meets them: exit statuses, messages, and the same results as in Python."""
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from toys import write_patients, write_weights

from covidsev.cli import main
from covidsev.core import read_json, run_lock
from covidsev.severity import cases
from covidsev.severity.cases import process_cases
from covidsev.severity.inputs import Options
from covidsev.severity.reports import Shown


def call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Two patients, masks of their infection, and a file of (untrained) weights."""
    folder = write_patients(tmp_path_factory.mktemp("clinic"))
    write_weights(folder / "single.safetensors")
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """No network comes with covidsev: those in weights/ learned from patients, and the scans here are phantoms."""
    monkeypatch.setattr(cases, "shipped", lambda name: None)


def test_severity_with_masks_is_the_python_call(clinic, tmp_path):
    """No weights needed; same bytes as `process_cases`."""
    command = ("severity", clinic / "scans", "--infection", clinic / "masks", "--min-fraction", 0.02, "-o", tmp_path / "a")
    status, text = call(*command)
    assert status == 0 and text.count("CT-SS") == 2 and "2 finished, 0 failed" in text
    process_cases(clinic / "scans", tmp_path / "b", Options(infection=clinic / "masks", min_fraction=0.02))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    status, text = call(*command, "--resume")
    assert status == 0 and "2 of them from before" in text
    assert read_json(tmp_path / "a" / "anna" / "severity.json")["min_fraction"] == 0.02


def test_segment_then_severity(clinic, tmp_path):
    scan, weights = clinic / "scans" / "anna.nii.gz", ("--weights", clinic / "single.safetensors", "--phantom")
    status, text = call("segment", scan, *weights, "-o", tmp_path / "seg", "--batch-size", 3)
    assert status == 0 and "voxels infected" in text
    given = ("--infection", tmp_path / "seg" / "anna" / "infection.nii.gz")
    for out, words in (("a", given), ("b", weights)):
        assert call("severity", scan, *words, "-o", tmp_path / out)[0] == 0
    first, second = (read_json(tmp_path / one / "anna" / "severity.json") for one in "ab")
    assert first["regions"] == second["regions"] and second["model"]["threshold"] == 0.45


def test_statuses(clinic, tmp_path):
    scans, masks, out, some = clinic / "scans", clinic / "masks", tmp_path / "out", tmp_path / "some"
    some.mkdir()
    shutil.copy(masks / "anna.nii.gz", some)
    severity, segment = ("severity", scans, "--infection", masks, "-o", out), ("segment", scans, "-o", out)
    expected = [
        (2, "prediction needs trained weights", ("severity", scans, "--phantom", "-o", out)),
        (2, "--weights FILE", (*segment, "--phantom")), (2, "covidsev export", (*segment, "--weights", "last.pt")),
        (5, "weights", (*segment, "--weights", scans / "anna.nii.gz")), (2, "Missing option '-o'", ("severity", scans)),
        (2, "No such option", (*segment, "--infection", masks)), (2, "LEVEL,WIDTH", (*severity, "--window", "600")),
        (2, "--label-map lungs:1=2,2=1", (*severity, "--label-map", "1:2")),
        (2, "--binarize 127", (*severity, "--binarize", "x")),
        (2, "did you mean 'lungmask'", (*severity, "--lung-engine", "lungmsk")),
        (2, "--device cpu", (*segment, "--weights", "w", "--device", "cuda:99")),
        (0, "Not a medical device", ("severity", "--help")), (1, "do not pair", ("severity", scans, "--infection", some, "-o", out))]
    for status, words, arguments in expected:
        got, text = call(*arguments)
        assert (got, words in " ".join(text.split()), "Traceback" in text) == (status, True, False), (arguments, got, text)
    assert not [path for path in out.rglob("*") if path.name != ".lock"]
    with run_lock(out):
        got, text = call(*severity)
        assert got == 4 and "another run is writing here" in text


def test_failed_cases_have_a_status_and_a_list(clinic, tmp_path):
    ben = shutil.copytree(clinic / "scans", tmp_path / "scans") / "ben.nii.gz"
    ben.write_bytes(ben.read_bytes()[:900])
    status, text = call("severity", tmp_path / "scans", "--infection", clinic / "masks", "-o", tmp_path / "out")
    assert status == 3 and "ben: failed: ReadError" in text and "the same command with --resume" in text
    assert "1 finished, 1 failed" in text and "ben,ReadError" in (tmp_path / "out" / "failures.csv").read_text()


def test_every_option_reaches_the_library(monkeypatch):
    """What the error texts of the library name can be said here, and arrives under its Python name."""
    seen = {}

    def record(path, out, options, **more):
        seen.update(vars(options) | more | {"path": path, "out": out})
        return cases.Batch("id", [], [])

    monkeypatch.setattr(cases, "process_cases", record)
    monkeypatch.setattr("covidsev.severity.inputs.list_cases", lambda *_: [])
    texts = ("assume_orientation=LPS first_slice=bottom pictures=slices picture_axes=LP lungs=l lobes=o infection=i "
             "lung_engine=lungmask lung_model=R231 lung_weights=lw lung_weights_sha256=ab weights=w weights_multi=m "
             "weights_sha256=cd device=auto id_salt=s")
    expected = dict(pair.split("=") for pair in texts.split())
    words = {**expected, "label_map": "lungs:3=1", "binarize": "lobes:4", "window": "-600,1500"}
    numbers = {"hu_offset": -1024.0, "nan_fill": -1024.0, "volume": 2, "threshold": 0.3, "batch_size": 2, "level": 0.4,
               "min_fraction": 0.05}
    flags = ["phantom", "ignore_affine", "situs_inversus", "tta", "strict", "allow_truncated", "resume"]
    dashed = lambda name: "--" + name.replace("_", "-")
    given = [part for name, value in {**words, **numbers}.items() for part in (dashed(name), value)]
    assert call("severity", "IN", "-o", "OUT", *given, *map(dashed, flags))[0] == 0
    expected |= {**numbers, **dict.fromkeys(flags, True), "label_map": {"lungs": {3: 1}}, "binarize": {"lobes": 4.0},
                 "window": (-600.0, 1500.0), "task": "severity", "path": "IN", "out": "OUT"}
    assert {name: seen[name] for name in expected} == expected
    untouched = set(Options.__dataclass_fields__) - set(expected)
    assert untouched == set(), f"options without a word on the command line: {untouched}"


def test_interruption(clinic, tmp_path):
    """SIGINT while a case is computed: status 130, no half case, and a word on how to go on."""
    out, deadline = tmp_path / "out", time.monotonic() + 100
    command = [sys.executable, "-c", "from covidsev.cli import main; main()", "severity", clinic / "scans",
               "--infection", clinic / "masks", "-o", out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "COVIDSEV_QUIET": "1"})
    while not (out / ".lock").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not list(out.glob(".*.partial")) and not (out / "severity.csv").exists()


def test_demo(tmp_path, monkeypatch):
    """A report of a phantom, and never over somebody's file."""
    monkeypatch.setattr(cases, "_pictures", lambda *_: [Shown("slice", np.zeros((4, 4, 3), np.uint8))])
    status, text = call("demo", "-o", tmp_path / "demo")
    assert status == 0 and "CT-SS" in text and f"see {tmp_path / 'demo' / 'scan' / 'report.html'}" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    status, text = call("demo", "-o", tmp_path / "mine")
    assert status == 2 and "so it stays" in text and (tmp_path / "mine" / "report.html").read_text() == "mine"
