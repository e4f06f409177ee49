"""Where things come from, whether they come out again, and the generated files: names, faults, the same bytes."""
import os
import shutil
import subprocess
import sys
import xml.dom.minidom

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from toys import experiment, table, write_notebook

from covidsev.paper import runner as lineage
from covidsev.cli import main
from covidsev.core import ConfigError, repo_root
from covidsev.paper.experiments import Places, code_cells, load_registry, resolve, write_manifest
from covidsev.core import read_json, write_bytes, write_json

ROOT = repo_root()


OUTPUTS = [f"tables/table2_dice.{suffix}" for suffix in ("csv", "md", "tex")]
TOY = "".join([table("profiles.cpu", title="toy", seeds=[0], rows={"train_single": ["sinfnet"]}),
               experiment("train_single", "train.ipynb", {"sinfnet": {}}),
               experiment("table2_dice", "table.ipynb", needs=["train_single"], outputs=OUTPUTS)])
SETTINGS = 'profile = "cpu"\nresults = ""\noutput = ""'
TABLE = """
from covidsev.paper import experiments
from covidsev.paper import tables
from pathlib import Path
runs = tables.read_runs(results, "train_single", ["sinfnet"], [0])
frame = tables.collect(runs)
tables.save_table(frame, frame.astype(str), Path(output) / "tables" / "table2_dice", "Table", ["NOT TESTED"])
tables.save_record(Path(output), {"profile": profile}, runs)
"""


@pytest.fixture(scope="module")
def whole():
    """The registry of this repository."""
    return load_registry()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A small one: a run, and a table that reads it."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "toy.toml").write_text(TOY)
    write_notebook(folder / "train.ipynb", SETTINGS)
    write_notebook(folder / "table.ipynb", SETTINGS, TABLE)
    return load_registry(folder / "toy.toml")


@pytest.fixture(scope="module")
def copy(tmp_path_factory, registry):
    """One real run of profile cpu in a folder of its own, with the table drawn from it, and a manifest."""
    root = tmp_path_factory.mktemp("copy")
    source = "results/cpu/train_single/sinfnet-seed0"
    shutil.copytree(ROOT / source, root / source, ignore=shutil.ignore_patterns("executed.ipynb", "*.failed.ipynb"))
    places, run = Places(root), resolve(registry, "cpu", "table2_dice")
    made = lineage.rederive(run, places, root / "first")
    for name in made:
        write_bytes(places.destination(run, name), (root / "first" / name).read_bytes())
    record = read_json(root / "first/run.json")
    write_json(places.folder(run) / "run.json", {**record, "run": run.name, "outputs": dict.fromkeys(run.outputs, "")})
    write_manifest(places, "cpu")
    return places


@pytest.fixture
def faulty(copy, tmp_path):
    """Another copy of it, to damage."""
    shutil.copytree(copy.root / "results", tmp_path / "results")
    return Places(tmp_path)


def statuses(places, registry, **options):
    checks = lineage.verify("cpu", ["table2"], places.root, registry, **options)
    return {(each.path.rpartition("table2_dice")[2], each.how): each.status for each in checks if "tables/table2_dice" in each.path}


def test_two_renders_give_the_same_bytes(copy, registry):
    run = resolve(registry, "cpu", "table2_dice")
    made = lineage.rederive(run, copy, copy.root / "second")
    assert {name for name in made if "/" in name} == set(run.outputs)
    for name in run.outputs:
        assert (copy.root / "first" / name).read_bytes() == (copy.root / "second" / name).read_bytes(), name


