"""The site: its pages come from the files, its checker finds what is broken, and a small one builds without a warning."""
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import book  # noqa: E402
import check  # noqa: E402
import outputs  # noqa: E402
import shape  # noqa: E402

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook(*cells: tuple[str, str], outputs: tuple = ()) -> dict:
    return {"cells": [{"cell_type": kind, "metadata": {}, "source": source, "outputs": list(outputs)}
                      for kind, source in cells]}


# ---------------------------------------------------------------- the checker


@pytest.fixture
def site(tmp_path) -> Path:
    """Two pages that are in order."""
    (tmp_path / "_static").mkdir()
    (tmp_path / "_static" / "a.css").write_text("p { background: url(data:image/png;base64,x) }")
    (tmp_path / "_static" / "a.js").write_text("// see https://example.org\nconst home = 'https://example.org';")
    (tmp_path / "_static" / "template.html").write_text("<a href='{{ later }}'>x</a>")
    (tmp_path / "index.html").write_text("<link rel='stylesheet' href='_static/a.css'><link rel='next' href='b%20c.html'>"
                                         "<script src='_static/a.js?v=1'></script><a href='https://example.org'>elsewhere</a>"
                                         "<a href='b%20c.html#x'>x</a><a href='#'>top</a><a href='mailto:a@b.c'>m</a>")
    (tmp_path / "b c.html").write_text("<h1 id='x'>x</h1><a href='index.html'>home</a>")
    return tmp_path


def test_a_good_site_has_no_faults(site, capsys):
    assert check.faults_of(site) == [] and check.main(str(site)) == 0
    assert "2 pages, 0 faults" not in capsys.readouterr().err


@pytest.mark.parametrize("html, fault", [
    ("<a href='gone.html'>", "dead link: gone.html"),
    ("<img src='gone.png'>", "dead link: gone.png"),
    ("<a href='b%20c.html#y'>", "no such anchor: b%20c.html#y"),
    ("<a href='#nowhere'>", "no such anchor: #nowhere"),
    ("<a href='../secret.txt'>", "leads out of the site: ../secret.txt"),
    ("<script src='https://cdn.example.org/x.js'></script>", "loads from elsewhere: https://cdn.example.org/x.js"),
    ("<img src='//example.org/x.png'>", "loads from elsewhere: //example.org/x.png"),
    ("<link rel='preconnect' href='https://fonts.example.org'>", "loads from elsewhere: https://fonts.example.org"),
    ("<style>@import 'https://example.org/f.css';</style>", "loads from elsewhere: https://example.org/f.css"),
    ("<img srcset='https://example.org/2.png 2x'>", "loads from elsewhere: https://example.org/2.png"),
])
def test_each_fault_of_a_page_is_found(site, html, fault):
    (site / "bad.html").write_text(html)
    assert check.faults_of(site) == [f"bad.html: {fault}"] and check.main(str(site)) == 1


@pytest.mark.parametrize("name, text", [("a.css", "p { src: url('https://example.org/f.woff') }"),
                                        ("a.js", "fetch('https://example.org/data.json')"), ("a.js",
        "const m = await import(\"https://example.org/m.js\")"), ("a.js",
        "script.src = 'https://example.org/m.js'")])
def test_loads_of_styles_and_scripts_are_found(site, name, text):
    (site / "_static" / name).write_text(text)
    assert [fault.split(": ")[:2] for fault in check.faults_of(site)] == [[f"_static/{name}", "loads from elsewhere"]]


