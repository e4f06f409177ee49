"""`workflow/gpu_check.sh` in its small form, where nothing is installed that a GPU machine may lack."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LACKING = ("nbdev", "papermill", "ipykernel", "IPython", "nbformat", "nbclient", "fastcore", "nibabel", "pydicom", "psutil",
           "pooch", "requests")
HOOK = f"""
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Lacking())
"""


def test_the_check_runs_with_little_installed_and_writes_what_it_measured(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    environ = {name: value for name, value in os.environ.items() if name != "COVIDSEV_DATA"}
    environ |= {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    command = [ROOT / "workflow/gpu_check.sh", "--small", "--device", "cpu", "--seconds", "1", "--out", tmp_path / "out"]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "cpu-small.json").read_text())
    ours = [row for row in report["steps"] if row["stage"] == "training step" and row["variant"] == "ours, float32"]
    assert ours[0]["difference"] < 1e-3 and ours[0]["ratio"] > 0
    assert report["precision"]["logits"]["as set"] < 0.1 and report["precision"]["logits"]["float32"] == 0
    assert 0 <= report["headline"]["scores"]["dice"] <= 1 and report["headline"]["data"] == "phantom"
    assert report["pretext"]["steps"] > 0 and report["pretext"]["loss_last"] > 0
    assert report["environment"]["python"] and report["commit"]
