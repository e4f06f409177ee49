"""Faults of the notebook runner, with real kernels: rows 46 to 51, 61 and 68 of the fault matrix, and the registry itself."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given, strategies as st
from papermill import PapermillExecutionError
from toys import experiment, table, write_notebook

from covidsev.paper import experiments
from covidsev.core import ConfigError, CovidSevError, DataMissingError, NotebookError, RunLockedError, repo_root
from covidsev.paper.experiments import (Places, Run, check_manifest, lint_notebook, load_registry, notebook_parameters, parse_settings,
                                  plan_runs, run_notebook)
from covidsev.core import read_json, run_lock
from covidsev.paper.keys import cache_key

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


@pytest.mark.parametrize("text, value", [
    ("1", 1), (" 1e-4 ", 1e-4), ("-2", -2), ("None", None), ("True", True), ("False", False), ("[0.5, 1.0]", [0.5, 1.0]),
    ("('a', 1)", ("a", 1)), ("{'a': [None]}", {"a": [None]}), ("'7'", "7"), ("'true'", "true"), ("none", "none"), ("phantom", "phantom"),
    ("x=y", "x=y"), ("a b", "a b"), ("", ""), ("1.0.0", "1.0.0"), ("[1, 2", "[1, 2"), ("{[1]: 2}", "{[1]: 2}"), ("(" * 999, "(" * 999)])
def test_a_setting_is_what_python_reads_or_the_text(text, value):
    assert parse_settings([f"start={text}"]) == {"start": value}
    assert type(parse_settings([f" start = {text}"])["start"]) is type(value)


JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@given(JSON_VALUES)
def test_a_setting_that_python_wrote_is_read_back(value):
    """As `covidsev.paper.workflow` hands settings on to its jobs."""
    assert parse_settings([f"x={value!r}"]) == {"x": value}


@pytest.mark.parametrize("pair, why", [("epochs", "NAME=VALUE"), ("=2", "NAME=VALUE"), (" = 2", "NAME=VALUE"), ("", "NAME=VALUE"),
                                       ("tta=true", "tta=True"), ("tta= false", "tta=False"), ("start=null", "start=None")])
def test_a_setting_without_name_or_in_another_spelling_is_refused(pair, why):
    with pytest.raises(ConfigError, match=why):
        parse_settings(["size=64", pair])


def test_of_a_setting_given_twice_the_last_counts():
    assert parse_settings(["a=1", "b=2", "a=3"]) == {"a": 3, "b": 2} and parse_settings(()) == {}


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
    hold = f"from covidsev.core import run_lock; import time\nwith run_lock({str(places.folder(run))!r}):\n print('held', flush=True); time.sleep(60)"
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
    slow = write_notebook(tmp_path / "slow.ipynb", SETTINGS, "import time; started = time.time(); time.sleep(3)", WORK,
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


CHAIN = ["pretext/coach", "priors/fold@0"]
TOY = "".join([
    table("profiles.smoke", title="toy", seeds=[0, 1],
          rows={"train": ["plain", "started", "loop"], "pretext": ["coach", "random"], "priors": ["fold"]}),
    experiment("table", "table.ipynb", needs=["train"]),
    experiment("picture", "table.ipynb", needs=CHAIN),
    experiment("train", rows={
        "plain": {"parameters": {"row": "plain"}},
        "started": {"parameters": {"start": "pretext/coach"}, "needs": CHAIN},
        "loop": {"parameters": {"start": "labels/loop"}, "needs": ["labels/loop"]},
        "spare": {"needs": ["pretext/spare"]}}),  # named in no profile
    experiment("pretext", "pretext.ipynb", {"coach": {}, "random": {}, "spare": {}}, keeps=["start.pt"]),
    experiment("labels", rows={"loop": {"needs": ["train/plain"]}}),
    experiment("priors", rows={"fold": {}}),
])
TRAIN = 'profile = "smoke"\nrow = "a"\nseed = 0\nepochs = 3\nstart = ""\noutput = ""\ncheckpoints = ""'
RECORD = """
import json, pathlib
out, kept = pathlib.Path(output), pathlib.Path(checkpoints)
kept.mkdir(parents=True, exist_ok=True)
said = {"profile": profile, "row": row, "seed": seed, "epochs": epochs, "start": start}
(out / "run.json").write_text(json.dumps({"parameters": said, "commit": "abc"}))
(out / "metrics.csv").write_text(f"{row} {seed} {epochs ** 2}")
"""
KEEP = "(kept / 'start.pt').write_text(f'weights {seed}')\n(kept / 'last.pt').write_text('state')"


class InThisProcess:
    """Stands in for `Child`: the same run, at once and here."""

    process = SimpleNamespace(poll=lambda: 0)

    def __init__(self, planned, places, data, progress_bar=False):
        try:
            self.answer = run_notebook(planned.run, places, planned.parts, data)
        except CovidSevError as error:
            self.answer = error

    def result(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def without_kernel(notebook, executed, parameters, progress_bar):
    """Stands in for papermill where a test is about plans and keys: a kernel takes seconds to start."""
    content, names = nbformat.read(notebook, 4), {}
    for number, cell in enumerate(content.cells):
        try:
            exec(cell.source, names)
        except Exception as error:
            raise PapermillExecutionError(number, number, cell.source, type(error).__name__, str(error), []) from None
        names.update(parameters if number == 0 else {})
        cell.execution_count = number + 1
    nbformat.write(content, executed)


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A registry with needs of all kinds, and its small notebooks, to edit."""
    monkeypatch.setattr(experiments, "Child", InThisProcess)
    monkeypatch.setattr(experiments, "_papermill", without_kernel)
    write_notebook(tmp_path / "work.ipynb", TRAIN, RECORD)
    write_notebook(tmp_path / "pretext.ipynb", TRAIN, RECORD, KEEP)
    write_notebook(tmp_path / "table.ipynb", 'profile = "smoke"\noutput = ""',
                   "import json, pathlib; (pathlib.Path(output) / 'run.json').write_text(json.dumps({'parameters': {'profile': profile}}))")
    (tmp_path / "toy.toml").write_text(TOY)
    return tmp_path