def test_an_empty_folder_is_not_a_good_site(tmp_path, capsys):
    assert check.main(str(tmp_path)) == 1 and "no index.html" in capsys.readouterr().err


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize("source, path, moved", [
    ("[a](2_method/02_losses.ipynb#x)", "nbs/index.ipynb", "[a](2_method/02_losses.ipynb#x)"),
    ("![a](../figures/smoke/a.png)", "nbs/index.ipynb", "![a](figures/smoke/a.png)"),
    ("[a](../2_method/02_losses.ipynb)", "nbs/experiments/t.ipynb", "[a](../2_method/02_losses.ipynb)"),
    ("[a](experiments)", "nbs/index.ipynb", "[a](experiments/index.md)"),
    ("[a](../results/cpu/tables/table2.md)", "nbs/index.ipynb", "[a](results/cpu/table2.md)"),
    ("[a](../results/cpu)", "nbs/index.ipynb", "[a](results/cpu/index.md)"),
    ("![a](../docs/a.png)", "nbs/index.ipynb", "![a](pictures/a.png)"),
    ("the [licence](../LICENSE) holds", "nbs/index.ipynb", "the licence holds"),
    ("[a](https://example.org)", "nbs/index.ipynb", "[a](https://example.org)"),
    ("`x[k](../y)` and\n```\nf[a](../b)\n```", "nbs/index.ipynb", "`x[k](../y)` and\n```\nf[a](../b)\n```"),
])
def test_links_lead_to_where_the_pages_are(source, path, moved):
    assert book.move_links(source, path) == moved


def test_directives_become_tags_and_hidden_cells_vanish():
    page = book.page_of(notebook(("code", "#| default_exp x"), ("markdown", "# T"), ("code", "#| export\ndef f(): ..."),
                                 ("code", "#| hide\nsecret"), ("code", "#| echo: false\n1"), ("code", "import os"), ("code", "2")), "nbs/01_x.ipynb", "told")
    told = [(cell["source"], cell["metadata"].get("tags", [])) for cell in page["cells"]]
    assert told == [("# T", []), ("```{note}\ntold\n```", []), ("def f(): ...", ["export", "hide-input"]),
                    ("1", ["remove-input"]), ("import os", ["hide-input"]), ("2", [])]


def test_pages_hold_neither_warnings_of_a_run_nor_the_place_of_the_checkout():
    outputs = [{"output_type": "stream", "name": "stderr", "text": "warned"}, {"output_type": "stream", "name": "stdout", "text": "kept"}]
    page = book.dump(book.page_of(notebook(("code", f"x = '{ROOT}/results'"), outputs=outputs), "nbs/a.ipynb")).decode()
    assert "warned" not in page and "kept" in page and str(ROOT) not in page and "'results'" in page


def test_every_library_notebook_stands_once_in_the_contents_in_the_order_of_its_number_within_its_part():
    names = [path.relative_to(ROOT / "nbs").as_posix().removesuffix(".ipynb") for path in book.library(ROOT)]
    contents = book.contents({f"{name}.ipynb": b"" for name in names} | {"about/site.md": b""})
    listed = re.findall(r"^\d[\w/]+$", contents, re.M)
    assert sorted(listed) == sorted(names) and "about/site" in contents
    for part in contents.split("```{toctree}")[1:]:
        inside = re.findall(r"^\d[\w/]+$", part, re.M)
        assert inside == sorted(inside)
    assert [book.part_of(name) for name in ("1_data/02_x", "2_method/10_x", "3_severity/13_x", "4_paper/14_x", "16_x", "00_x")] == [
        list(book.PARTS)[k] for k in (0, 1, 2, 3, 4, 4)]


# ---------------------------------------------------------------- outputs


def test_notebooks_show_what_their_code_and_the_results_give():
    registry = book.load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    assert not (old := outputs.stale(ROOT, registry)), f"run `make outputs`, or: python docs/outputs.py {' '.join(old)}"


def test_pictures_of_slices_are_those_of_the_phantom():
    registry = book.load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    assert outputs.profile_of(registry, "table2_dice") == "cpu"
    assert {outputs.profile_of(registry, name) for name in ("figure_qualitative", "figure_coach", "train_single")} == {"smoke"}


