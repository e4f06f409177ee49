"""The grid and a cohort as jobs: the jobs are those of the runner's own plan, and Snakemake runs them as they are."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from covidsev.paper import experiments
from covidsev.paper import workflow
from covidsev.core import ConfigError, MaskError
from covidsev.paper.experiments import Places, examine
from covidsev.data.phantom import phantom_volume
from covidsev.paper.workflow import Job, agreed_jobs, cohort_jobs, due_runs, grid_jobs, jobs_of, rule_name

ROOT = Path(__file__).resolve().parents[1]
TINY = {"epochs": 1, "warmup_epochs": 0, "n_train": 4, "n_test": 2, "val_slices": 2, "size": 64, "batch_size": 4}


def check_order(jobs: list[Job]) -> None:
    """Marks and names occur once, and each job comes after those that it needs."""
    assert len({job.mark for job in jobs}) == len({job.name for job in jobs}) == len(jobs)
    before = set()
    for job in jobs:
        assert {need for need in job.needs if need.startswith(("marks", "cohort"))} <= before, job
        before.add(job.mark)


def test_the_whole_smoke_grid(tmp_path):
    jobs = grid_jobs("smoke", root=tmp_path)
    check_order(jobs)
    planned = due_runs("smoke", root=tmp_path)
    assert [job.name for job in jobs] == [*(rule_name(each.run.name) for each in planned), "manifest"]
    expected = examine([each.run for each in planned], Places(tmp_path), data=str(experiments.data_root() or ""))
    assert [(each.parts, each.reasons) for each in planned] == [(each.parts, each.reasons) for each in expected]
    assert all(re.fullmatch(r"\w+", job.name) for job in jobs) and not list(tmp_path.iterdir())


def test_what_a_run_needs_comes_first(tmp_path):
    *jobs, last = grid_jobs("smoke", ["train_single"], ["sinfnet_self"], [0], root=tmp_path)
    by_name = {job.name: job for job in jobs}
    assert by_name["train_single_sinfnet_self_seed0"].needs == (by_name["pretext_infnet_coach_seed0"].mark,)
    assert set(last.needs) == {job.mark for job in jobs}
    assert "--row sinfnet_self --seed 0" in by_name["train_single_sinfnet_self_seed0"].command


def test_a_gpu_is_asked_for_and_need_not_be_here(tmp_path, monkeypatch):
    """The machine that hands out jobs has none; the runner itself would refuse."""
    monkeypatch.setattr(experiments, "data_key", lambda parameters, data: {"train": "0"})
    jobs = grid_jobs("paper", ["train_single"], ["unet"], [0], root=tmp_path)
    assert [job.gpus for job in jobs if job.name.startswith("train_single")] == [1] and jobs[-1].gpus == 0


def test_wrong_requests_are_refused(tmp_path):
    for config, words in (({"profile": "smok"}, "did you mean 'smoke'"), ({"only": "train_singel"}, "did you mean"),
                          ({"row": "unett"}, "unknown row"), ({"set": "epochs"}, "NAME=VALUE"), ({"set": "data='phantom"}, "close the quotation mark"), ({"set": "epoch=1"}, "epoch"),
                          ({"set": "epochs=2 augment=false"}, "augment=False"),
                          ({"rows": "unet"}, "did you mean 'row'"), ({"cohort": str(tmp_path)}, "out=FOLDER"),
                          ({"cohort": str(tmp_path / "no"), "out": "x"}, "folder"),
                          ({"cohort": str(tmp_path), "out": "x", "profile": "cpu"}, "unknown key")):
        with pytest.raises(ConfigError, match=re.escape(words)):
            jobs_of({"out": str(tmp_path), **config} if "cohort" not in config else config)


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name, seed in (("a b; touch oops", 1), ("c", 2)):
        voxels = phantom_volume(seed, (10, 64, 64)).hu.T[::-1, ::-1].astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([5.0, 5.0, 28.0, 1.0])), folder / f"{name}.nii.gz")
    return folder


def test_a_cohort(scans, tmp_path):
    jobs = cohort_jobs(scans, tmp_path / "out", "--level 0.5")
    check_order(jobs)
    assert [job.name for job in jobs] == ["case_0", "case_1", "collect"]
    assert all(str(scans) in job.needs[0] for job in jobs[:2])  # a newer scan is scored again
    assert "'" in jobs[0].command and "--level 0.5" in jobs[0].command
    other = cohort_jobs(scans, tmp_path / "out", "--level 0.6")
    assert not {job.mark for job in other[:2]} & {job.mark for job in jobs[:2]}
    for options in ("-o x", "--out=x", "--resume", "--infection y"):
        with pytest.raises(ConfigError, match="set by the workflow"):
            cohort_jobs(scans, tmp_path / "out", options)


def test_masks_are_paired_before_anything_runs(scans, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    shutil.copy(scans / "c.nii.gz", masks)
    with pytest.raises(MaskError, match="no mask"):
        cohort_jobs(scans, tmp_path / "out", masks={"infection": masks})
    shutil.copy(scans / "a b; touch oops.nii.gz", masks)
    jobs = cohort_jobs(scans, tmp_path / "out", masks={"infection": masks})
    assert [f"--infection {masks / 'c.nii.gz'}" in job.command for job in jobs] == [False, True, False]
    assert f"--infection {masks}" in jobs[-1].command


@pytest.fixture
def no_plan():
    """No plan before the test and none after it: the environment would hand it on to the tests behind."""
    os.environ.pop("COVIDSEV_PLAN", None)
    yield
    os.environ.pop("COVIDSEV_PLAN", None)


def test_a_plan_is_agreed_on_once(tmp_path, no_plan):
    config = {"only": "train_single", "row": "unet", "seed": 0, "out": str(tmp_path)}
    jobs = agreed_jobs(config, tmp_path)
    assert agreed_jobs({"profile": "not looked at"}, tmp_path) == jobs
    os.environ.pop("COVIDSEV_PLAN")
    assert not {job.mark for job in agreed_jobs(config, tmp_path)} & {job.mark for job in jobs}


# ------------------------------------------------------------------ Snakemake itself, where it is installed


def snakemake(folder: Path, *arguments: str, **config: str) -> str:
    """Runs Snakemake on our Snakefile; returns what it printed."""
    program = os.environ.get("SNAKEMAKE") or shutil.which("snakemake", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs Snakemake: pip install -e '.[paper]'")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([program, "-s", ROOT / "workflow" / "Snakefile", "--directory", folder / "work", *arguments,
                           "--config", *(f"{name}={value}" for name, value in config.items())],
                          cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def request(folder: Path, **changes) -> dict[str, str]:
    """Two tiny runs of the smoke profile."""
    words = " ".join(f"{name}={value}" for name, value in {**TINY, **changes}.items())
    return {"only": "train_single", "row": "unet,segnet_aug_0.5", "seed": "0", "out": str(folder / "out"), "set": words}


def test_dry_run_plans_what_is_due(tmp_path):
    text = snakemake(tmp_path, "-n", **request(tmp_path))
    assert "rule train_single_unet_seed0:" in text and "rule train_single_segnet_aug_0_5_seed0:" in text
    assert re.search(r"^total\s+4$", text, re.M) and not (tmp_path / "out").exists()


def test_dry_run_for_slurm(tmp_path):
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None and "SNAKEMAKE" not in os.environ:
        pytest.skip("needs the SLURM plugin: pip install -e '.[paper]'")
    text = snakemake(tmp_path, "-n", "--executor", "slurm", "-j", "2", "--default-resources", "slurm_partition=gpu",
                     "runtime=720", **request(tmp_path))
    assert "slurm_partition=gpu" in text and re.search(r"^total\s+4$", text, re.M)


def test_real_runs_side_by_side_then_nothing_then_what_changed(tmp_path):
    snakemake(tmp_path, "-c", "2", **request(tmp_path))
    made = tmp_path / "out" / "results" / "smoke"
    records = {path.parent.name: path for path in made.glob("train_single/*/run.json")}
    assert set(records) == {"unet-seed0", "segnet_aug_0.5-seed0"} and (made / "manifest.json").is_file()
    again = snakemake(tmp_path, "-c", "2", **request(tmp_path))
    assert "rule train" not in again and "rule manifest" not in again
    records["unet-seed0"].with_name("metrics.csv").unlink()  # by hand: the mark of the first plan must not hide it
    text = snakemake(tmp_path, "-n", **request(tmp_path))
    assert "rule train_single_unet_seed0:" in text and "rule train_single_segnet" not in text
    assert re.search(r"^total\s+4$", snakemake(tmp_path, "-n", **request(tmp_path, epochs=2)), re.M)


def test_a_real_cohort(scans, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, seed in (("a b; touch oops", 1), ("c", 2)):
        labels = (phantom_volume(seed, (10, 64, 64)).labels > 0).T[::-1, ::-1].astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, np.diag([5.0, 5.0, 28.0, 1.0])), masks / f"{name}.nii.gz")
    asked = {"cohort": str(scans), "infection": str(masks), "out": str(tmp_path / "out")}
    snakemake(tmp_path, "-c", "2", **asked)
    lines = (tmp_path / "out" / "severity.csv").read_text().splitlines()
    assert len(lines) == 3 and not list(tmp_path.rglob("oops"))
    log = (tmp_path / "work" / "logs" / "collect.log").read_text()
    assert "2 finished, 2 of them from before, 0 failed" in log