def planned_names(toys, *only, **options):
    return [run.name for run in plan_runs(load_registry(toys / "toy.toml"), "smoke", only or None, **options)]


def make(toys, *only, **options):
    """`reproduce` with the toy registry below toys/out; returns the plan and what was printed."""
    lines = []
    plan = experiments.reproduce("smoke", only or None, root=toys / "out", registry=load_registry(toys / "toy.toml"),
                                 echo=lines.append, **options)
    return {each.run.name: each.reasons for each in plan}, "\n".join(lines)


def test_a_row_brings_exactly_the_rows_that_it_needs(toys):
    assert planned_names(toys, "train", rows=["started"], seeds=[1]) == ["pretext/coach-seed1", "priors/fold-seed0", "train/started-seed1"]
    assert planned_names(toys, "train", rows=["plain"]) == ["train/plain-seed0", "train/plain-seed1"]
    assert planned_names(toys, "train", rows=["loop"], seeds=[0]) == ["train/plain-seed0", "labels/loop-seed0", "train/loop-seed0"]
    assert planned_names(toys, "train", rows=["spare"], seeds=[5]) == ["pretext/spare-seed5", "train/spare-seed5"]
    assert planned_names(toys, "pretext", seeds=[0]) == ["pretext/coach-seed0", "pretext/random-seed0"]


def test_a_profile_may_set_what_one_row_sets_otherwise(toys):
    """Defaults, then profile, then row, then the row in this profile, then what is asked for."""
    name, more = toys / "toy.toml", '\n[profiles.smoke.parameters."train/started"]\nepochs = 7\n'
    name.write_text(TOY + more)
    registry = load_registry(name)
    epochs = {row: experiments.resolve(registry, "smoke", "train", row, 0).parameters["epochs"] for row in ("plain", "started")}
    assert epochs["started"] == 7 != epochs["plain"]
    assert experiments.resolve(registry, "smoke", "train", "started", 0, {"epochs": 9}).parameters["epochs"] == 9
    name.write_text(TOY + more.replace("started", "startled"))
    with pytest.raises(ConfigError, match="row of train in profile smoke 'startled'"):
        load_registry(name)


