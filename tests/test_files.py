"""Hashes, atomic files, folders, locks and the environment: properties, and the accidents that they are there for."""
import errno
import json
import math
import os
import stat
import subprocess
import sys
import warnings
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from covidsev import core
from covidsev.core import ConfigError, RunLockedError

PLAIN = st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False,
                                                                           allow_infinity=False) | st.text(max_size=8)


def python(code: str, *, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """A fresh Python that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden files too."""
    return sorted(os.listdir(folder))


# --- hashes and JSON

@given(st.dictionaries(st.text(max_size=5), PLAIN | st.lists(PLAIN, max_size=3), max_size=6))
def test_json_hash_ignores_order_and_survives_a_round_trip(value):
    backwards = dict(reversed(list(value.items())))
    assert core.sha256_json(value) == core.sha256_json(backwards)
    assert core.sha256_json(json.loads(json.dumps(value))) == core.sha256_json(value)


def test_numpy_tensors_and_plain_numbers_hash_alike():
    import torch

    plain = {"a": [1, 2], "b": 0.5, "c": True}
    assert core.sha256_json({"a": np.array([1, 2]), "b": np.float64(0.5), "c": np.bool_(True)}) \
        == core.sha256_json({"a": torch.tensor([1, 2]), "b": torch.tensor(0.5), "c": True}) \
        == core.sha256_json(plain)


def test_write_json_is_sorted_stable_and_has_no_nan(tmp_path):
    value = {"b": np.float32(0.25), "a": [math.nan, math.inf, -math.inf, 1], "ä": Path("x/y"), "c": {2, 1}}
    core.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_bytes()
    core.write_json(tmp_path / "x.json", dict(reversed(list(value.items()))))
    assert text == (tmp_path / "x.json").read_bytes() and text.endswith(b"}\n") and b"\r" not in text
    assert core.read_json(tmp_path / "x.json") == \
        {"a": [None, None, None, 1], "b": 0.25, "c": [1, 2], "ä": "x/y"}
    assert b"NaN" not in text and b"Infinity" not in text


@pytest.mark.parametrize("content", [b"", b"{", b"<html>", b"\xff\xfe", b"[" * 10**5])
def test_read_json_names_a_file_that_is_not_json(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match="run.json"):
        core.read_json(tmp_path / "run.json")


# --- CSV


def test_csv_is_plain_and_the_same_every_time(tmp_path):
    frame = pd.DataFrame({"id": ["ä", "b,c"], "value": [1 / 3, math.nan]}, index=[5, 6])
    core.write_csv(tmp_path / "x.csv", frame)
    assert (tmp_path / "x.csv").read_bytes() == 'id,value\nä,0.3333333333333333\n"b,c",\n'.encode()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "x.csv"), frame.reset_index(drop=True))


# --- atomic files

def test_atomic_write_makes_folders_and_honours_the_umask(tmp_path):
    path = tmp_path / "a" / "b" / "x.bin"
    old = os.umask(0o027)
    try:
        core.write_bytes(path, b"1")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"1" and stat.S_IMODE(path.stat().st_mode) == 0o640 and names(path.parent) == ["x.bin"]


@pytest.mark.parametrize("accident", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_accident_leaves_the_old_file_and_nothing_else(tmp_path, accident):
    path = tmp_path / "x"
    core.write_text(path, "old")
    with pytest.raises(type(accident)) as raised, core.atomic_write(path, "w") as file:
        file.write("half")
        raise accident
    assert path.read_text() == "old" and names(tmp_path) == ["x"]
    if isinstance(accident, OSError):  # the bare error of a full disk gets the name of the file
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), core.atomic_write(tmp_path / "x"):
        open(tmp_path / "other")
    assert names(tmp_path) == []


