"""`covidsev segment` and `covidsev severity` as a user meets them: exit statuses, messages, and the same results as in Python."""
import json
import os
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from covidsev.severity import cases
from covidsev.severity.cases import process_cases
from covidsev.severity.inputs import Options
from covidsev.cli import main, parse_cuts, parse_label_maps, parse_pair
from covidsev.method.unets import build_network
from covidsev.core import ConfigError
from covidsev.method.inference import ModelInfo, save_model
from covidsev.data.phantom import phantom_volume
from covidsev.core import run_lock


def call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """Two patients, masks of their infection, and a file of (untrained) weights."""
    folder = tmp_path_factory.mktemp("clinic")
    for seed, name in ((5, "anna"), (6, "ben")):
        patient = phantom_volume(seed, (14, 80, 80), ggo_fraction=0.2)
        for part, planes in (("scans", patient.hu.astype(np.int16)), ("masks", (patient.labels > 0).astype(np.uint8))):
            (folder / part).mkdir(exist_ok=True)
            array = planes[:, ::-1, ::-1].transpose(2, 1, 0)
            nibabel.Nifti1Image(array, np.diag([*patient.spacing_mm[::-1], 1.0])).to_filename(folder / part / f"{name}.nii.gz")
    torch.manual_seed(0)
    info = ModelInfo("single", "infnet", 64, backbone="small", threshold=0.45, data_kind="phantom")
    save_model(folder / "single.safetensors", build_network("infnet", "small"), info)
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
    status, text = call("severity", clinic / "scans", "--infection", clinic / "masks", "--min-fraction", 0.02,
                        "-o", tmp_path / "a")
    assert status == 0 and text.count("CT-SS") == 2 and "2 finished, 0 failed" in text
    process_cases(clinic / "scans", tmp_path / "b", Options(infection=clinic / "masks", min_fraction=0.02))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    status, text = call("severity", clinic / "scans", "--infection", clinic / "masks", "--min-fraction", 0.02,
                        "-o", tmp_path / "a", "--resume")
    assert status == 0 and "2 of them from before" in text
    assert json.loads((tmp_path / "a" / "anna" / "severity.json").read_text())["min_fraction"] == 0.02


def test_segment_then_severity(clinic, tmp_path):
    weights, scan = clinic / "single.safetensors", clinic / "scans" / "anna.nii.gz"
    status, text = call("segment", scan, "--weights", weights, "--phantom", "-o", tmp_path / "seg", "--batch-size", 3)
    assert status == 0 and "voxels infected" in text
    mask = tmp_path / "seg" / "anna" / "infection.nii.gz"
    assert call("severity", scan, "--infection", mask, "-o", tmp_path / "a")[0] == 0
    assert call("severity", scan, "--weights", weights, "--phantom", "-o", tmp_path / "b")[0] == 0
    first, second = (json.loads((tmp_path / one / "anna" / "severity.json").read_text()) for one in "ab")
    assert first["regions"] == second["regions"] and second["model"]["threshold"] == 0.45


def test_statuses(clinic, tmp_path):
    scans, masks, out = clinic / "scans", clinic / "masks", tmp_path / "out"
    expected = [
        (2, "prediction needs trained weights", ("severity", scans, "--phantom", "-o", out)),
        (2, "--weights FILE", ("segment", scans, "--phantom", "-o", out)),
        (2, "covidsev export", ("segment", scans, "--weights", "last.pt", "-o", out)),
        (5, "weights", ("segment", scans, "--weights", scans / "anna.nii.gz", "-o", out)),
        (2, "Missing option '-o'", ("severity", scans)),
        (2, "No such option", ("segment", scans, "-o", out, "--infection", masks)),
        (2, "LEVEL,WIDTH", ("severity", scans, "--infection", masks, "-o", out, "--window", "600")),
        (2, "--label-map lungs:1=2,2=1", ("severity", scans, "--infection", masks, "-o", out, "--label-map", "1:2")),
        (2, "--binarize 127", ("severity", scans, "--infection", masks, "-o", out, "--binarize", "x")),
        (2, "did you mean 'lungmask'", ("severity", scans, "--infection", masks, "-o", out, "--lung-engine", "lungmsk")),
        (2, "--device cpu", ("segment", scans, "--weights", "w", "-o", out, "--device", "cuda:99")),
        (1, "do not pair", ("severity", scans, "--infection", scans.parent / "some", "-o", out)),
    ]
    (clinic / "some").mkdir(exist_ok=True)
    (clinic / "some" / "anna.nii.gz").write_bytes((masks / "anna.nii.gz").read_bytes())
    for status, words, arguments in expected:
        got, text = call(*arguments)
        assert (got, words in text, "Traceback" in text) == (status, True, False), (arguments, got, text)
    assert not [path for path in out.rglob("*") if path.name != ".lock"]
    with run_lock(out):
        got, text = call("severity", scans, "--infection", masks, "-o", out)
        assert got == 4 and "another run is writing here" in text


