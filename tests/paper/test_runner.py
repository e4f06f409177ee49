"""The runner: faults of notebooks with real processes, what is published and kept, why a run is made again."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toys import KEEP, RECORD, SETTINGS, TOY, TRAIN, write_notebook, write_toys

from covidsev import core
from covidsev.core import (ConfigError, CovidSevError, DataMissingError, NotebookError,
                           RunLockedError, read_json, repo_root, run_lock, write_bytes, write_json)
from covidsev.paper import claims, runner
from covidsev.paper.experiments import Run, load_registry
from covidsev.paper.runner import RUN, Child, Places, examine, write_manifest

ROOT = repo_root()
WORK = """
import json, pathlib
out = pathlib.Path(output)
(out / "metrics.csv").write_text(f"metric,value\\nsquare,{epochs ** 2 + seed}\\n")
(out / "run.json").write_text(json.dumps({"parameters": {"profile": profile, "row": row, "seed": seed, "epochs": epochs}}))
"""


def toy_run(notebook, outputs=("metrics.csv",), needs=(), kind="compute", seed=0, **parameters):
    settings = {"profile": "smoke", "row": "a", "seed": seed, "epochs": 3, **parameters}
    return Run("smoke", "toy", "a", seed, kind, notebook, settings, needs, outputs)


def make(run, places, parts=None):
    """Runs it in a process of its own, as the runner does; returns the seconds, or raises what it raised."""
    finished = runner.execute_plan([runner.Planned(run, parts or {}, ["test"])], places, echo=lambda line: None)
    return finished[run.name]


def everything_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and path.name != ".lock" and not path.name.endswith(".failed.ipynb")}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good run whose results every fault must leave alone."""
    folder = tmp_path_factory.mktemp("good")
    make(toy_run(write_notebook(folder / "good.ipynb", SETTINGS, WORK)), Places(folder / "out"))
    return Places(folder / "out")


# --- faults

FAULTS = {
    "a cell is no Python": ("def (:", "raised SyntaxError", ""),
    "sys.exit(0) in the middle": ("import sys; sys.exit(0)", "SystemExit", ""),
    "os._exit(0) in the middle": ("import os; os._exit(0)", "died without an answer", "exit status 0"),
    "out of memory on a GPU": ("class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('CUDA out of memory')",
                               "OutOfMemoryError", "batch_size"),
    "parameters changed on the way": ("epochs = 99", "not run with the requested parameters", ""),
    "output not written": ("import pathlib; write = pathlib.Path.write_text; pathlib.Path.write_text = lambda p, t: "
                           "None if p.name == 'metrics.csv' else write(p, t)", "did not write metrics.csv", ""),
    "it leaves a pipe": ("import os; os.mkfifo(output + '/pipe')", "must be a regular file", "pipe"),
    "it leaves an odd name": ("import pathlib; pathlib.Path(output, '.hidden').write_text('x')",
                              "cannot be the name of a file", ".hidden")}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_run_keeps_last_good_output(fault, good, tmp_path):
    code, what, detail = FAULTS[fault]
    before, bad = everything_below(good.root), toy_run(write_notebook(tmp_path / "bad.ipynb", SETTINGS, code, WORK))
    with pytest.raises(CovidSevError, match=what.replace("(", r"\(")) as caught:
        make(bad, good)
    assert detail in str(caught.value) and "Traceback" not in str(caught.value)
    assert everything_below(good.root) == before and not list(good.root.rglob("*.partial"))
    assert "process" in fault or "_exit" in fault or (good.folder(bad) / "toy.failed.ipynb").is_file()


def test_a_cell_that_sleeps_for_ever_is_stopped(good, tmp_path):
    before, started = everything_below(good.root), time.monotonic()
    sleeper = toy_run(write_notebook(tmp_path / "bad.ipynb", SETTINGS, "import subprocess; subprocess.run(['sleep', '600'])"))
    with pytest.raises(NotebookError, match="stopped after 0.05 minutes(.|\n)*--minutes"):
        make(replace(sleeper, minutes=0.05), good)
    assert time.monotonic() - started < 60 and everything_below(good.root) == before
    with run_lock(good.folder(sleeper)):  # nothing that it started holds its lock
        pass