def test_outputs_grow_old_with_code_and_results_and_not_with_prose(tmp_path):
    registry = book.load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    notebook_file, record = tmp_path / "nbs/experiments/table2_dice.ipynb", tmp_path / "results/cpu/table2_dice/run.json"
    for path in (notebook_file, record):
        path.parent.mkdir(parents=True)

    def told(prose: str, code: str, result: str) -> dict:
        notebook_file.write_text(json.dumps(notebook(("markdown", prose), ("code", code))))
        record.write_text(json.dumps({"outputs": {"tables/a.csv": result}}))
        return outputs.stamp(tmp_path, registry, "table2_dice")

    first = told("a", "1", "x")
    assert told("b", "1", "x") == first and told("a", "2", "x") != first and told("a", "1", "y") != first


def test_outputs_of_other_code_or_without_pictures_are_not_taken(tmp_path):
    def copy(**data) -> Path:
        shown = {"output_type": "display_data", "metadata": {}, "data": data}
        path = tmp_path / "executed.ipynb"
        path.write_text(json.dumps(notebook(("code", "show()"), outputs=(shown,))))
        return path

    cells = [{"source": "show()"}]
    found = outputs.outputs_of(copy(**{"text/plain": f"{tmp_path}/a.csv"}), cells, tmp_path)
    assert found == [[{"output_type": "display_data", "metadata": {}, "data": {"text/plain": "a.csv"}}]]
    assert outputs.outputs_of(copy(**{"text/plain": "a"}), [{"source": "other()"}], tmp_path) is None
    assert outputs.outputs_of(copy(**{"text/plain": "<Figure size 1x1>"}), cells, tmp_path) is None
    assert outputs.outputs_of(tmp_path / "gone.ipynb", cells, tmp_path) is None


# ---------------------------------------------------------------- results


def test_each_table_has_a_page_and_each_figure_its_files(tmp_path):
    for name in ("results/x/tables/table2.md", "results/x/tables/table2.csv", "figures/x/coach_masks.png", "figures/x/coach_masks.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("Table II (x)\n\n| a |\n|---|\n| 1 |")
    for run, said in (("figure_coach", {"outputs": {"figures/coach_masks.png": "x"}}), ("train_single/unet-seed0", {"commit": "0123456789abcdef"})):
        (tmp_path / "results/x" / run).mkdir(parents=True)
        (tmp_path / "results/x" / run / "run.json").write_text(json.dumps(said))
    registry = book.load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    pages = {"experiments/figure_coach.ipynb": json.dumps(notebook(("markdown", "# The coach\n\n> Harder masks."))).encode()}
    made = {name: data.decode() for name, data in book.profile_page(tmp_path, "x", pages, registry).items()}
    assert set(made) == {*(f"results/x/{name}" for name in ("index.md", "table2.md", "table2.csv", "figures.md", "runs/train_single.md")),
                         "figures/x/coach_masks.png", "figures/x/coach_masks.svg"}
    assert made["results/x/table2.md"].startswith("# Table II\n\nx. Made by table2; rows lead to their runs. Files: {download}`csv <table2.csv>`.\n\n| a |")
    assert "table2\nfigures" in made["results/x/index.md"]
    assert "**Coach masks.** Harder masks. From [The coach](../../experiments/figure_coach.ipynb). {download}" in made["results/x/figures.md"]
    assert "(run-x-train_single-unet)=\n" in made["results/x/runs/train_single.md"] and "| 0 | 0123456789ab | – | – |" in made["results/x/runs/train_single.md"]


def test_a_row_leads_to_its_runs_and_an_interval_stays_on_one_line():
    assert book.with_links("| U-Net | 0.6 [0.5, 0.7] | a b |", {"U-Net": "t"}) == "| [U-Net](#t) | 0.6\u00a0[0.5,\u00a00.7] | a b |"
    assert book.with_links("No table, 0.6 [0.5, 0.7]", {}) == "No table, 0.6 [0.5, 0.7]"


def test_claims_of_every_profile_are_shown_or_missed(tmp_path):
    assert b"No register" in book.claims_page(tmp_path)
    tables = tmp_path / "results" / "cpu" / "tables"
    tables.mkdir(parents=True)
    (tables / "claims.md").write_text("# Claims of cpu\n\nsupported")
    (tables / "findings.md").write_text("It held.")
    text = book.claims_page(tmp_path).decode()
    assert text.endswith("## Profile cpu\n\nIt held.\n\n### Claims of cpu\n\nsupported\n\n")
    registry = book.load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    assert "claims" not in book.profile_page(tmp_path, "cpu", {}, registry)["results/cpu/index.md"].decode()


def test_only_what_changed_is_written_and_what_is_gone_is_removed(tmp_path):
    assert book.write_tree(tmp_path, {"a.md": b"1", "d/b.md": b"2"}) == 2
    assert book.write_tree(tmp_path, {"a.md": b"1", "c.md": b"3"}) == 1
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.md", "c.md"]


def test_every_file_that_the_checklists_name_is_there():
    for path in (ROOT / "results" / "checklists").glob("*.md"):
        named = set(re.findall(r"(?:nbs|results|figures|docs)(?:/[\w.]+)+", path.read_text(encoding="utf-8")))
        assert named and not [name for name in named if not (ROOT / name).exists()], path.name


# ---------------------------------------------------------------- the shape report


def test_shape_of_a_known_notebook(tmp_path):
    function = 'def f(x):\n    """One\n    two."""\n\n    # why\n    y = x\n    return y'
    content = notebook(("markdown", "# T\n\none two three"), ("code", f"#| export\n{function}"), ("code", "f(1)"),
                       ("code", "#| export\ndef g(): return 1"), ("code", "assert f(2) == 2"))
    content["cells"][2]["outputs"] = [{"output_type": "display_data", "data": {"image/png": PNG}}]
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(content))
    found = shape.shape_of(path)
    assert found.lengths == (3, 1) and found.longest == (7, "f") and found.unseen == ("g",) and found.shown == 0.5
    assert (found.words, found.cells, found.testing, found.pictures) == (5, 4, 0.25, 1)
    assert found.misses() == ["words", "testing", "shown", "pictures"] and not shape.beyond_limits([found])
    assert "| 01_x | 2 | 3 | **5** | **25%** | **50%** | **1** |" in shape.report([found])


