"""The house is in order: notebooks and modules agree, nothing private is in it, imports are light and go one way."""
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from covidsev.paper.experiments import imports_of, library_modules

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests")]

import measure  # noqa: E402
import shape  # noqa: E402

LIBRARY = shape.library(ROOT)
EXPERIMENTS = sorted((ROOT / "nbs" / "experiments").glob("*.ipynb"))
MODULES = sorted(path for path in (ROOT / "covidsev").rglob("*.py") if not path.name.startswith("_"))

# spelt so that this file does not contain what it looks for
MACHINE_PATH = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|farm)/|/tmp/(tmp|ipy|bash_jobs|src|tools)|/home/[a-z]", re.M)
REGISTRY = re.compile(r"pypi[.]org|python[h]osted|registry[.]npmjs|deb[.]debian")


def cells(notebook: Path) -> list[dict]:
    """The cells of a notebook, sources joined to one text each."""
    content = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in content]


def code_of(notebook: Path) -> list[str]:
    """The sources of the code cells."""
    return [cell["source"] for cell in cells(notebook) if cell["cell_type"] == "code"]


def project_files() -> list[Path]:
    """Every file that is tracked, or would be by `git add .`."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True).stdout.decode().split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return project_files()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A copy of the project in which everything has been exported and cleaned anew; the user's tree is untouched."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "settings.ini", copy)
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "*.failed.ipynb", "executed.ipynb")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=ignore)
    (copy / "covidsev").mkdir()
    shutil.copy(ROOT / "covidsev" / "__init__.py", copy / "covidsev")
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).parent / command], cwd=copy, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return copy


def test_modules_are_what_the_notebooks_export(exported):
    made = {str(path.relative_to(exported)): path.read_bytes() for path in (exported / "covidsev").rglob("*.py")}
    kept = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "covidsev").rglob("*.py")}
    different = sorted(name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name))
    assert not different, f"run nbdev_export; not what the notebooks export: {', '.join(different)}"


def test_notebooks_are_clean(exported):
    dirty = [str(path.relative_to(exported)) for path in sorted((exported / "nbs").rglob("*.ipynb"))
             if path.read_bytes() != (ROOT / path.relative_to(exported)).read_bytes()]
    assert not dirty, f"run nbdev_clean; it would change: {', '.join(dirty)}"


def test_cleaning_keeps_the_parameters_tag(exported):
    """papermill finds the parameters by this tag, and runs the defaults without a word where it is missing."""
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split()
    for notebook in EXPERIMENTS:
        cleaned = exported / notebook.relative_to(ROOT)
        assert any("parameters" in cell["metadata"].get("tags", []) for cell in cells(cleaned)), notebook.name


@pytest.mark.parametrize("notebook", LIBRARY + EXPERIMENTS, ids=lambda path: path.stem)
def test_no_shell_lines_in_notebooks(notebook):
    """A failing `!command` leaves the notebook green."""
    lines = [line for source in code_of(notebook) for line in source.splitlines()]
    assert not [line for line in lines if re.match(r"\s*(!|%%(bash|sh|script)|%(system|sx)\b)", line)], notebook.name


@pytest.mark.parametrize("notebook", LIBRARY, ids=lambda path: path.stem)
def test_each_library_notebook_makes_one_module(notebook):
    names = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code_of(notebook)), re.M)
    assert names == [shape.module_of(notebook).removeprefix("covidsev.")]


def test_nothing_of_this_machine_is_in_the_project(tracked):
    found = []
    for path in tracked:
        text = path.read_bytes().decode("utf-8", errors="replace")
        for pattern in (MACHINE_PATH, REGISTRY):
            match = pattern.search(text)
            if match and path.suffix not in {".png", ".npz"}:
                found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: "
                             f"{text[max(0, match.start() - 30):match.end() + 40]!r}")
    assert not found, "paths of a machine or hosts of a registry:\n" + "\n".join(found)


def test_the_patterns_find_what_they_should():
    for text in ("see " + "/wo" + "rk/main", "x='" + "/ro" + "ot/x'", "/tmp/" + "tmpab12", "/ho" + "me/somebody"):
        assert MACHINE_PATH.search(text), text
    assert REGISTRY.search("https://py" + "pi.org/simple") and not MACHINE_PATH.search("https://x.org/wo" + "rk/main a/root/b")


def test_no_file_of_the_real_data_stands_in_the_project(tracked, data_root):
    sums = data_root / "SHA256SUMS"
    if not sums.is_file():
        pytest.skip("the data folder has no SHA256SUMS")
    known = {line.split()[0] for line in sums.read_text(encoding="utf-8").splitlines() if line.strip()}
    copied = [path.name for path in tracked if path.stat().st_size and hashlib.sha256(path.read_bytes()).hexdigest() in known]
    assert not copied


HEAVY = ("torch", "numpy", "pandas", "scipy", "matplotlib", "papermill")


@pytest.mark.parametrize("statement", ["import covidsev.core", "from covidsev.cli import main; main(['--help'], standalone_mode=False)"])
def test_light_imports(statement):
    code = f"import sys; {statement}; print(*sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_imports_go_from_higher_to_lower_numbers():
    order = {shape.module_of(notebook): place for place, notebook in enumerate(LIBRARY)}
    texts = {name: path.read_text(encoding="utf-8") for name, path in library_modules().items() if name in order}
    wrong = [f"{name} imports {other}" for name, text in texts.items() for other in {module for module, _ in imports_of(text, name)}
             if order[other] >= order[name]]
    assert not wrong, wrong


# What the house must not exceed, and what it has at the moment: `python tests/measure.py` prints it all.
LIMITS = {"notebooks": 33, "code lines": 12_500, "largest modules": 560, "median function": 6, "90th percentile": 15, "test lines": 9_500,
          "foreign private names": 0, "without a user": 0, "cells": 0, "long lines": 0}
BINDING = set(LIMITS) - {"long lines"}  # those that hold: code of the method and of severity is still wider


def test_the_house_is_small():
    """Few notebooks, short functions, lines that a page shows whole, nothing that nobody uses."""
    found, over = measure.measures(), {}
    for what, limit in LIMITS.items():
        value = found[what]
        if what == "largest modules":
            value = max(size for size, name in value if name != "covidsev.data.sources")
        number = value if isinstance(value, (int, float)) else len(value)
        print(f"{what}: {number} (at most {limit})")
        if number > limit:
            over[what] = found[what]
    assert not (beyond := {what: value for what, value in over.items() if what in BINDING}), beyond


def test_notebooks_kept_their_outputs_and_none_of_an_error():
    kept = {path: [output for cell in cells(path) for output in cell.get("outputs", [])] for path in LIBRARY + EXPERIMENTS}
    assert not (empty := [path.name for path in LIBRARY if not kept[path]]), f"run these and keep their outputs: {empty}"
    assert not [path.name for path, outputs in kept.items() for output in outputs if output["output_type"] == "error"]


def test_next_links_follow_the_reading_order():
    """Each library notebook ends with a link to the one after it."""
    for notebook, after in zip(LIBRARY, LIBRARY[1:]):
        prose = "\n".join(cell["source"] for cell in cells(notebook) if cell["cell_type"] == "markdown")
        link = re.search(r"\]\(([^)]+)\)", prose.partition("## Next")[2])
        assert link and link[1] == os.path.relpath(after, notebook.parent), f"{notebook.name}: its Next should lead to {after.name}"


def test_ruff_finds_nothing():
    done = subprocess.run([Path(sys.executable).parent / "ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"make lint:\n{done.stdout}{done.stderr}"