def test_tables_are_content_with_the_rows_that_were_asked_for(toys):
    assert planned_names(toys, "table", rows=["plain"], seeds=[0]) == ["train/plain-seed0", "table"]
    assert planned_names(toys, "table", rows=["started"], seeds=[1]) == [
        "pretext/coach-seed1", "priors/fold-seed0", "train/started-seed1", "table"]
    assert planned_names(toys, "picture") == ["pretext/coach-seed0", "pretext/coach-seed1", "priors/fold-seed0", "picture"]
    assert planned_names(toys, "picture", rows=["coach"], seeds=[1]) == ["pretext/coach-seed1", "picture"]
    assert planned_names(toys, "table", with_needs=False) == ["table"]


def test_everything_is_planned_once_after_what_it_needs(toys):
    registry = load_registry(toys / "toy.toml")
    runs = plan_runs(registry, "smoke")
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 2 + 1 * 2 + 2 + 2  # train, pretext, priors, labels (needed only), render
    assert all(names.index(need) < names.index(run.name) for run in runs for need in run.needs)
    assert [run.needs for run in runs if run.name == "train/started-seed1"] == [("pretext/coach-seed1", "priors/fold-seed0")]
    assert {run.keeps for run in runs if run.experiment == "pretext"} == {("start.pt",)}
    assert experiments.needed_runs(registry, "smoke", "picture", "", None) == (
        "pretext/coach-seed0", "pretext/coach-seed1", "priors/fold-seed0")


@pytest.mark.parametrize("old, new, why", [
    ('needs = ["train/plain"]', 'needs = ["train/loop"]', "circle"),
    ('needs = ["train/plain"]', 'needs = ["train"]', "circle"),
    ('needs = ["train/plain"]', 'needs = ["train/plian@0"]', "did you mean 'plain'"),
    ('needs = ["train/plain"]', 'needs = ["train/plain@first"]', "not a need"),
    ('needs = ["train/plain"]', 'needs = ["train@0"]', "not a need"),
    ('keeps = ["start.pt"]', 'keep = ["start.pt"]', "did you mean 'keeps'"),
])
def test_faults_of_needs_are_found_in_the_registry(toys, old, new, why):
    (toys / "toy.toml").write_text(TOY.replace(old, new))
    with pytest.raises(ConfigError, match=why):
        load_registry(toys / "toy.toml")


def test_a_chain_runs_in_order_and_keys_follow_it(toys):
    _, text = make(toys, "train", rows=["started"], seeds=[1], jobs=2)
    assert text.index("pretext/coach-seed1 ·") < text.index("train/started-seed1 ·")
    record = read_json(toys / "out/results/smoke/train/started-seed1/run.json")
    pretext = read_json(toys / "out/results/smoke/pretext/coach-seed1/run.json")
    assert set(record["cache"]["needs"]) == {"pretext/coach-seed1", "priors/fold-seed0"}
    assert record["cache"]["needs"]["pretext/coach-seed1"] == pretext["key"]
    kept = toys / "out/checkpoints/smoke/pretext/coach-seed1" / pretext["key"][:12]
    assert [path.name for path in kept.iterdir()] == ["start.pt"]  # and not last.pt
    write_notebook(toys / "pretext.ipynb", TRAIN, RECORD, KEEP, "1")
    plan, _ = make(toys, "train", rows=["started"], seeds=[1], explain=True)
    assert plan["priors/fold-seed0"] == [] and plan["train/started-seed1"] == ["need pretext/coach-seed1 changed"]


def test_kept_files_are_made_again_only_if_something_starts_from_them(toys):
    make(toys, "train", rows=["started"], seeds=[1], jobs=2)
    for path in (toys / "out/checkpoints").rglob("start.pt"):
        path.unlink()
    plan, _ = make(toys, "train", rows=["started"], seeds=[1])
    assert plan == {"pretext/coach-seed1": [], "priors/fold-seed0": [], "train/started-seed1": []}
    (toys / "out/results/smoke/train/started-seed1/metrics.csv").unlink()
    plan, _ = make(toys, "train", rows=["started"], seeds=[1], jobs=2)
    assert plan["pretext/coach-seed1"] == ["start.pt is not here"] and plan["priors/fold-seed0"] == []
    assert len(list((toys / "out/checkpoints").rglob("start.pt"))) == 1
    plan, _ = make(toys, "train", rows=["started"], seeds=[1], explain=True)
    assert not any(plan.values())


