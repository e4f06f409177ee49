"""Where things are written, and whether tables and figures come out again: names, faults, the same bytes."""
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given, strategies as st
from toys import DRAW, RECORD, TRAIN, experiment, table, write_notebook

from covidsev.cli import find_origins as where, main
from covidsev.core import ConfigError, read_json, repo_root
from covidsev.paper import runner
from covidsev.paper.experiments import load_registry
from covidsev.paper.claims import compare_bytes, verify

ROOT = repo_root()


def registry_of(toys):
    return load_registry(toys / "toy.toml")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run and a table that shows it, made by a toy registry."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "toy.toml").write_text("".join([
        table("profiles.smoke", title="toy", seeds=[0], rows={"train": ["plain"]}), experiment("train", rows={"plain": {}}),
        experiment("table", "table.ipynb", needs=["train"], outputs=[f"tables/t.{end}" for end in ("csv", "md", "svg")])]))
    write_notebook(folder / "work.ipynb", TRAIN, RECORD)
    write_notebook(folder / "table.ipynb", 'profile = "smoke"\nresults = ""\noutput = ""', """
        import pathlib, uuid
        number = float(pathlib.Path(results, "train/plain-seed0/metrics.csv").read_text().split()[-1])
        place = pathlib.Path(output, "tables")
        place.mkdir()
        place.joinpath("t.csv").write_text(f"x,{number + 1e-9}")
        place.joinpath("t.md").write_text("supported")
        name = uuid.uuid4().hex
        place.joinpath("t.svg").write_text(f'<svg><clipPath id="p{name}"/><g clip-path="url(#p{name})"/></svg>')
    """, DRAW)
    runner.reproduce("smoke", root=folder / "out", registry=registry_of(folder), echo=lambda line: None)
    return folder


@pytest.fixture
def faulty(drawn, tmp_path):
    """A copy of it, to damage."""
    shutil.copytree(drawn / "out", tmp_path / "out")
    for name in ("toy.toml", "work.ipynb", "table.ipynb"):
        shutil.copy(drawn / name, tmp_path)
    return tmp_path


def statuses(toys):
    checks = verify("smoke", ["table"], toys / "out", registry_of(toys))
    return {(each.path.rpartition("/t.")[2], each.how): each.status for each in checks if "/t." in each.path}


def test_untouched_results_come_out_again_and_nothing_is_written(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    found = statuses(drawn)
    assert found.pop(("svg", "drawn again")) == "close"  # other ids, the same picture
    assert set(found.values()) == {"exact"} and {how for _, how in found} == {"checksum", "drawn again"}
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_each_fault_has_its_status(faulty):
    folder = faulty / "out/results/smoke/tables"
    (folder / "t.svg").unlink()
    (folder / "t.md").write_text("undecided")
    found = statuses(faulty)
    assert found["svg", "checksum"] == found["svg", "drawn again"] == "missing"
    assert found["md", "checksum"] == found["md", "drawn again"] == "differs"
    assert found["csv", "checksum"] == found["csv", "drawn again"] == "exact"
    done = CliRunner().invoke(main, ["verify", "--profile", "smoke", "--sums", "--out", str(faulty / "out")])
    assert done.exit_code == 1 and "t.md differs" in done.output and "1 missing" in done.output


def test_changed_run_shows_in_the_table_that_reads_it_and_a_missing_one_says_why(faulty):
    path = faulty / "out/results/smoke/train/plain-seed0/metrics.csv"
    path.write_text("plain 0 10")
    assert statuses(faulty)["csv", "drawn again"] == "differs"
    path.unlink()
    checks = [each for each in verify("smoke", ["table"], faulty / "out", registry_of(faulty)) if each.how == "drawn again"]
    assert checks and all(each.status == "missing" and "FileNotFoundError" in each.detail for each in checks)


def test_figures_come_out_with_the_same_bytes_in_another_process_zone_and_locale(tmp_path):
    code = ("import sys; from pathlib import Path; from covidsev.paper.runner import *; from covidsev.paper.experiments import *; "
            "run = resolve(load_registry(), 'smoke', 'figure_augmentation'); run_notebook(run, Places(Path(sys.argv[1])), {})")
    for folder, seed, zone, locale in (("a", "1", "UTC", "C.UTF-8"), ("b ü", "7", "Asia/Tokyo", "C")):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / folder)], check=True, cwd=ROOT,
                       env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale})
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / folder / "figures").rglob("*.*")} for folder in ("a", "b ü"))
    assert one == other and one


@given(st.floats(-1e3, 1e3), st.floats(0, 1e-3))
def test_numbers_are_close_or_not_by_their_tolerance(value, shift):
    status, _ = compare_bytes("a.csv", f"x,{value!r}".encode(), f"x,{value + shift!r}".encode())
    apart = abs(shift) / max(1, abs(value))
    assert status in ("exact", "close") if apart < 0.9e-6 else status != "exact"
    if apart > 1.1e-6:
        assert status == "differs"


# --- where

@pytest.mark.parametrize("name", ["covidsev.method.infnet.InfNet", "infnet.InfNet", "InfNet"])
def test_where_names_the_cell_that_holds_the_definition(name):
    origin, = where(name)
    cell = read_json(ROOT / origin.notebook)["cells"][origin.cell]
    assert origin.notebook.endswith("_infnet.ipynb") and "class InfNet(" in "".join(cell["source"])
    assert "covidsev/method/infnet.py line " in origin.what


@pytest.mark.parametrize("name, kind", [("infnet", "module"), ("covidsev.method.infnet", "module"), ("06_experiments", "notebook"),
                                        ("06_experiments.ipynb", "notebook"), ("InfNet.forward", "method"), ("TOLERANCES", "value"),
                                        ("table2", "Table II"), ("results/cpu/train_single/unet-seed0/metrics.csv", "Train"),
                                        ("figures/cpu/learning_curves_beyond.svg", "writes figures")])
def test_where_finds_what_has_a_plain_name(name, kind):
    assert any(kind in origin.what for origin in where(name))


def test_where_finds_tables_and_figures_by_the_cell_that_saves_them():
    registry = load_registry()
    for each in registry.experiments.values():
        origin = where(each.name, registry)[0]
        assert (ROOT / origin.notebook) == each.notebook
        assert each.kind == "compute" or "save_" in "".join(read_json(each.notebook)["cells"][origin.cell]["source"])


@pytest.mark.parametrize("name, hint", [("InfNte", "did you mean 'InfNet'"), ("infnet.InfNte", "did you mean"), ("infnte", "did you mean 'infnet'"),
                                        ("tabel2_dice", "did you mean 'table2_dice'"), ("figures/cpu/none.png", "no experiment of the registry")])
def test_where_says_what_might_have_been_meant(name, hint):
    with pytest.raises(ConfigError, match=hint):
        where(name)


def test_where_loads_no_torch():
    code = "import sys; from covidsev.cli import find_origins; find_origins('InfNet'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