def test_beyond_the_limits_is_said(tmp_path):
    path = tmp_path / "01_x.ipynb"
    path.write_text(json.dumps(notebook(("code", "#| export\ndef f():\n" + "    1\n" * 40), ("markdown", "x" * 700_000))))
    assert shape.beyond_limits([shape.shape_of(path)]) == ["01_x: 700 kB", "01_x: f has 41 lines"]


# ---------------------------------------------------------------- a small site, really built


def test_a_small_site_builds_without_a_warning_and_loads_nothing(tmp_path):
    for name in ("sphinx", "myst_nb", "sphinx_book_theme"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs the extra `docs`: make docs installs it")
    try:
        importlib.metadata.distribution("sphinx-mathjax-offline")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra `docs`: make docs installs it")
    front = notebook(("markdown", "# Front\n\n$$ a^2 $$\n\n[next](01_x.ipynb#there)"), ("markdown", book.toctree(["01_x", "api"], "Part")))
    picture = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": PNG}}]
    second = notebook(("markdown", "# Second\n\n## There\n\n$x$"), ("code", "#| export\n1 + 1"), outputs=picture)
    api = book.api_page(ROOT / "nbs" / "00_core.ipynb", ROOT / "covidsev" / "core.py")
    api = api.replace(b"[00_core](../00_core.ipynb)", b"a notebook")
    book.write_tree(tmp_path / "source", {"index.ipynb": book.dump(book.page_of(front, "nbs/index.ipynb")),
                                          "01_x.ipynb": book.dump(book.page_of(second, "nbs/01_x.ipynb")), "api.md": api})
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", ROOT / "docs", "source", "html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert check.faults_of(tmp_path / "html") == []
    html = (tmp_path / "html" / "01_x.html").read_text(encoding="utf-8")
    assert "_static/tex-svg.js" in html and "tag_export" in html and "_images/" in html
    assert "covidsev.core.ConfigError" in (tmp_path / "html" / "api.html").read_text(encoding="utf-8")
