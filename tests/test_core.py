"""Errors, names, paths, devices and seeds: properties and bad input."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from covidsev import core as config
from covidsev.core import ConfigError, CovidSevError

WORDS = st.text(alphabet="abcdefghij-_", min_size=1, max_size=12)


def all_errors(kind: type = CovidSevError) -> list[type]:
    """`kind` and every class below it."""
    return [kind, *(below for child in kind.__subclasses__() for below in all_errors(child))]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh Python, with more environment variables."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


def test_error_lists_only_the_answers_it_has_in_a_fixed_order():
    error = CovidSevError("wrong", fix="mend it", found=0, file=Path("a/b.png"))
    assert str(error) == "wrong\n  file: a/b.png\n  found: 0\n  do: mend it"
    assert (error.what, error.expected) == ("wrong", None)


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_survives_a_process_boundary(kind):
    """Parallel runs send errors back by pickle: the message and the answers must arrive."""
    error = pickle.loads(pickle.dumps(kind("wrong", file="x", fix="mend")))
    assert type(error) is kind and str(error) == "wrong\n  file: x\n  do: mend"
    assert (error.what, error.fix, error.exit_code) == ("wrong", "mend", kind.exit_code)
    assert isinstance(error, ValueError) and error.exit_code in {1, 2, 4, 5}


@given(st.lists(WORDS, min_size=1, max_size=8), WORDS)
def test_check_choice_returns_the_value_or_names_valid_ones(choices, value):
    assert config.suggest(value, choices) == config.suggest(value, choices[::-1])
    if value in choices:
        assert config.check_choice("thing", value, iter(choices)) == value
        return
    with pytest.raises(ConfigError) as raised:
        config.check_choice("thing", value, choices)
    assert all(choice in raised.value.expected for choice in choices)
    assert any(choice in raised.value.fix for choice in choices)


def test_repo_root_is_found_from_below_and_not_from_a_neighbour(repository, tmp_path):
    assert config.repo_root(repository / "nbs") == repository
    for content in (b"this is not an ini file", b"\xff\xfe\x00lib_name"):
        (tmp_path / "settings.ini").write_bytes(content)
        with pytest.raises(ConfigError, match="not inside the covidsev repository"):
            config.repo_root(tmp_path)


def test_repo_root_falls_back_to_the_package(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.repo_root() == repository


@pytest.mark.parametrize("name", ["plain", "with spaces", "-dash", "ünïcodé 肺", "it's"])
@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_data_root_takes_odd_names_and_stray_quotes(tmp_path, monkeypatch, name, quote):
    folder = tmp_path / name
    folder.mkdir()
    assert config.data_root(f"{quote}{folder}{quote}") == folder
    monkeypatch.setenv("COVIDSEV_DATA", f" {quote}{folder}{quote} ")
    assert config.data_root() == folder


def test_data_root_order_and_errors(tmp_path, monkeypatch):
    first, second, missing = tmp_path / "first", tmp_path / "second", tmp_path / "missing"
    first.mkdir(), second.mkdir()
    monkeypatch.setenv("COVIDSEV_DATA", str(second))
    assert config.data_root(first) == first and config.data_root() == second
    with pytest.raises(ConfigError, match="--data-root is not a folder"):  # and not the second instead
        config.data_root(missing)
    monkeypatch.setenv("COVIDSEV_DATA", str(missing))
    with pytest.raises(ConfigError, match="COVIDSEV_DATA is not a folder"):
        config.data_root()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="found: a file"):
        config.data_root(tmp_path / "file")


def test_data_root_is_absolute_and_may_be_none(tmp_path, monkeypatch, repository):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert config.data_root("data") == tmp_path / "data"
    monkeypatch.setenv("COVIDSEV_DATA", "  ")
    there = repository / "data"
    assert config.data_root() == (there if there.is_dir() else None)


@pytest.mark.parametrize("value, quiet", [("", False), ("0", False), ("false", False), ("No", False), ("1", True), ("true", True)])
@pytest.mark.parametrize("name", ["CI", "COVIDSEV_QUIET"])
def test_quiet(monkeypatch, name, value, quiet):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("COVIDSEV_QUIET", raising=False)
    monkeypatch.setenv(name, value)
    assert config.is_quiet() is quiet


def test_progress_writes_nothing_when_quiet_and_to_stderr_otherwise(monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    for quiet in ("1", "0"):
        monkeypatch.setenv("COVIDSEV_QUIET", quiet)
        assert list(config.progress([1, 2], desc="counting")) == [1, 2]
        shown = capsys.readouterr()
        assert shown.out == "" and ("counting" in shown.err) == (quiet == "0")


def test_gpu_requested_with_none_present_is_an_error_that_names_the_cpu():
    """Hiding the devices makes this the same test on a machine that has some."""
    code = """
from covidsev.core import resolve_device, ConfigError
print(resolve_device("auto"), resolve_device("cpu"))
for name in ("cuda", "cuda:0", "cuda:1"):
    try:
        print("wrong:", resolve_device(name))
    except ConfigError as error:
        assert "--device cpu" in error.fix and "0 CUDA devices" in str(error) and error.exit_code == 2
        print("refused", name)
"""
    done = python(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.splitlines() == ["cpu cpu", "refused cuda", "refused cuda:0", "refused cuda:1"], done.stderr


@pytest.mark.parametrize("name", ["gpu", "", "cudda", "cuda:x", "cuda:-1", "cuda:99"])
def test_odd_device_names_are_refused(name):
    with pytest.raises(ConfigError):
        config.resolve_device(name)


def test_seeds_give_the_same_bits_in_another_process_whatever_the_hash_seed():
    code = (
        "from covidsev.core import seed_everything; import torch, random; g = seed_everything(3, threads=1);"
        "drawn = [torch.nn.Conv2d(1, 2, 3).weight.sum().item(), torch.rand(2, generator=g).tolist(), random.random()]")
    here: dict = {}
    exec(code, here)
    other = python(code + "; print(drawn)", PYTHONHASHSEED="7")
    assert other.stdout == f"{here['drawn']}\n", other.stderr