def test_a_device_is_never_replaced():
    """/dev/full says "disk full" to every write. A careless rename would put a plain file in its place."""
    before = os.stat("/dev/full")
    with pytest.raises(OSError, match="/dev/full"):
        core.write_bytes("/dev/full", b"x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and os.stat("/dev/full").st_ino == before.st_ino


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    core.write_text(tmp_path / "link", "1")
    core.write_text(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "2"


def test_a_loop_of_links_and_a_file_as_folder_are_errors_that_name_the_path(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="a"):
        core.write_text(tmp_path / "a" / "x", "1")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        core.write_text(tmp_path / "file" / "x", "1")


# --- locks


def test_the_lock_is_freed_by_an_error_and_survives_a_damaged_file(tmp_path):
    with pytest.raises(ZeroDivisionError), core.run_lock(tmp_path):
        1 / 0
    for content in ("", "garbage", "[]", "{}"):
        with core.run_lock(tmp_path):
            (tmp_path / ".lock").write_text(content)
            with pytest.raises(RunLockedError, match="another process"), core.run_lock(tmp_path):
                raise AssertionError("two writers")


# --- folders

FILL = """
    import sys
    from covidsev.core import publish_folder, run_lock, write_text
    folder = sys.stdin.readline().strip()
    with run_lock(folder):
        for k in range(10**6):
            with publish_folder(folder) as part:
                for name in "abcde":
                    write_text(part / name, f"{k}" * 1000)
            if k == 0:
                print("started", flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_folder(tmp_path):
    """Five files of one round each: after a kill and the next start they are there, of one round, and nothing else
    is."""
    for trial in range(8):
        process = python(FILL)
        process.stdin.write(f"{tmp_path / 'run'}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "started\n", process.stderr.read()
        time.sleep(0.004 * trial)
        process.kill()
        process.wait(30)
        with core.run_lock(tmp_path / "run"):
            core.recover_folder(tmp_path / "run")
        texts = {(tmp_path / "run" / name).read_text() for name in "abcde"}
        assert len(texts) == 1 and names(tmp_path) == ["run"] and names(tmp_path / "run") == [".lock", *"abcde"]


def test_a_killed_change_of_places_is_undone_under_a_new_lock(tmp_path):
    with core.publish_folder(tmp_path / "run") as part:
        core.write_text(part / "a", "good")
    (tmp_path / "run").rename(tmp_path / ".run.covidsev.old")
    for mine in (".run.old", ".run.partial"):  # what only looks like ours stays
        core.write_text(tmp_path / mine / "a", "mine")
    with core.run_lock(tmp_path / "run"):
        with pytest.raises(OSError, match="No space"), core.publish_folder(tmp_path / "run") as part:
            raise OSError(errno.ENOSPC, "No space left on device", str(part / "b"))
        with pytest.raises(RunLockedError), core.run_lock(tmp_path / "run"):
            raise AssertionError("two writers")
    assert (tmp_path / "run" / "a").read_text() == "good" and names(tmp_path) == [".run.old", ".run.partial", "run"]


@pytest.mark.parametrize("fault", ["write", "sync", "rename"])
def test_files_of_several_folders_are_published_together_or_not_at_all(tmp_path, monkeypatch, fault):
    targets = [tmp_path / "tables/a.csv", tmp_path / "figures/b.svg", tmp_path / "run.json"]
    for path in (targets[0], tmp_path / "new"):
        core.write_text(path, "old" if path in targets else "new")
    if fault == "rename":
        targets[1].mkdir(parents=True)  # a folder in the way

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fault == "sync":
            patch.setattr(core.os, "fsync", full)
        files = {path: tmp_path / ("absent" if fault == "write" and path == targets[2] else "new") for path in targets}
        with pytest.raises(OSError) as caught:
            core.publish_files(files)
    assert str(caught.value.filename) in map(str, targets)
    assert targets[0].read_text() == "old" and not targets[2].exists()
    assert not list(tmp_path.rglob("*.partial"))


# --- environment


def test_environment_does_not_load_torch():
    process = python(
        "import sys; from covidsev import core as p; print(p.environment()['threads'], 'torch' in sys.modules)",
        OMP_NUM_THREADS="3")
    assert process.communicate(timeout=60)[0].split() == ["3", "False"]


@pytest.mark.parametrize(("flags", "auto", "warned"), [
    ("avx2 avx512f amx_bf16", "bfloat16", 0), ("avx512_bf16", "bfloat16", 0), ("avx2 avx512f", "float32", 1), (None, "float32", 1)])
def test_bfloat16_is_taken_where_the_processor_has_it(tmp_path, monkeypatch, flags, auto, warned):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags}\n")
    known = core.cpu_instructions(tmp_path / "cpuinfo")
    monkeypatch.setattr(core, "cpu_instructions", lambda: known)
    assert core.resolve_precision("auto", "cpu") == auto and core.resolve_precision("float32", "cpu") == "float32"
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        assert core.resolve_precision("bfloat16", "cpu") == "bfloat16"  # asked for by name: honoured
    assert len(messages) == warned


def test_git_commit_inside_a_git_hook(tmp_path, monkeypatch):
    """git sets GIT_DIR for its hooks; without care every question would be about that repository."""
    def git(folder, *arguments):
        subprocess.run(["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=n", "-c", "commit.gpgsign=false",
                        *arguments], check=True, capture_output=True)

    for name in ("mine", "hook"):
        core.write_text(tmp_path / name / "x", name)
        git(tmp_path / name, "init", "-q")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-q", "-m", name)
    mine = core.git_commit(tmp_path / "mine")
    assert mine and mine != core.git_commit(tmp_path / "hook")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "hook" / ".git"))
    assert core.git_commit(tmp_path / "mine") == mine


def test_git_commit_without_git(tmp_path, monkeypatch):
    assert core.git_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert core.git_commit(tmp_path) is None