def test_figures_come_out_with_the_same_bytes_in_another_process_zone_and_locale(copy, whole, tmp_path):
    run = resolve(whole, "cpu", "figure_learning_curves")
    lineage.rederive(run, copy, tmp_path / "here")
    code = ("import sys; from pathlib import Path; from covidsev.paper.runner import rederive; from covidsev.paper.experiments import *; "
            "rederive(resolve(load_registry(), 'cpu', 'figure_learning_curves'), Places(Path(sys.argv[1])), Path(sys.argv[2]))")
    subprocess.run([sys.executable, "-c", code, str(copy.root), str(tmp_path / "there")], check=True, cwd=ROOT,
                   env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"})
    for name in run.outputs:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name


def test_untouched_results_are_exact_and_nothing_is_written(copy, registry):
    before = {path: path.stat().st_mtime_ns for path in (copy.root / "results").rglob("*")}
    found = statuses(copy, registry)
    assert set(found.values()) == {"exact"} and {how for _, how in found} == {"checksum", "drawn again"}
    assert {path: path.stat().st_mtime_ns for path in (copy.root / "results").rglob("*")} == before


def test_each_fault_has_its_status(faulty, registry):
    folder = faulty.results("cpu") / "tables"
    (folder / "table2_dice.tex").unlink()
    (folder / "table2_dice.md").write_text((folder / "table2_dice.md").read_text(encoding="utf-8").replace("NOT TESTED", "PASS"), encoding="utf-8")
    found = statuses(faulty, registry)
    assert found[".tex", "checksum"] == found[".tex", "drawn again"] == "missing"
    assert found[".md", "checksum"] == found[".md", "drawn again"] == "differs"
    assert found[".csv", "checksum"] == found[".csv", "drawn again"] == "exact"
    done = CliRunner().invoke(main, ["verify", "--profile", "cpu", "--sums", "--out", str(faulty.root)])
    assert done.exit_code == 1 and "table2_dice.md differs" in done.output and "1 missing" in done.output


def test_changed_run_shows_in_the_table_that_reads_it(faulty, registry):
    path = faulty.results("cpu") / "train_single/sinfnet-seed0/metrics.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if not line.startswith("test,dice,") else "test,dice,0.987654321,12" for line in lines) + "\n")
    assert statuses(faulty, registry)[".csv", "drawn again"] == "differs"


def test_render_that_fails_is_missing_and_says_why(faulty, registry):
    shutil.rmtree(faulty.results("cpu") / "train_single")
    checks = [each for each in lineage.verify("cpu", ["table2"], faulty.root, registry) if each.how == "drawn again"]
    assert checks and all(each.status == "missing" and "DataMissingError" in each.detail for each in checks)


@given(st.floats(-1e3, 1e3), st.floats(0, 1e-3))
def test_numbers_are_close_or_not_by_their_tolerance(value, shift):
    status, _ = lineage.compare_bytes("a.csv", f"x,{value!r}".encode(), f"x,{value + shift!r}".encode())
    apart = abs(shift) / max(1, abs(value))
    assert status in ("exact", "close") if apart < 0.9e-6 else status != "exact"
    if apart > 1.1e-6:
        assert status == "differs"


@pytest.mark.parametrize("name", ["covidsev.method.infnet.InfNet", "infnet.InfNet", "InfNet"])
def test_where_names_the_cell_that_holds_the_definition(name):
    origin, = lineage.where(name)
    cell = read_json(ROOT / origin.notebook)["cells"][origin.cell]
    assert origin.notebook == "nbs/2_method/03_infnet.ipynb" and "class InfNet(" in "".join(cell["source"])
    assert "covidsev/method/infnet.py line " in origin.what


def test_where_finds_every_exported_name():
    """One call a module would read all of them each time: the parts of `where` are asked for all names instead."""
    for path in sorted((ROOT / "covidsev").glob("[a-z]*.py")):
        known = lineage._definitions(path.read_text(encoding="utf-8"))
        for name in list(known)[:1] + list(known)[-1:]:
            assert lineage._where_defined(path, name, ROOT).notebook.startswith("nbs/"), name


def test_where_finds_tables_figures_and_files(whole):
    registry = whole
    for each in registry.experiments.values():
        origin = lineage.where(each.name, registry)[0]
        assert (ROOT / origin.notebook) == each.notebook
        if each.kind == "render":
            source = "".join(read_json(each.notebook)["cells"][origin.cell]["source"])
            assert "save_" in source
    assert lineage.where("figures/cpu/learning_curves_beyond.svg", registry)[0].name == "figure_learning_curves"
    assert lineage.where("results/cpu/train_single/unet-seed0/metrics.csv", registry)[0].name == "train_single"


@pytest.mark.parametrize("name, hint", [("InfNte", "did you mean 'InfNet'"), ("infnet.InfNte", "did you mean 'InfNet'"),
                                        ("figures/cpu/none.png", "no experiment of the registry")])
def test_where_says_what_might_have_been_meant(name, hint):
    with pytest.raises(ConfigError, match=hint):
        lineage.where(name)


def test_where_loads_no_torch():
    code = "import sys; from covidsev.paper.runner import where; where('InfNet'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_graph_holds_every_experiment_and_its_needs(whole):
    registry = whole
    graph = lineage.lineage_graph(registry)
    for each in registry.experiments.values():
        assert (f"nb_{each.name}", each.name) in graph.arrows
        for need in each.needs:
            assert (need.partition("/")[0], f"nb_{each.name}") in graph.arrows
    assert lineage.as_mermaid(graph).count("-->") == lineage.as_dot(graph).count("->") == len(graph.arrows)
    assert lineage.depths(graph)["table2_dice"] > lineage.depths(graph)["train_single"]


def test_graph_as_svg_is_a_picture_with_the_same_bytes(whole):
    graph = lineage.lineage_graph(whole, ["table3"])
    text = lineage.graph_text(graph, "svg")
    assert text == lineage.graph_text(graph, "svg")
    assert xml.dom.minidom.parseString(text).documentElement.tagName == "svg"


def test_generated_files_are_the_committed_ones():
    for name, text in lineage.metadata_files().items():
        assert (ROOT / name).is_file() and (ROOT / name).read_text(encoding="utf-8") == text, f"run: covidsev metadata ({name})"


PRINTABLE = st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"))  # control characters and line separators are no metadata
TREES = st.recursive(st.text(PRINTABLE) | st.integers() | st.none() | st.booleans(),
                     lambda inner: st.lists(inner) | st.dictionaries(st.text("abc-_ :#", min_size=1), inner), max_leaves=8)


@given(st.dictionaries(st.sampled_from(["version", "title", "authors"]), TREES))
def test_yaml_is_read_back_as_it_was(tree):
    again = yaml.safe_load(lineage._yaml(tree))
    assert again == tree and list(again) == list(tree)


def test_generated_yaml_is_yaml(whole):
    registry, read = whole, lambda name: yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    citation, check = read("CITATION.cff"), read("codecheck.yml")
    source = lineage.read_checklists(ROOT)["citation"]
    assert citation["references"] == source["references"] and citation["keywords"] == source["keywords"]
    assert citation["version"] == lineage.read_settings(ROOT)["version"] and isinstance(citation["version"], str)
    assert citation["cff-version"] == "1.2.0" and len(citation["references"]) == 2
    assert len(citation["references"][0]["authors"]) == len(check["paper"]["authors"]) == 5
    rendered = [name for each in registry.experiments.values() if each.kind == "render" for name in each.outputs]
    assert len(check["manifest"]) == len(rendered) and "results/cpu/tables/table2_dice.csv" in {each["file"] for each in check["manifest"]}


def test_checklists_are_whole():
    lists = lineage.read_checklists(ROOT)["checklists"]
    assert [item["item"] for item in lists["claim"]["items"]] == [str(number) for number in range(1, 43)]
    for checklist in lists.values():
        assert all(item.get("where") or item.get("note") for item in checklist["items"])


def test_render_notebooks_hold_nothing_that_only_a_kernel_understands(whole):
    for each in whole.experiments.values():
        for cell in code_cells(each.notebook):
            compile(cell["source"], each.name, "exec")
