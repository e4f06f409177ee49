"""Faults of the notebook runner, with real kernels: rows 46 to 51, 61 and 68 of the fault matrix, and the registry itself."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from covidsev import experiments
from covidsev.config import ConfigError, DataMissingError, NotebookError, RunLockedError, repo_root
from covidsev.experiments import Places, Run, load_registry, lint_notebook, notebook_parameters, run_notebook
from covidsev.provenance import read_json, run_lock

SETTINGS = 'profile = "smoke"\nrow = "a"\nseed = 0\nepochs = 3\noutput = ""'
WORK = """
import json, pathlib
out = pathlib.Path(output)
(out / "metrics.csv").write_text(f"metric,value\\nsquare,{epochs ** 2 + seed}\\n")
(out / "run.json").write_text(json.dumps({"parameters": {"profile": profile, "row": row, "seed": seed, "epochs": epochs}}))
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COVIDSEV_QUIET", "1")


def write_notebook(path, *cells, tags=("parameters",)):
    notebook = new_notebook(cells=[new_code_cell(textwrap.dedent(cell)) for cell in cells],
                            metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}})
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, path)
    return path


def toy_run(notebook, outputs=("metrics.csv",), needs=(), kind="compute", seed=0, **parameters):
    settings = {"profile": "smoke", "row": "a", "seed": seed, "epochs": 3, **parameters}
    return Run("smoke", "toy", "a", seed, kind, notebook, settings, needs, outputs)