def test_a_hundred_megabytes_of_printing_are_kept_short(tmp_path):
    places = Places(tmp_path / "out")
    loud = "for _ in range(100):\n    print('x' * 1_000_000)\nimport sys; sys.stderr.write('y' * 9); import os; os.write(1, b'z')"
    run = toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, loud, WORK))
    make(run, places)
    executed = places.folder(run) / "executed.ipynb"
    assert executed.stat().st_size < 3_000_000 and "99,000,100 more characters" in executed.read_text()
    assert '"yyyyyyyyy"' in executed.read_text()


def test_failed_notebook_is_removed_by_the_next_success(tmp_path):
    places = Places(tmp_path / "out")
    with pytest.raises(NotebookError, match="toy.failed.ipynb"):
        make(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, "1 / 0")), places)
    failed = places.folder(toy_run(tmp_path)) / "toy.failed.ipynb"
    assert "ZeroDivisionError" in failed.read_text()
    make(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK)), places)
    assert not failed.exists()


def test_what_a_cell_shows_is_in_the_executed_notebook(tmp_path):
    places = Places(tmp_path / "out")
    cell = "from IPython.display import display\nimport pandas\ndisplay('shown')\nprint(repr(get_ipython().ipython_dir))\npandas.DataFrame({'dice': [1]})"
    run = toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK, cell))
    make(run, places)
    outputs = read_json(places.folder(run) / "executed.ipynb")["cells"][-1]["outputs"]
    assert [each["output_type"] for each in outputs] == ["stream", "display_data", "display_data"]
    assert "".join(outputs[0]["text"]) == "''\n"  # a shell with no folder of its own: nothing to leave behind
    assert "<table" in "".join(outputs[2]["data"]["text/html"])


def test_another_kernel_and_another_copy_are_never_used(tmp_path, monkeypatch):
    """A kernelspec `python3` of another Python with another copy of covidsev: this interpreter and this copy run."""
    kernel, other = tmp_path / "kernels/python3", tmp_path / "other/covidsev"
    shutil.copytree(ROOT / "covidsev", other)
    (other / "__init__.py").write_text(f"open({str(tmp_path / 'WRONG')!r}, 'a').write('x')\n")
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "Other", "language": "python",
                                                    "env": {"PYTHONPATH": str(tmp_path / "other")}}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK,
                   "import sys, covidsev; (out / 'metrics.csv').write_text(sys.executable + ' ' + covidsev.__file__)")
    run, places = toy_run(tmp_path / "n.ipynb"), Places(tmp_path / "out")
    make(run, places)
    assert (places.folder(run) / "metrics.csv").read_text() == f"{sys.executable} {ROOT / 'covidsev' / '__init__.py'}"
    assert not (tmp_path / "WRONG").exists()


def test_a_child_with_another_copy_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LIBRARY", tmp_path)
    with pytest.raises(NotebookError, match="another copy of covidsev would run"):
        Child(RUN, toy_run(tmp_path / "n.ipynb"), tmp_path, {}, "").result()


def test_second_run_on_one_folder_is_locked_out_and_a_killed_one_is_not(good, tmp_path):
    before, run = everything_below(good.root), toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK))
    hold = f"from covidsev.core import run_lock; import time\nwith run_lock({str(good.folder(run))!r}):\n print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunLockedError, match=f"process {holder.pid} on ") as caught:
        make(run, good)
    assert caught.value.exit_code == 4 and everything_below(good.root) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    make(run, good)


# --- publishing

