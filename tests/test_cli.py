"""The command line as a user meets it: exit statuses, clean messages, nothing heavy loaded, interruption."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from covidsev.cli import main, run_cleanly
from covidsev.core import CheckpointError, ConfigError, NonFiniteError, RunLockedError, run_lock
from covidsev.paper.experiments import load_registry
from covidsev.severity.inputs import TASKS, Options

COMMAND = [sys.executable, "-c", "from covidsev.cli import main; main()"]
TINY = ["--set", "epochs=1", "--set", "size=32", "--set", "n_train=4", "--set", "n_test=2",
        "--set", "warmup_epochs=0"]


def call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_info_is_quick_and_loads_nothing_heavy():
    code = ("import sys; from covidsev.cli import main\nmain(['info', '--json'], standalone_mode=False)\n"
            "print(*sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'papermill', 'scipy'} & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    facts = json.loads(done.stdout)
    assert facts["packages"]["torch"] and set(facts["profiles"]) >= {"smoke", "cpu", "paper"}


@pytest.mark.parametrize("arguments, said", [
    ("severity /nothere -o {}/out", "No such file or directory"), ("segment {}/fifo -o {}/out", "not a regular file"),
    ("severity {} --window 7 -o {}/out", "two numbers are needed"), ("severity {} --pictures stak -o {}/out", "did you mean 'stack'"),
    ("severity {} --weights {}/fifo -o {}/out", "not a regular file"), ("severity {} --weights /dev/zero -o {}/out", "not a regular file"),
    ("severity {}/loop -o {}/out", "check the path"), ("severity {} -o {}/file", "is a file"),
    ("evaluate --pred /nothere --truth {}", "does not exist"), ("export /nothere -o {}", "does not exist"),
    ("reproduce --profile smoek", "did you mean 'smoke'"), ("train --row unett --out {}", "did you mean 'unet'"), ("bench step", "unknown benchmark")])
def test_what_is_wrong_with_the_words_is_said_before_anything_heavy_is_loaded(arguments, said, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code = ("import sys; from covidsev.cli import main, run_cleanly; sys.argv[0] = 'covidsev'\ntry:\n    main()\nfinally:\n"
            "    print('loaded:', *sorted({'torch', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, *arguments.format(*[tmp_path] * 3).split()], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.strip() == "loaded:" and not (tmp_path / "out").exists()


def test_the_command_has_every_option_and_the_class_too():
    """One list: `Options`; the help shows it in its groups."""
    text = call("severity", "--help")[1]
    for each in fields(Options):
        if each.metadata:
            assert f"--{each.name.replace('_', '-')} " in text and f"{each.metadata['group']}:" in text
            assert (f"--{each.name.replace('_', '-')} " in call("segment", "--help")[1]) == ("segment" in each.metadata.get("tasks", TASKS))


def test_help_shows_each_command_once_with_a_whole_sentence():
    text = call("--help")[1]
    listed = [name for names in main.sections.values() for name in names.split()]
    assert sorted(listed) == sorted(main.commands) and "..." not in (text + call("data", "--help")[1]).replace("[ARGS]...", "")
    shown, *_ = re.findall(r"--profile (\S+)", call("reproduce", "--help")[1])
    assert set(shown.split("|")) == set(load_registry().profiles)
    for name in listed:
        assert f"\n  {name} " in text


def test_colour_only_where_it_is_wanted():
    coloured, plain = (CliRunner(env={"NO_COLOR": value, "TERM": "xterm"}).invoke(main, ["--help"], color=True).output for value in ("", "1"))
    assert "\x1b[1mScans" in coloured and "\x1b" not in plain and "Scans:" in plain


def test_a_wrong_row_is_answered_in_few_words(tmp_path):
    text = call("reproduce", "--row", "unett", "--out", tmp_path)[1]
    assert "did you mean 'unet'?" in text and len(text) < 200


@pytest.mark.parametrize("name, notebook", [
    ("infnet", "nbs/2_method/03_infnet.ipynb"), ("03_infnet.ipynb", "nbs/2_method/03_infnet.ipynb"), ("CoachNet", "nbs/2_method/07_coach.ipynb"),
    ("table2", "nbs/experiments/table2_dice.ipynb"), ("coach.png", "nbs/experiments/figure_coach.ipynb"),
    ("tables/claims.csv", "nbs/experiments/findings.ipynb"), ("figures/cpu/coach.svg", "nbs/experiments/figure_coach.ipynb")])
def test_where_knows_modules_notebooks_tables_and_figures(name, notebook):
    assert notebook in call("where", name)[1]


def test_console_script_is_installed():
    script = Path(sys.executable).parent / "covidsev"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("covidsev, version ")


@pytest.mark.parametrize("error, status", [(ConfigError("x"), 2), (RunLockedError("x"), 4), (CheckpointError("x"), 5),
                                           (NonFiniteError("x"), 1), (OSError(28, "No space left on device", "file"), 1),
                                           (KeyboardInterrupt(), 130)])
def test_each_error_has_its_status(error, status, capsys):
    def fail():
        raise error

    assert run_cleanly(fail) == status
    assert "Traceback" not in capsys.readouterr().err


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_cleanly(lambda: 1 / 0)


@pytest.mark.parametrize("arguments, hint", [
    ("reproduce --row sinfnet_aug_0.6", "did you mean 'sinfnet_aug_0.5'?"),
    ("reproduce --only train_singel", "did you mean 'train_single'?"),
    ("reproduce --set learning_rat=1", "did you mean 'learning_rate'?"), ("reproduce --set epochs", "for example: epochs=2"),
    ("reproduce --jobs 0", "at least 1"), ("reproduce --seed one", "--seed"), ("nonsense", "nonsense"),
    ("render train_single", "cannot be rendered"), ("render", "covidsev reproduce --profile smoke")])
def test_usage_errors(arguments, hint, tmp_path):
    status, text = call(*arguments.split(), *(["--out", tmp_path] if arguments != "nonsense" else []))
    assert status == 2 and hint in text and "Traceback" not in text
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("arguments", ["reproduce --profile cpu --allow-dirty", "reproduce --profile paper --device cpu",
                                       "train --profile cpu"])
def test_missing_data_says_how_to_get_them(arguments, tmp_path):
    status, text = call(*arguments.split(), "--data-root", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "covidsev data get covid-semiseg" in text
    assert not list(tmp_path.rglob("*.csv"))


def test_data_root_that_is_not_there(tmp_path):
    status, text = call("reproduce", "--profile", "cpu", "--data-root", tmp_path / "nowhere")
    assert status == 2 and "nowhere" in text


def test_data_get_without_network_names_the_way_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    status, text = call("data", "get", "covid-semiseg", "--root", tmp_path, "--url", "http://127.0.0.1:9/archive.zip")
    assert status == 2 and "by hand" in text and "Traceback" not in text


def test_data_check_of_real_data(data_root):
    status, text = call("data", "check", "--root", data_root)
    assert status == 0 and "COVID-SemiSeg" in text and "0 faults" in text


def test_locked_run_is_status_4(tmp_path):
    folder = tmp_path / "results/smoke/train_single/unet-seed0"
    with run_lock(folder):
        status, text = call("reproduce", "--only", "train_single", "--row", "unet", "--seed", "0", "--out", tmp_path, *TINY)
    assert status == 4 and f"process {os.getpid()} on " in text
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_train_then_damaged_checkpoint_is_status_5(tmp_path):
    status, text = call("train", "--row", "unet", "--out", tmp_path, *TINY)
    assert status == 0 and "dice" in text
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    status, text = call("train", "--row", "unet", "--out", tmp_path, *TINY)
    assert status == 5 and "Traceback" not in text


def test_evaluate_writes_what_it_prints(tmp_path):
    for name in ("maps", "masks"):
        (tmp_path / name).mkdir()
    mask = np.zeros((80, 80), np.uint8)
    mask[20:40, 20:60] = 255
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    Image.fromarray(mask[::2, ::2]).save(tmp_path / "maps/a.png")  # half the size: the map is resized, never the mask
    status, text = call("evaluate", "--pred", tmp_path / "maps", "--truth", tmp_path / "masks", "--out", tmp_path / "out")
    assert status == 0 and "meanDice" in text
    assert (tmp_path / "out/summary.csv").read_text().startswith("metric,value\n")
    assert "a" in (tmp_path / "out/per_image.csv").read_text().splitlines()[1].split(",")[0]

def test_evaluate_writes_no_formula(tmp_path):
    stems = ("=cmd|x", "@SUM(1)", "+1", "-1+2", "plain")
    for name in ("maps", "masks"):
        (tmp_path / name).mkdir()
        for stem in stems:
            Image.fromarray(np.eye(80, dtype=np.uint8) * 255).save(tmp_path / name / f"{stem}.png")
    status, _ = call("evaluate", "--pred", tmp_path / "maps", "--truth", tmp_path / "masks", "--out", tmp_path / "out")
    lines = (tmp_path / "out/per_image.csv").read_text().splitlines()[1:]
    assert status == 0 and {line.partition(",")[0] for line in lines} == {*(f"'{stem}" for stem in stems[:-1]), "plain"}


def test_a_rehearsal_tries_every_way_once_and_says_what_it_costs(repository):
    before = sorted((repository / "results").rglob("*"))
    status, text = call("reproduce", "--rehearse", "--profile", "smoke", "--only", "train_single", "--row", "unet", "--row", "sinfnet_self")
    assert status == 0, text
    table = pd.read_csv(StringIO(text.partition("rehearsal.csv\n")[2])).set_index("row")
    assert {"unet", "sinfnet_self"} < set(table.index) and any(row.startswith("infnet_coach") for row in table.index)
    assert (table.iloc[:-1][["parameters_m", "memory_mib", "tried_mib", "steps", "tera_operations", "minutes"]] > 0).all(axis=None)
    assert sorted((repository / "results").rglob("*")) == before


def test_interrupted_reproduce_is_status_130_and_leaves_no_process(tmp_path):
    arguments = ["reproduce", "--only", "train_single", "--row", "unet", "--seed", "0", "--out", tmp_path, *TINY[2:],
                 "--set", "save_every=5", "--set", "epochs=5000"]
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert wait_until(lambda: list((tmp_path / "checkpoints").rglob("last.pt")), 90)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "interrupted" in errors
    assert not list((tmp_path / "results").rglob("metrics.csv"))
    assert wait_until(lambda: not processes_with(tmp_path))


def test_killed_reproduce_leaves_no_process_and_a_rerun_goes_on(tmp_path):
    arguments = ["reproduce", "--only", "train_single", "--row", "unet", "--seed", "0", "--out", tmp_path, *TINY[2:],
                 "--set", "save_every=5", "--set", "epochs=20"]
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: list((tmp_path / "checkpoints").rglob("last.pt")), 90)
    process.kill()
    process.wait()
    assert wait_until(lambda: not processes_with(tmp_path), 40)
    status, text = call(*arguments)
    assert status == 0 and len((tmp_path / "results/smoke/train_single/unet-seed0/history.csv").read_text().splitlines()) == 21


def wait_until(condition, seconds=30.0):
    """Whether `condition` became true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return bool(condition())


def processes_with(folder):
    """Processes that were started for a run below `folder`: they have its lock or its executed notebook open, or stand in it."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *(file.path for file in process.open_files())]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process.pid)
    return found