def test_a_run_that_does_not_keep_what_it_should_fails(toys):
    write_notebook(toys / "pretext.ipynb", TRAIN, RECORD)
    with pytest.raises(NotebookError, match="did not write start.pt"):
        make(toys, "pretext", rows=["coach"], seeds=[0])
    assert not list((toys / "out/results").rglob("metrics.csv"))


NEWER = TRAIN.replace('start = ""', 'start = ""\nextra = 0'), RECORD.replace('"start": start', '"start": start, "extra": extra')


def test_confirm_keeps_the_other_seeds_and_their_weights(toys):
    """Pretext and training both get new code: one seed of each is run, the rest follows, kept weights move to the new key."""
    make(toys, "train", rows=["started"], jobs=2)
    before = {path: path.read_bytes() for path in (toys / "out/results").rglob("metrics.csv")}
    write_notebook(toys / "work.ipynb", *NEWER)
    write_notebook(toys / "pretext.ipynb", NEWER[0], NEWER[1], KEEP)
    _, text = make(toys, "train", rows=["started"], explain=True, confirm=True)
    assert "train/started-seed1  kept if train/started-seed0 stays the same" in text and "pretext/coach-seed0  run: " in text
    plan, text = make(toys, "train", rows=["started"], jobs=2, confirm=True)
    assert not any(plan.values())
    assert [line.split(" · ")[0] for line in text.splitlines() if "kept:" in line] == ["pretext/coach-seed1", "train/started-seed1"]
    assert {path: path.read_bytes() for path in before} == before
    for name in ("pretext/coach", "train/started"):
        seeds = [read_json(toys / f"out/results/smoke/{name}-seed{seed}/run.json") for seed in (0, 1)]
        assert seeds[1]["confirmed_by"] == {"run": f"{name}-seed0", "commit": "abc"} and "confirmed_by" not in seeds[0]
        assert seeds[1]["parameters"]["extra"] == 0 and len(seeds[1]["same_as"]) == 1
        weights = toys / "out/checkpoints/smoke" / f"{name}-seed1"
        assert [path.name for path in weights.iterdir()] == [seeds[1]["key"][:12]]
    assert next((toys / "out/checkpoints/smoke/pretext/coach-seed1").rglob("start.pt")).read_text() == "weights 1"
    assert not any(make(toys, "train", rows=["started"], explain=True)[0].values())  # without --confirm too
    assert check_manifest(Places(toys / "out"), "smoke") == []


@pytest.mark.parametrize("change", ["the result", "an old parameter", "a file", "the data"])
def test_confirm_keeps_nothing_else(toys, change, monkeypatch):
    make(toys, "train", rows=["plain"], jobs=2)
    work, overrides = NEWER[1], None
    if change == "the result":
        work = work.replace("epochs ** 2", "epochs ** 3")
    if change == "an old parameter":
        overrides = {"epochs": 4}
    if change == "a file":
        (toys / "out/results/smoke/train/plain-seed1/metrics.csv").write_text("edited")
    if change == "the data":
        monkeypatch.setattr(experiments, "data_key", lambda *_: {"train": "0" * 64})
    write_notebook(toys / "work.ipynb", NEWER[0], work)
    plan, text = make(toys, "train", rows=["plain"], jobs=2, confirm=True, overrides=overrides)
    assert plan["train/plain-seed1"] and "kept:" not in text
    records = [read_json(toys / f"out/results/smoke/train/plain-seed{seed}/run.json") for seed in (0, 1)]
    assert "confirmed_by" not in records[1] and records[1]["parameters"]["extra"] == 0
    assert not any(make(toys, "train", rows=["plain"], explain=True, overrides=overrides)[0].values())


def test_confirm_does_not_speak_for_seeds_of_another_code(toys):
    """Seed 1 was made by the first notebook, seed 0 by the second: seed 0 says nothing about the first one."""
    make(toys, "train", rows=["plain"], jobs=2)
    write_notebook(toys / "work.ipynb", TRAIN, RECORD.replace("epochs ** 2", "epochs ** 4"))
    make(toys, "train", rows=["plain"], seeds=[0])
    write_notebook(toys / "work.ipynb", TRAIN, RECORD.replace("epochs ** 2", "epochs ** 4"), "1")
    _, text = make(toys, "train", rows=["plain"], jobs=2, confirm=True)
    assert "kept:" not in text
    assert (toys / "out/results/smoke/train/plain-seed1/metrics.csv").read_text().endswith("81")