def test_a_full_disk_keeps_the_last_good_result_and_the_manifest(tmp_path, monkeypatch):
    """The third file that is written beside its place meets a full disk: nothing is new, nothing is mixed, the manifest is the old one."""
    toys = write_toys(tmp_path)
    reproduce(toys, "train", rows=["plain"], seeds=[0])
    before = everything_below(toys / "out")
    write_notebook(toys / "work.ipynb", TRAIN, RECORD.replace("epochs ** 2", "epochs ** 3"))
    plan = examine(plan_of(toys, "train", rows=["plain"], seeds=[0]), Places(toys / "out"))
    fsync, count = os.fsync, []

    def full(handle):
        count.append(handle)
        if len(count) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(runner.Child, "__init__", lambda self, work, *job, minutes=0: setattr(self, "job", job))
    monkeypatch.setattr(runner.Child, "finished", lambda self: True)

    def here(self):
        try:
            return runner.run_in_child(*self.job)
        except OSError as error:
            kind, what, details = runner._described(error)
            raise getattr(core, kind)(what, **details) from None

    monkeypatch.setattr(runner.Child, "result", here)
    with pytest.raises(CovidSevError, match="cannot be written: No space left on device(.|\n)*plain-seed0"):
        runner.execute_plan(plan, Places(toys / "out"), echo=lambda line: None)
    monkeypatch.setattr(os, "fsync", fsync)
    assert everything_below(toys / "out") == before
    assert {each.status for each in claims.check_sums(Places(toys / "out"), "smoke")} == {"exact"}


def test_a_run_that_fails_leaves_the_manifest_as_it_was(tmp_path):
    toys = write_toys(tmp_path)
    reproduce(toys, "train", rows=["plain"], seeds=[0])
    before = (toys / "out/results/smoke/manifest.json").read_bytes()
    write_notebook(toys / "work.ipynb", TRAIN, RECORD, "1 / 0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        reproduce(toys, "train", rows=["plain"], seeds=[0, 1])
    assert (toys / "out/results/smoke/manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../../victim", "/etc/victim", ""])
def test_a_record_cannot_make_a_run_touch_what_is_not_its_own(tmp_path, name):
    victim, run = tmp_path / "out/victim", toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, WORK))
    write_bytes(victim, b"untouched")
    places = Places(tmp_path / "out")
    write_json(places.folder(run) / "run.json", {"run": run.name, "outputs": {name: "0" * 64}, "cache": {}, "key": "x"})
    for work in (lambda: examine([run], places), lambda: make(run, places), lambda: write_manifest(places, "smoke")):
        with pytest.raises(ConfigError, match="cannot be the name of a file(.|\n)*run.json"):
            work()
    assert victim.read_bytes() == b"untouched"


def test_a_manifest_cannot_name_what_lies_elsewhere(tmp_path):
    write_json(tmp_path / "results/smoke/manifest.json", {"files": [{"path": "../../etc/passwd", "sha256": "0"}]})
    with pytest.raises(ConfigError, match="cannot be the name of a file"):
        claims.check_sums(Places(tmp_path), "smoke")


def test_outputs_that_are_no_longer_written_disappear(tmp_path):
    places, more = Places(tmp_path / "out"), WORK + "(out / 'extra.csv').write_text('x')\n"
    for work, there in ((more, True), (WORK, False)):
        make(toy_run(write_notebook(tmp_path / "n.ipynb", SETTINGS, work)), places)
        assert (places.folder(toy_run(tmp_path)) / "extra.csv").is_file() == there


def test_run_records_say_no_time_place_or_user(good):
    text = (good.folder(toy_run(good.root)) / "run.json").read_text()
    assert str(good.root) not in text and os.uname().nodename not in text
    assert set(json.loads(text)) == {"parameters", "run", "outputs", "cache", "key"}


# --- plans that run

def registry_of(toys):
    return load_registry(toys / "toy.toml")


def plan_of(toys, *only, **options):
    return runner.plan_runs(registry_of(toys), "smoke", only or None, **options)


def reproduce(toys, *only, **options):
    """`reproduce` with the toy registry below toys/out; returns run name -> reasons, and what was printed."""
    lines = []
    plan = runner.reproduce("smoke", only or None, root=toys / "out", registry=registry_of(toys), echo=lines.append, **options)
    return {each.run.name: each.reasons for each in plan}, "\n".join(lines)


@pytest.fixture
def toys(tmp_path):
    return write_toys(tmp_path)