def everything_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != ".lock" and not path.name.endswith(".failed.ipynb")}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good run whose results every fault must leave alone."""
    folder = tmp_path_factory.mktemp("good")
    places = Places(folder / "out")
    run_notebook(toy_run(write_notebook(folder / "good.ipynb", SETTINGS, WORK)), places, {})
    return places


FAULTS = {
    "a cell raises": ("raise ValueError('no such slice')", "raised ValueError", "no such slice"),
    "the kernel is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "kernel", ""),
    "sys.exit(0) in the middle": ("import sys; sys.exit(0)", "SystemExit", ""),
    "out of memory on a GPU": ("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory')", "OutOfMemoryError",
                               "batch_size"),
    "parameters changed on the way": ("epochs = 99", "not run with the requested parameters", ""),
    "output not written": ("import pathlib; write = pathlib.Path.write_text; pathlib.Path.write_text = lambda p, t: "
                           "None if p.name == 'metrics.csv' else write(p, t)", "did not write metrics.csv", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_run_keeps_last_good_output(fault, good, tmp_path):
    code, what, detail = FAULTS[fault]
    before = everything_below(good.root)
    bad = write_notebook(tmp_path / "bad.ipynb", SETTINGS, code, WORK)
    with pytest.raises(NotebookError, match=what.replace("(", r"\(")) as caught:
        run_notebook(toy_run(bad), good, {})
    assert detail in str(caught.value)
    assert everything_below(good.root) == before
    assert (good.folder(toy_run(bad)) / "toy.failed.ipynb").is_file()
    assert not list(good.root.rglob("*.partial"))


def test_failed_notebook_is_removed_by_the_next_success(tmp_path):
    places = Places(tmp_path / "out")
    with pytest.raises(NotebookError):
        run_notebook(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, "1 / 0")), places, {})
    failed = places.folder(toy_run(tmp_path)) / "toy.failed.ipynb"
    assert failed.is_file()
    run_notebook(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK)), places, {})
    assert not failed.exists()


def test_failed_render_leaves_figures_alone(tmp_path):
    places, picture = Places(tmp_path / "out"), tmp_path / "out/figures/smoke/toy.svg"
    picture.parent.mkdir(parents=True)
    picture.write_text("the last good figure")
    broken = """
    import pathlib
    figure = pathlib.Path(output, "figures", "toy.svg")
    figure.parent.mkdir()
    figure.write_text("half a fig")
    raise RuntimeError
    """
    with pytest.raises(NotebookError):
        run_notebook(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, broken), kind="render"), places, {})
    assert picture.read_text() == "the last good figure"


def test_misspelt_parameter_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        experiments.resolve(load_registry(), "smoke", "train_single", "sinfnet", 0, {"epohcs": 1})


def test_misspelt_parameter_in_the_registry_is_refused(tmp_path):
    text = (repo_root() / "nbs/experiments/experiments.toml").read_text(encoding="utf-8")
    for name in ("train_single.ipynb", "table1_test_loss.ipynb"):
        (tmp_path / name).write_bytes((repo_root() / "nbs/experiments" / name).read_bytes())
    (tmp_path / "experiments.toml").write_text(text.replace("cutout = 0.5", "cutuot = 0.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'cutout'"):
        experiments.resolve(load_registry(tmp_path / "experiments.toml"), "smoke", "train_single", "sinfnet_aug_0.5", 0)


@pytest.mark.parametrize("tags, why", [((), "0 cells carry the tag"), (("params",), "0 cells carry the tag")])
def test_lost_tag_is_found_before_anything_runs(tmp_path, tags, why):
    notebook = write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK, tags=tags)
    with pytest.raises(NotebookError, match=why):
        notebook_parameters(notebook)
    with pytest.raises(NotebookError, match=why):
        run_notebook(toy_run(notebook), Places(tmp_path / "out"), {})
    assert not list((tmp_path / "out").rglob("metrics.csv"))


def test_two_parameter_cells_and_empty_ones_are_refused(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", SETTINGS, "epochs = 4")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match="2 cells carry the tag"):
        notebook_parameters(path)
    with pytest.raises(NotebookError, match="papermill sees other parameters"):
        notebook_parameters(write_notebook(tmp_path / "empty.ipynb", "# nothing here", WORK))


@pytest.mark.parametrize("line", ["!false", "files = !ls", "%%bash\nfalse", "  !false", "%sx false", "%%script bash\nexit 1"])
def test_shell_lines_are_refused(tmp_path, line):
    assert any("shell command" in fault for fault in lint_notebook(write_notebook(tmp_path / "n.ipynb", SETTINGS, line)))


@pytest.mark.parametrize("line", ["a != b", "x = 'wow!'", "%matplotlib inline", "# not !a command"])
def test_harmless_lines_are_not_refused(tmp_path, line):
    assert lint_notebook(write_notebook(tmp_path / "n.ipynb", SETTINGS, line)) == []


def test_tag_survives_nbdev_clean(tmp_path):
    pytest.importorskip("nbdev")
    for name in ("settings.ini",):
        (tmp_path / name).write_bytes((repo_root() / name).read_bytes())
    notebook = tmp_path / "train_single.ipynb"
    notebook.write_bytes((repo_root() / "nbs/experiments/train_single.ipynb").read_bytes())
    clean = Path(sys.executable).parent / "nbdev_clean"
    subprocess.run([clean, "--fname", notebook], cwd=tmp_path, check=True)
    assert "epochs" in notebook_parameters(notebook)


def test_second_run_on_one_folder_is_locked_out(good, tmp_path):
    before, run = everything_below(good.root), toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK))
    with run_lock(good.folder(run)):
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on ") as caught:
            run_notebook(run, good, {})
    assert caught.value.exit_code == 4
    assert everything_below(good.root) == before


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    run, places = toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK)), Places(tmp_path / "out")
    hold = f"from covidsev.provenance import run_lock; import time\nwith run_lock({str(places.folder(run))!r}):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"process {holder.pid} on "):
        run_notebook(run, places, {})
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run_notebook(run, places, {})
    assert (places.folder(run) / "metrics.csv").is_file()


def test_missing_gpu_is_refused_before_anything_runs(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        experiments.reproduce("paper", root=tmp_path, data=tmp_path, echo=lambda line: None)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("profile, device", [("cpu", None), ("paper", "cpu")])
def test_real_profiles_never_fall_back_to_the_phantom(tmp_path, profile, device):
    with pytest.raises(DataMissingError, match="covidsev data get covid-semiseg"):
        experiments.reproduce(profile, root=tmp_path / "out", data=tmp_path, overrides={"device": device} if device else None,
                              echo=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_interrupted_publication_is_noticed(tmp_path):
    """A crash between two files leaves hashes that do not fit: the run is stale, not half new."""
    run, places = toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK)), Places(tmp_path / "out")
    parts = experiments.cache_parts(run, {}, {})
    run_notebook(run, places, parts)
    assert experiments.stale_reasons(run, places, parts) == []
    (places.folder(run) / "metrics.csv").write_text("from a newer run")
    assert experiments.stale_reasons(run, places, parts) == ["metrics.csv was changed after the run"]
    (places.folder(run) / "run.json").write_text("{ half")
    assert experiments.stale_reasons(run, places, parts) == ["never run"]


def test_outputs_that_are_no_longer_written_disappear(tmp_path):
    places, more = Places(tmp_path / "out"), WORK + "(out / 'extra.csv').write_text('x')\n"
    run_notebook(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, more)), places, {})
    assert (places.folder(toy_run(tmp_path)) / "extra.csv").is_file()
    run_notebook(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK)), places, {})
    assert not (places.folder(toy_run(tmp_path)) / "extra.csv").exists()


def test_side_by_side_runs_overlap_and_respect_needs(tmp_path):
    slow = write_notebook(tmp_path / "slow.ipynb", SETTINGS, "import time; started = time.time(); time.sleep(4)", WORK,
                          "(out / 'span.txt').write_text(f'{started} {time.time()}')")
    runs = [toy_run(slow, seed=0), toy_run(slow, seed=1), toy_run(slow, seed=2, needs=("toy/a-seed0",))]
    places = Places(tmp_path / "out")
    experiments.execute_plan(experiments.examine(runs, places), places, jobs=3, echo=lambda line: None)
    spans = [tuple(map(float, (places.folder(run) / "span.txt").read_text().split())) for run in runs]
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
    assert spans[2][0] >= spans[0][1]


def test_child_that_dies_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    run = toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK))
    places, started = Places(tmp_path / "out"), time.monotonic()
    finished = experiments.run_all(experiments.examine([run], places), places, 2, "", lambda *_: None)
    assert isinstance(finished[run.name], NotebookError) and "exit status -9" in str(finished[run.name])
    assert time.monotonic() - started < 30


def test_every_experiment_notebook_is_registered_and_clean():
    registry = load_registry()
    folder = registry.folder
    assert {path.name for path in folder.glob("*.ipynb")} == {each.notebook.name for each in registry.experiments.values()}
    for path in folder.glob("*.ipynb"):
        assert lint_notebook(path) == []
        notebook = nbformat.read(path, 4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(notebook.cells) <= 26, path
        assert all(len(cell.source.splitlines()) <= 8 for cell in code[1:]), path
        assert not any(cell.outputs for cell in code), f"{path} is committed with outputs"


def test_render_notebooks_cannot_train():
    registry = load_registry()
    for each in registry.experiments.values():
        modules = experiments.library_key(Run("smoke", each.name, "", None, each.kind, each.notebook, {}, (), ()))
        assert ("covidsev.training" in modules) == (each.kind == "compute"), each.name
        if each.kind == "compute":
            assert not {"covidsev.figures", "covidsev.tables", "covidsev.experiments", "covidsev.cli"} & set(modules)


def test_profiles_state_their_device_and_data():
    for name, profile in load_registry().profiles.items():
        parameters = profile.parameters["train_single"]
        assert parameters["device"] == {"smoke": "cpu", "cpu": "cpu", "paper": "cuda"}[name]
        assert (parameters["data"] == "phantom") == (name == "smoke")
        assert len(profile.seeds) >= (2 if name == "smoke" else 3)


def test_run_records_say_no_time_place_or_user(good):
    text = (good.folder(toy_run(good.root)) / "run.json").read_text()
    assert str(good.root) not in text and os.uname().nodename not in text
    assert set(read_json(good.folder(toy_run(good.root)) / "run.json")) == {"parameters", "run", "outputs", "cache", "key"}