def test_failed_cases_have_a_status_and_a_list(clinic, tmp_path):
    (tmp_path / "scans").mkdir()
    for path in (clinic / "scans").iterdir():
        (tmp_path / "scans" / path.name).write_bytes(path.read_bytes()[:None if path.name[0] == "a" else 900])
    status, text = call("severity", tmp_path / "scans", "--infection", clinic / "masks", "-o", tmp_path / "out")
    assert status == 3 and "ben: failed: ReadError" in text and "the same command with --resume" in text
    assert "1 finished, 1 failed" in text and "ben,ReadError" in (tmp_path / "out" / "failures.csv").read_text()


def test_every_option_reaches_the_library(clinic, tmp_path, monkeypatch):
    """What the error texts of the library name can be said here, and arrives under its Python name."""
    seen = {}

    def record(path, out, options, **more):
        seen.update(vars(options) | more | {"path": path, "out": out})
        return cases.Batch("id", [], [])

    monkeypatch.setattr(cases, "process_cases", record)
    monkeypatch.setattr("covidsev.severity.inputs.list_cases", lambda *_: [])
    words = {"--window": "-600,1500", "--hu-offset": "-1024", "--assume-orientation": "LPS", "--nan-fill": "-1024",
             "--volume": "2", "--first-slice": "bottom", "--pictures": "slices", "--picture-axes": "LP",
             "--lungs": "l", "--lobes": "o",
             "--label-map": "lungs:3=1", "--binarize": "lobes:4", "--lung-engine": "lungmask", "--lung-model": "R231",
             "--lung-weights": "lw", "--lung-weights-sha256": "ab", "--weights": "w", "--weights-multi": "m",
             "--weights-sha256": "cd", "--threshold": "0.3", "--device": "auto", "--batch-size": "2", "--id-salt": "s",
             "--infection": "i", "--level": "0.4", "--min-fraction": "0.05"}
    flags = ["--phantom", "--ignore-affine", "--situs-inversus", "--tta", "--strict", "--allow-truncated", "--resume"]
    given = [part for pair in words.items() for part in pair]
    assert call("severity", "IN", "-o", "OUT", *given, *flags)[0] == 0
    expected = {"window": (-600.0, 1500.0), "hu_offset": -1024.0, "nan_fill": -1024.0, "volume": 2,
                "label_map": {"lungs": {3: 1}}, "binarize": {"lobes": 4.0}, "threshold": 0.3, "batch_size": 2,
                "level": 0.4, "min_fraction": 0.05, "task": "severity", "path": "IN", "out": "OUT"}
    plain = {name[2:].replace("-", "_"): value for name, value in words.items()}
    expected = {**plain, **expected, **{flag[2:].replace("-", "_"): True for flag in flags}}
    assert {name: seen[name] for name in expected} == expected
    untouched = set(Options.__dataclass_fields__) - set(expected)
    assert untouched == set(), f"options without a word on the command line: {untouched}"


def test_words_of_masks():
    assert parse_label_maps(("3=0,2=1", "lobes:7=5")) == {"infection": {3: 0, 2: 1}, "lobes": {7: 5}}
    assert parse_cuts(("127", "lungs:0.5")) == {"infection": 127.0, "lungs": 0.5} and parse_cuts(()) == {}
    assert parse_pair(None, "") is None and parse_pair("40,400", "") == (40.0, 400.0)
    for text in ("1", "1,2,3", "a,b", ""):
        with pytest.raises(ConfigError, match="two numbers"):
            parse_pair(text, "LEVEL,WIDTH")


def test_help_loads_no_torch():
    code = ("import sys; from covidsev.cli import main\ntry:\n    main(['severity', '--help'])\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'scipy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "Not a medical device" in " ".join(done.stdout.split())


def test_interruption(clinic, tmp_path):
    """SIGINT while a case is computed: status 130, no half case, and a word on how to go on."""
    code = "from covidsev.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, "severity", clinic / "scans", "--infection", clinic / "masks",
                                "-o", tmp_path / "out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "COVIDSEV_QUIET": "1"})
    deadline = time.monotonic() + 100
    while not list((tmp_path / "out").glob(".lock")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob(".*.partial")) and not (tmp_path / "out" / "severity.csv").exists()


def test_demo(tmp_path):
    """A report of a phantom, twice over its own result, and never over somebody's file."""
    for _ in range(2):
        status, text = call("demo", "-o", tmp_path / "demo")
        assert status == 0 and "CT-SS" in text and f"see {tmp_path / 'demo' / 'scan' / 'report.html'}" in text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    status, text = call("demo", "-o", tmp_path / "mine")
    assert status == 2 and "so it stays" in text and (tmp_path / "mine" / "report.html").read_text() == "mine"