def test_side_by_side_runs_overlap_and_respect_needs(tmp_path):
    slow = write_notebook(tmp_path / "slow.ipynb", SETTINGS, "import time; started = time.time(); time.sleep(2)", WORK,
                          "(out / 'span.txt').write_text(f'{started} {time.time()}')")
    runs = [toy_run(slow, seed=0), toy_run(slow, seed=1), toy_run(slow, seed=2, needs=("toy/a-seed0",))]
    places = Places(tmp_path / "out")
    runner.execute_plan(examine(runs, places), places, jobs=3, echo=lambda line: None)
    spans = [tuple(map(float, (places.folder(run) / "span.txt").read_text().split())) for run in runs]
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
    assert spans[2][0] >= spans[0][1]


def test_a_run_waits_where_memory_is_short(tmp_path):
    run, places = toy_run(tmp_path / "n.ipynb"), Places(tmp_path)
    write_json(places.folder(run) / "timing.json", {"seconds": 1, "peak_mib": 10**9})
    each = runner.Planned(run, {}, [])
    assert [runner.fits(each, places, active, 4) for active in (0, 1)] == [True, False]
    write_json(places.folder(run) / "timing.json", {"seconds": 1, "peak_mib": 1})
    assert [runner.fits(each, places, active, 4) for active in (1, 3, 4)] == [True, True, False]


def test_the_time_that_is_left_is_known_from_earlier_runs(tmp_path):
    run, places, lines = toy_run(tmp_path / "n.ipynb"), Places(tmp_path), []
    write_json(places.folder(run) / "timing.json", {"seconds": 600})
    plan = [runner.Planned(toy_run(tmp_path / "n.ipynb", seed=seed), {}, []) for seed in range(5)]
    report = runner._reporter(plan, places, 2, lines.append)
    for each in plan:
        report(each, 1.0)
    assert [line.partition("about ")[2] for line in lines] == ["25 min left", "20 min left", "15 min left", "10 min left", "10 min left", ""]


def test_a_chain_runs_in_order_and_keys_follow_it(toys):
    _, text = reproduce(toys, "train", rows=["started"], seeds=[1], jobs=2)
    assert text.index("pretext/coach-seed1 ·") < text.index("train/started-seed1 ·")
    record, pretext = (read_json(toys / f"out/results/smoke/{name}-seed1/run.json") for name in ("train/started", "pretext/coach"))
    assert set(record["cache"]["needs"]) == {"pretext/coach-seed1", "priors/fold-seed0"}
    assert record["cache"]["needs"]["pretext/coach-seed1"] == pretext["key"]
    kept = toys / "out/checkpoints/smoke/pretext/coach-seed1" / pretext["key"][:12]
    assert [path.name for path in kept.iterdir()] == ["start.pt"]  # and not last.pt
    listed = read_json(toys / "out/results/smoke/manifest.json")
    about = listed["runs"]["train/started-seed1"]
    assert (about["notebook"], about["commit"], about["parameters"]["start"]) == ("work.ipynb", "abc", "pretext/coach")
    assert about["inputs"] == ["pretext/coach-seed1", "priors/fold-seed0"]
    assert {entry["made_by"] for entry in listed["files"]} == set(listed["runs"])
    write_notebook(toys / "pretext.ipynb", TRAIN, RECORD, KEEP, "1")
    plan, _ = reproduce(toys, "train", rows=["started"], seeds=[1], explain=True)
    assert plan["priors/fold-seed0"] == [] and plan["train/started-seed1"] == ["need pretext/coach-seed1 changed"]


def test_kept_files_are_made_again_only_if_something_starts_from_them(toys):
    reproduce(toys, "train", rows=["started"], seeds=[1])
    for path in (toys / "out/checkpoints").rglob("start.pt"):
        path.unlink()
    plan, _ = reproduce(toys, "train", rows=["started"], seeds=[1])
    assert plan == {"pretext/coach-seed1": [], "priors/fold-seed0": [], "train/started-seed1": []}
    (toys / "out/results/smoke/train/started-seed1/metrics.csv").unlink()
    plan, _ = reproduce(toys, "train", rows=["started"], seeds=[1])
    assert plan["pretext/coach-seed1"] == ["start.pt is not here"] and plan["priors/fold-seed0"] == []
    assert len(list((toys / "out/checkpoints").rglob("start.pt"))) == 1
    assert not any(reproduce(toys, "train", rows=["started"], seeds=[1], explain=True)[0].values())