def test_confirm_of_one_seed_first_and_the_others_later(toys):
    make(toys, "train", rows=["plain"], jobs=2)
    write_notebook(toys / "work.ipynb", *NEWER)
    make(toys, "train", rows=["plain"], seeds=[0])  # an ordinary run leaves the evidence too
    _, text = make(toys, "train", rows=["plain"], confirm=True)
    assert text.splitlines()[0] == "train/plain-seed1 · kept: train/plain-seed0 came out the same" and "[1/1]" not in text


def test_confirm_understands_records_of_whole_modules(toys):
    """Earlier records hold one hash for each module: they differ from today's in form alone, and count as other code."""
    make(toys, "train", rows=["plain"], jobs=2)
    for seed in (0, 1):
        path = toys / f"out/results/smoke/train/plain-seed{seed}/run.json"
        record = read_json(path)
        record["cache"]["modules"] = {"covidsev.method.training": "0" * 64}
        record["key"] = cache_key(record["cache"])
        path.write_text(json.dumps(record))
    plan, _ = make(toys, "train", rows=["plain"], explain=True)
    assert plan["train/plain-seed1"] == ["module covidsev.method.training is gone"]
    plan, text = make(toys, "train", rows=["plain"], confirm=True)
    assert not any(plan.values()) and text.count("kept:") == 1


def test_confirm_of_a_failing_run_confirms_nothing(toys):
    make(toys, "train", rows=["plain"], jobs=2)
    write_notebook(toys / "work.ipynb", TRAIN, RECORD, "1 / 0")
    with pytest.raises(NotebookError, match="ZeroDivisionError"):
        make(toys, "train", rows=["plain"], jobs=2, confirm=True)
    assert make(toys, "train", rows=["plain"], explain=True)[0]["train/plain-seed1"] == ["notebook work.ipynb changed"]


def test_words_of_the_registry_make_tables_old_and_networks_not(toys):
    registry = load_registry(toys / "toy.toml")
    runs = {run.name: run for run in plan_runs(registry, "smoke", ["table"], ["plain"], [0])}
    (toys / "toy.toml").write_text(TOY.replace('title = "Plain"', 'title = "Plain, as in Table I"'))
    other = {run.name: run for run in plan_runs(load_registry(toys / "toy.toml"), "smoke", ["table"], ["plain"], [0])}
    parts = [{name: experiments.cache_parts(run, {}, {}) for name, run in each.items()} for each in (runs, other)]
    assert parts[0]["train/plain-seed0"] == parts[1]["train/plain-seed0"] and parts[0]["table"] != parts[1]["table"]


NOTHING = """
from covidsev.core import DataMissingError
raise DataMissingError("no run with or without pretext has been made")
"""


def test_a_figure_with_nothing_to_show_is_skipped_with_a_line_unless_it_was_asked_for(toys):
    write_notebook(toys / "table.ipynb", 'profile = "smoke"\noutput = ""', NOTHING)
    plan, text = make(toys, rows=["plain", "coach", "fold"], seeds=[0], jobs=2)
    assert "table · skipped: table has nothing to show yet" in text and "train/plain-seed0 · 0 s" in text
    assert not list((toys / "out").rglob("*.failed.ipynb")) and not list((toys / "out").rglob("*.partial"))
    make(toys, "table", "picture", render_only=True, force=True, strict=False)  # as `covidsev render` draws all: no error
    with pytest.raises(DataMissingError, match="nothing to show yet"):
        make(toys, "table", render_only=True, force=True)


def test_other_names_of_a_figure_find_it(toys):
    (toys / "toy.toml").write_text(TOY.replace('title = "Picture"', 'title = "Picture"\nalso = ["figure3"]'))
    registry = load_registry(toys / "toy.toml")
    assert [experiments.find_experiment(registry, name) for name in ("figure3", "pict", "table")] == ["picture", "picture", "table"]
    with pytest.raises(ConfigError, match="did you mean 'table'"):
        experiments.find_experiment(registry, "tabel")