def test_a_run_that_keeps_or_had_less_than_it_should_fails(toys):
    write_notebook(toys / "pretext.ipynb", TRAIN, RECORD)
    with pytest.raises(NotebookError, match="did not write start.pt"):
        reproduce(toys, "pretext", rows=["coach"], seeds=[0])
    (toys / "toy.toml").write_text(TOY + "\n[profiles.smoke.expects.train]\nn_train = 50\n")
    for had, enough in ((24, False), (50, True)):
        write_notebook(toys / "work.ipynb", TRAIN, RECORD.replace('"commit": "abc"', f'"n_train": {had}'))
        if enough:
            reproduce(toys, "train", rows=["plain"], seeds=[0])
        else:
            with pytest.raises(NotebookError, match="less than its title promises(.|\n)*n_train: 24, not 50"):
                reproduce(toys, "train", rows=["plain"], seeds=[0])
            assert not list((toys / "out/results").rglob("metrics.csv"))


def test_what_is_everything_there_is_may_be_said_in_numbers(tmp_path):
    places = Places(tmp_path / "out")
    notebook = write_notebook(tmp_path / "n.ipynb", SETTINGS + "\nslices = None", WORK.replace('"epochs": epochs', '"epochs": epochs, "slices": 12'))
    make(toy_run(notebook, slices=None), places)
    with pytest.raises(NotebookError, match="slices: 12 instead of 11"):
        make(toy_run(notebook, slices=11), places)


def test_a_figure_with_nothing_to_show_is_skipped_with_a_line_unless_it_was_asked_for(toys):
    nothing = 'from covidsev.core import DataMissingError\nraise DataMissingError("no run has been made")'
    write_notebook(toys / "table.ipynb", 'profile = "smoke"\noutput = ""', nothing)
    plan, text = reproduce(toys, rows=["plain", "coach", "fold"], seeds=[0], jobs=2)
    assert "table · skipped: table has nothing to show yet" in text and re.search(r"train/plain-seed0 · \d+ s", text)
    assert not list((toys / "out").rglob("*.failed.ipynb")) and not list((toys / "out").rglob("*.partial"))
    reproduce(toys, "table", "picture", render_only=True, force=True, strict=False)  # as `covidsev render` draws all
    with pytest.raises(DataMissingError, match="nothing to show yet"):
        reproduce(toys, "table", render_only=True, force=True)


def test_code_that_no_commit_holds_is_refused_where_it_must_be_committed(toys, monkeypatch):
    (toys / "toy.toml").write_text(TOY.replace('title = "toy"', 'title = "toy"\ncommitted = true'))
    monkeypatch.setattr(runner, "git_commit", lambda: "abc-dirty")
    with pytest.raises(ConfigError, match="changes that none holds(.|\n)*--allow-dirty"):
        reproduce(toys, "train", rows=["plain"], seeds=[0])
    assert not (toys / "out").exists()
    reproduce(toys, "train", rows=["plain"], seeds=[0], explain=True)
    reproduce(toys, "train", rows=["plain"], seeds=[0], allow_dirty=True)
    assert read_json(toys / "out/results/smoke/train/plain-seed0/run.json")["allow_dirty"] is True
    reproduce(toys, "train", rows=["plain"], seeds=[0])  # nothing to run, nothing to refuse
    monkeypatch.setattr(runner, "git_commit", lambda: "abc")
    reproduce(toys, "train", rows=["plain"], seeds=[1])
    assert "allow_dirty" not in read_json(toys / "out/results/smoke/train/plain-seed1/run.json")


def test_real_profiles_never_fall_back_to_the_phantom_or_the_cpu(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    silence = {"root": tmp_path / "out", "data": tmp_path, "echo": lambda line: None, "allow_dirty": True}
    with pytest.raises(ConfigError, match="--device cpu"):
        runner.reproduce("paper", **silence)
    for profile, changes in (("cpu", None), ("paper", {"device": "cpu"})):
        with pytest.raises(DataMissingError, match="covidsev data get covid-semiseg"):
            runner.reproduce(profile, overrides=changes, **silence)
    assert not (tmp_path / "out").exists()