def test_manifest_says_where_each_file_comes_from(toys):
    make(toys, "train", rows=["started"], seeds=[1], jobs=2)
    listed = read_json(toys / "out/results/smoke/manifest.json")
    about = listed["runs"]["train/started-seed1"]
    assert about["notebook"] == "work.ipynb" and about["commit"] == "abc" and about["parameters"]["start"] == "pretext/coach"
    assert about["inputs"] == ["pretext/coach-seed1", "priors/fold-seed0"]
    assert {entry["made_by"] for entry in listed["files"]} == set(listed["runs"])
    assert {entry["path"].rpartition(".")[2]: entry["tolerance"]["compare"] for entry in listed["files"]} == {"csv": "numbers", "json": "bytes"}


def test_data_key_knows_the_unlabelled_pool(data_root, tmp_path):
    """Names and sizes of the pool count where it is read, and nowhere else."""
    settings = {"data": "covid-semiseg", "size": 64, "n_train": 4, "val_slices": 2, "split_seed": 0}
    plain = experiments.data_key({**settings, "images": "labelled"}, data_root)
    assert set(plain) == {"train", "val", "test"}
    pool = experiments.data_key({**settings, "images": "unlabelled"}, data_root)
    assert pool.pop("pool") == experiments.pool_key(data_root) and pool == plain
    assert "pool" in experiments.data_key({**settings, "source": "released", "n_unlabelled": 0}, data_root)
    assert experiments.data_key({**settings, "data": "phantom", "images": "unlabelled"}) == {}


def test_pool_key_changes_with_names_and_sizes(tmp_path, monkeypatch):
    from covidsev.data import datasets

    for name in ("Imgs/a.jpg", "Imgs/b.jpg", "GT/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    monkeypatch.setattr(datasets, "load_unlabelled", lambda root: SimpleNamespace(paths=sorted((tmp_path / "Imgs").iterdir())))
    keys = [experiments.pool_key()]
    (tmp_path / "GT/a.png").write_bytes(b"123456")
    keys.append(experiments.pool_key())
    (tmp_path / "Imgs/b.jpg").rename(tmp_path / "Imgs/c.jpg")
    keys.append(experiments.pool_key())
    assert len(set(keys)) == 3 and experiments.pool_key() == keys[2]


def test_every_experiment_notebook_is_registered_and_clean():
    registry = load_registry()
    folder = registry.folder
    assert {path.name for path in folder.glob("*.ipynb")} == {each.notebook.name for each in registry.experiments.values()}
    for path in folder.glob("*.ipynb"):
        assert lint_notebook(path) == []
        notebook = nbformat.read(path, 4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(notebook.cells) <= 60, path
        assert all(len(cell.source.splitlines()) <= 12 for cell in code[1:]), path
        assert not any(cell.outputs for cell in code), f"{path} is committed with outputs"


def test_render_notebooks_cannot_train():
    registry = load_registry()
    for each in registry.experiments.values():
        modules = experiments.library_key(Run("smoke", each.name, "", None, each.kind, each.notebook, {}, (), ()))
        assert "covidsev.method.training" not in modules or each.kind == "compute", each.name
        assert "covidsev.method.training" in modules or not each.name.startswith("train_"), each.name
        if each.name.split("_")[0] in ("train", "pretext", "priors", "pseudo"):  # drawing must not make a network old
            assert not {"covidsev.data.show", "covidsev.paper.tables", "covidsev.paper.experiments", "covidsev.cli"} & set(modules)


def test_profiles_state_their_device_and_data():
    for name, profile in load_registry().profiles.items():
        parameters = profile.parameters["train_single"]
        assert parameters["device"] == {"smoke": "cpu", "cpu": "cpu", "paper": "cuda"}[name]
        assert (parameters["data"] == "phantom") == (name == "smoke")
        assert len(profile.seeds) >= (1 if name == "smoke" else 3)


def test_run_records_say_no_time_place_or_user(good):
    text = (good.folder(toy_run(good.root)) / "run.json").read_text()
    assert str(good.root) not in text and os.uname().nodename not in text
    assert set(read_json(good.folder(toy_run(good.root)) / "run.json")) == {
        "parameters", "run", "environment", "outputs", "cache", "key"}
