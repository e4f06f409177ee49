"""Lays out the pages of the book from what the repository holds: notebooks, results, figures and modules.

    python docs/book.py _docs/source

Nothing is listed by hand: the numbers of the notebooks give the order, the registry and the folders the rest.
Sphinx turns the result into pages (`make docs`).
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
import sys
from pathlib import Path

from covidsev.paper.experiments import Registry, load_registry

import shape
from outputs import profile_of
from shape import library, module_of

ROOT = Path(__file__).resolve().parents[1]

# Reading order: the folder of each part, those at the top last.
PARTS = {
    "The problem and the data": "1_data/",
    "The method": "2_method/",
    "From masks to severity": "3_severity/",
    "Experiments and results": "4_paper/",
    "Checking and tools": "",
}
FIRST = ("quarter_hour", "viewer")  # behind the front door
FENCE_OR_CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", re.S)
LINK = re.compile(r"(!?\[[^\]\n]*\])\(([^)\s]+)\)")
AS_RUN = ("As executed in the profile `smoke`: tiny networks on the embedded phantom. It shows what the notebook "
          "does; the numbers of each profile are under *Results*.")
DRAWN = "As drawn from the results of the profile `cpu`, on real slices; it shows none of them."
NOT_RUN = "Not executed: it answers for one machine alone."
Files = dict[str, bytes]


# ---------------------------------------------------------------- notebooks


def site_path(path: str) -> str | None:
    """Where a file of the repository stands on the site, or None. `nbs/` becomes the top."""
    path = path.rstrip("/")
    if path in ("nbs/experiments", "nbs/experiments/experiments.toml"):
        return "experiments/index.md"
    if path.startswith("nbs/"):
        return path.removeprefix("nbs/")
    if re.fullmatch(r"results/\w+/(tables/)?(claims|findings)\.md", path):
        return "claims.md"
    if path.startswith("results/checklists/"):
        return path.removeprefix("results/")
    if table := re.fullmatch(r"results/(\w+)/tables/(\w+)\.\w+", path):
        return f"results/{table[1]}/{table[2]}.md"
    if profile := re.fullmatch(r"results/(\w+)(/tables)?", path):
        return "results/published.md" if profile[1] == "published" else f"results/{profile[1]}/index.md"
    if re.fullmatch(r"docs/\w+\.(png|svg)", path):
        return path.replace("docs/", "pictures/")
    return path if path.startswith("figures/") else None


def move_links(text: str, notebook: str) -> str:
    """Markdown of `notebook` (a path in the repository) with its links as they are on the site.

    What is not on the site (a licence, a source file) loses its link, not its words. Code is left alone."""
    here = posixpath.dirname(notebook)
    base = posixpath.dirname(site_path(notebook) or notebook)

    def move(match: re.Match) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        moved = site_path(posixpath.normpath(posixpath.join(here, path)))
        return f"{label}({posixpath.relpath(moved, base or '.')}{mark}{anchor})" if moved else label[1:-1]

    pieces = FENCE_OR_CODE.split(text)
    return "".join(piece if k % 2 else LINK.sub(move, piece) for k, piece in enumerate(pieces))


def page_of(notebook: dict, path: str, note: str = "") -> dict:
    """A notebook as a page: nbdev's directives become tags, links lead to pages, `note` comes second."""
    cells = [each for cell in notebook["cells"] if (each := _page_cell(cell, path))]
    if note:
        cells.insert(1, {"cell_type": "markdown", "metadata": {}, "source": f"```{{note}}\n{note}\n```"})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:03d}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": language},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _page_cell(cell: dict, path: str) -> dict | None:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return {"cell_type": "markdown", "metadata": {}, "source": move_links(source, path)}
    directives = re.findall(r"^#\|\s*([\w-]+):?\s*(\S*)", source, re.M)
    names = dict(directives)
    if cell["cell_type"] != "code" or "default_exp" in names or "hide" in names:
        return None
    tags = [tag for tag in cell["metadata"].get("tags", []) if tag in ("parameters", "injected-parameters")]
    tags += ["remove-input"] * (names.get("echo") == "false") + ["export"] * ("export" in names)
    tags += ["hide-input"] * ("export" in names or names.get("code-fold") == "true" or _imports_alone(source))
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    outputs = [_page_output(each, path) for each in cell.get("outputs", []) if each.get("name") != "stderr"]
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {"tags": tags},
        "source": source,
        "outputs": outputs,
    }


def _page_output(output: dict, path: str) -> dict:
    """An output as it stands on a page: Markdown that code has printed leads to pages, as nothing else turns its links."""
    if "text/markdown" not in output.get("data", {}):
        return output
    text = move_links("".join(output["data"]["text/markdown"]), path)
    text = re.sub(r"\.(?:ipynb|md)(?=[#)])", ".html", text)
    return {**output, "data": {**output["data"], "text/markdown": text}}


def _imports_alone(source: str) -> bool:
    """Whether a cell holds nothing but imports, which are folded like what stands in the package."""
    body = ast.parse(source).body
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def dump(notebook: dict) -> bytes:
    """A notebook as bytes, without the place of this checkout in it."""
    text = json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True)
    return text.replace(f"{ROOT}/", "").replace(str(ROOT), ".").encode()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def head_of(notebook: dict) -> tuple[str, str]:
    """Title and one-sentence blockquote of a notebook."""
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title, quote = re.search(r"^# +(.+)$", text, re.M), re.search(r"^> *(.+)$", text, re.M)
    return (title[1].strip() if title else "Untitled", quote[1].strip() if quote else "")


def library_pages(root: Path) -> Files:
    """The library notebooks, the front door and the quarter of an hour behind it."""
    paths = [*(root / "nbs" / f"{name}.ipynb" for name in ("index", *FIRST)), *library(root)]
    paths = [path for path in paths if path.is_file()]
    names = [path.relative_to(root / "nbs").as_posix() for path in paths]
    return {name: dump(page_of(read_json(path), f"nbs/{name}")) for name, path in zip(names, paths, strict=True)}


def experiment_pages(root: Path, registry: Registry) -> Files:
    """The experiment notebooks with the outputs that they keep, and where these come from."""
    pages = {}
    for path in sorted((root / "nbs" / "experiments").glob("*.ipynb")):
        notebook = read_json(path)
        shown = any(cell.get("outputs") for cell in notebook["cells"])
        note = {"cpu": DRAWN, "smoke": AS_RUN}[profile_of(registry, path.stem)] if shown else NOT_RUN
        pages[f"experiments/{path.name}"] = dump(page_of(notebook, f"nbs/experiments/{path.name}", note))
    return pages


# ---------------------------------------------------------------- order


def natural(name: str) -> list:
    """Sorts table10 behind table9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def toctree(pages: list[str], caption: str = "", hidden: bool = True) -> str:
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden + [":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])


def part_of(name: str) -> str:
    """The part of the book in which the library notebook `name` stands, named as below nbs/."""
    return next(part for part, folder in PARTS.items() if name.startswith(folder))


def contents(pages: Files) -> str:
    """The table of contents of the front page, part by part."""
    library = sorted(page.removesuffix(".ipynb") for page in pages if re.match(r"\d[\w/]*\.ipynb$", page))
    others = {
        "Experiments and results": ["claims", "results/index", "experiments/index"],
        "Checking and tools": [
            "shape",
            *sorted(p.removesuffix(".md") for p in pages if re.match("about/|checklists/", p)),
        ],
    }
    parts = []
    for part in PARTS:
        first = others.get(part, []) if part == "Experiments and results" else []
        last = others.get(part, []) if not first else []
        parts.append(toctree(first + [name for name in library if part_of(name) == part] + last, part))
    there = [name for name in FIRST if f"{name}.ipynb" in pages]
    first = [toctree(there)] if there else []
    return "\n".join([*first, *parts, toctree(["api/index"], "API")])


def experiments_index(pages: Files, registry: Registry) -> bytes:
    """The list of experiments, in groups: findings, tables, figures, then the runs that they read."""
    groups: dict[str, list[str]] = {"Findings and checks": [], "Tables": [], "Figures": [], "Runs": []}
    for page in sorted((page for page in pages if page.startswith("experiments/")), key=natural):
        name = Path(page).stem
        kind = registry.experiments[name].kind if name in registry.experiments else ""
        group = (
            "Tables"
            if name.startswith("table")
            else "Figures"
            if name.startswith("figure")
            else "Runs"
            if kind == "compute"
            else "Findings and checks"
        )
        groups[group].append(name)
    text = (
        "# The experiments\n\nEach notebook tests a claim. Runs compute and write `results/`; tables and figures "
        "only read it.\n\n"
    )
    for group, names in groups.items():
        lines = [
            f"- [{head_of(json.loads(pages[f'experiments/{name}.ipynb']))[0]}]({name}.ipynb)"
            for name in names
        ]
        text += "\n".join([f"## {group}", "", *lines, "", toctree(names), ""]) if names else ""
    return text.encode()


# ---------------------------------------------------------------- results


def results_pages(root: Path, pages: Files, registry: Registry) -> Files:
    """A page a profile with its tables and figures, one with the printed numbers, and their files."""
    made: Files = {}
    profiles = sorted(path.name for path in (root / "results").glob("*") if (path / "tables").is_dir())
    profiles += sorted({path.name for path in (root / "figures").glob("*") if path.is_dir()} - set(profiles))
    profiles = [name for name in profiles if name in registry.profiles and registry.profiles[name].committed]
    for profile in profiles:
        made |= profile_page(root, profile, pages, registry)
    made |= published_page(root)
    names = [*(f"{profile}/index" for profile in profiles), "published"]
    made["results/index.md"] = (
        "# Results\n\nWhat was computed, profile by profile, and what the drafts and related papers "
        "print.\n\n" + toctree(names, hidden=False)
    ).encode()
    return made


def profile_page(root: Path, profile: str, pages: Files, registry: Registry) -> Files:
    """A page a table, one with the figures, one an experiment with its runs, and one that lists them."""
    made: Files = {}
    title = registry.profiles[profile].title if profile in registry.profiles else ""
    folder = root / "results" / profile / "tables"
    tables = [path for path in folder.glob("*.md") if path.stem not in ("claims", "findings")]  # on their own page
    names = sorted((path.stem for path in tables), key=natural)
    runs, targets = runs_pages(root, profile, pages, registry)
    for name in names:
        made |= table_page(folder, name, profile, pages, targets)
    figures = sorted((root / "figures" / profile).glob("*.png"))
    makers = makers_of(root, profile)
    text = f"# Figures, profile {profile}\n\n" + "".join(_figure(path, profile, pages, makers) for path in figures)
    made |= {f"results/{profile}/figures.md": text.encode()} if figures else {}
    for path in figures:
        files = sorted(path.parent.glob(f"{path.stem}.*"))
        files += sorted((root / "results" / profile / makers.get(path.name, "none")).glob("*.csv"))
        made |= {f"figures/{profile}/{each.name}": each.read_bytes() for each in files}
    listed = toctree([*names, *(["figures"] if figures else []), *(Path(page).relative_to(f"results/{profile}").with_suffix("").as_posix()
                                                                   for page in runs if page.endswith(".md"))], hidden=False)
    head = f"# Profile {profile}\n\n{title[:1].upper()}{title[1:]}\n\n{listed}"
    return made | runs | {f"results/{profile}/index.md": head.encode()}


def runs_pages(root: Path, profile: str, pages: Files, registry: Registry) -> tuple[Files, dict[str, str]]:
    """A page an experiment with the seeds of each row: commit, time, numbers; and title of a row -> its place there."""
    made, targets = {}, {}
    for each in (each for each in registry.experiments.values() if each.kind == "compute" and each.rows):
        parts, folder = [], root / "results" / profile / each.name
        for row, words in each.rows.items():
            files = sorted(folder.glob(f"{row}-seed*/run.json"), key=lambda path: natural(path.parent.name))
            if not files:
                continue
            target, title = f"run-{profile}-{each.name}-{row}", words.get("title", row)
            targets.setdefault(title, target)
            lines = [_run(path, profile, each.name, made) for path in files]
            parts.append("\n".join([f"({target})=", f"## {title}", "", f"`{row}`", "", "| seed | commit | minutes | numbers |", "|---|---|--:|---|",
                                    *lines, ""]))
        if parts:
            head = f"# Runs of {each.name}, profile {profile}\n\nMade by {_link(each.name, pages, up=3)}.\n\n"
            made[f"results/{profile}/runs/{each.name}.md"] = (head + "\n".join(parts)).encode()
    return made, targets


def _run(path: Path, profile: str, name: str, made: Files) -> str:
    """A line on one run; its numbers are added to the files."""
    record, seed = read_json(path), path.parent.name.rsplit("seed", 1)[1]
    timing = path.parent / "timing.json"
    minutes = f"{read_json(timing)['seconds'] / 60:.0f}" if timing.is_file() else "–"
    links = []
    for file in sorted(path.parent.glob("metrics.csv")):
        made[f"results/{profile}/runs/{name}/{path.parent.name}.csv"] = file.read_bytes()
        links.append(f"{{download}}`csv <{name}/{path.parent.name}.csv>`")
    return f"| {seed} | {str(record.get('commit', '–'))[:12]} | {minutes} | {', '.join(links) or '–'} |"


def makers_of(root: Path, profile: str) -> dict[str, str]:
    """File name of a figure -> the experiment whose run drew it."""
    return {Path(output).name: path.parent.name for path in sorted((root / "results" / profile).glob("*/run.json"))
            for output in read_json(path).get("outputs", {}) if output.startswith("figures/")}


def with_links(line: str, targets: dict[str, str]) -> str:
    """A line of a table: its row leads to the runs behind the numbers, and an interval stays on one line."""
    cells = line.split(" | ")
    first = cells[0].removeprefix("| ")
    if line.startswith("| ") and first in targets:
        cells[0] = f"| [{first}](#{targets[first]})"
    return " | ".join(re.sub(r"(?<=[\d,]) (?=\[[-+\d]|[-+]?\d\.)", "\u00a0", cell) for cell in cells) if line.startswith("|") else line


def table_page(folder: Path, name: str, profile: str, pages: Files, targets: dict[str, str] | None = None) -> Files:
    """A table with its notes, links to the notebook and the runs that made it, and its files."""
    files = [each for each in sorted(folder.glob(f"{name}.*")) if each.suffix != ".md"]
    links = ", ".join(f"{{download}}`{each.suffix[1:]} <{each.name}>`" for each in files)
    body = move_links((folder / f"{name}.md").read_text(encoding="utf-8"), f"results/{profile}/{name}.md").strip()
    heading, _, rest = body.partition("\n")
    rest = "\n".join(with_links(line, targets or {}) for line in rest.strip().splitlines())
    heading = re.sub(r" \(.*", "", heading.lstrip("# "))  # n, seeds and profile are told below
    told = re.search(r"\((.*)\)$", body.partition("\n")[0])
    text = (f"# {heading}\n\n{told[1] + '. ' if told else ''}Made by {_link(name, pages)}; rows lead to their runs."
            f"{' Files: ' + links + '.' if files else ''}\n\n{rest}\n")
    return {f"results/{profile}/{name}.md": text.encode()} | {f"results/{profile}/{each.name}": each.read_bytes() for each in files}


def _link(name: str, pages: Files, up: int = 2) -> str:
    """The title of experiment `name`, as a link to it if it has a page."""
    page = pages.get(f"experiments/{name}.ipynb")
    return f"[{head_of(json.loads(page))[0]}]({'../' * up}experiments/{name}.ipynb)" if page else name


def _figure(path: Path, profile: str, pages: Files, makers: dict[str, str]) -> str:
    """A figure with the words of the notebook that draws it, its data, and its SVG to keep."""
    name, label = makers.get(path.name, ""), path.stem.replace("_", " ")
    words = [f"**{label[:1].upper()}{label[1:]}.**"]
    if name:
        page = pages.get(f"experiments/{name}.ipynb")
        words += [head_of(json.loads(page))[1]] * bool(page) + [f"From {_link(name, pages)}."]
    files = [path.with_suffix(".svg")] * path.with_suffix(".svg").is_file()
    files += sorted((path.parents[2] / "results" / profile / name).glob("*.csv")) if name else []
    words += [f"{{download}}`{each.name if each.suffix == '.csv' else 'svg'} <../../figures/{profile}/{each.name}>`" for each in files]
    head = [f"```{{figure}} ../../figures/{profile}/{path.name}", f":alt: {label}, profile {profile}"]
    return "\n".join([*head, "", " ".join(words), "```", "", ""])


def published_page(root: Path) -> Files:
    """A page a table of printed numbers, and one that lists them."""
    made: Files = {}
    files = sorted((root / "results" / "published").glob("*.csv"))
    for path in files:
        made[f"results/published/{path.name}"] = path.read_bytes()
        table = f"```{{csv-table}}\n:file: {path.name}\n:header-rows: 1\n```\n"
        made[f"results/published/{path.stem}.md"] = f"# Printed: {path.stem.replace('_', ' ')}\n\n{table}".encode()
    listed = toctree([f"published/{path.stem}" for path in files], hidden=False)
    text = f"# Printed numbers\n\nWhat drafts and related papers print, with the place of each number.\n\n{listed}"
    return made | {"results/published.md": text.encode()}


def claims_page(root: Path) -> bytes:
    """The findings and the register of claims of every profile that has them."""
    found: dict[str, list[Path]] = {}
    for pattern in ("*/tables/findings.md", "*/claims.md", "*/tables/claims.md"):
        for path in sorted((root / "results").glob(pattern)):
            found.setdefault(path.relative_to(root / "results").parts[0], []).append(path)
    if not found:
        return (
            b"# The claims\n\n```{note}\nNo register of claims was written where this site was built.\n```\n"
        )
    text = "# The claims\n\nWhat the paper states, the test that decides it, and what we find.\n\n"
    for profile in sorted(found):
        text += f"## Profile {profile}\n\n"
        for path in found[profile]:
            body = move_links(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
            text += re.sub(r"^(#+) ", r"##\1 ", body, flags=re.M).strip() + "\n\n"
    return text.encode()


# ---------------------------------------------------------------- reference


def exported_names(path: Path) -> list[str]:
    """The public functions and classes of a module, read and not imported."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def api_page(notebook: Path, module: Path) -> bytes:
    """A module: its names in short, then in full, from the docstrings."""
    name = module_of(notebook)
    names = [f"   {each}" for each in exported_names(module)]
    lines = [
        f"# {name}",
        "",
        f"Written in [{notebook.stem}](../{notebook.relative_to(notebook.parents[1] if notebook.parent.name == 'nbs' else notebook.parents[2]).as_posix().removeprefix('nbs/')}).",
        "",
        "```{eval-rst}",
        f".. currentmodule:: {name}",
        "",
        ".. autosummary::",
        "   :nosignatures:",
        "",
        *names,
        "",
        f".. automodule:: {name}",
        "   :members:",
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def api_pages(root: Path) -> Files:
    """A page a module, and their list in the order of the notebooks."""
    made, rows, modules = {}, [], []
    for notebook in library(root):
        name = module_of(notebook)
        module = root / f"{name.replace('.', '/')}.py"
        if module.is_file():
            made[f"api/{name}.md"] = api_page(notebook, module)
            modules.append(name)
            rows.append(f"| [{name}]({name}.md) | {_first_line(module)} |")
    index = [
        "# API reference",
        "",
        "One module a notebook, in the order in which they may import each other.",
        "",
        "| module | what it is for |",
        "|---|---|",
        *rows,
        "",
        toctree(modules),
    ]
    return made | {"api/index.md": "\n".join(index).encode()}


def _first_line(path: Path) -> str:
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return words.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


# ---------------------------------------------------------------- all together


def pages_of(root: Path = ROOT) -> Files:
    """Every page and picture of the site, by its path there."""
    registry = load_registry(root / "nbs" / "experiments" / "experiments.toml")
    pages = library_pages(root) | experiment_pages(root, registry)
    pages |= {f"about/{path.name}": path.read_bytes() for path in sorted((root / "docs").glob("*.md"))}
    for path in sorted((root / "results" / "checklists").glob("*.md")):
        here = path.relative_to(root).as_posix()
        pages[f"checklists/{path.name}"] = move_links(path.read_text(encoding="utf-8"), here).encode()
    pages |= results_pages(root, pages, registry) | api_pages(root)
    pages |= {
        "experiments/index.md": experiments_index(pages, registry),
        "claims.md": claims_page(root),
        "shape.md": shape.page(root).encode(),
    }
    front = json.loads(pages["index.ipynb"])
    front["cells"].append(
        {"cell_type": "markdown", "id": "contents", "metadata": {}, "source": contents(pages)}
    )
    linked = {
        target
        for page in front["cells"]
        for target in re.findall(r"\]\((pictures/[\w/.]+)\)", "".join(page["source"]))
    }
    pages |= {target: (root / "docs" / Path(target).name).read_bytes() for target in linked}
    return pages | {"index.ipynb": dump(front)}


def write_tree(folder: Path, files: Files) -> int:
    """Make `folder` hold exactly `files`; returns how many were written. Equal files keep their time."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in files:
            path.unlink()
    changed = {
        name: data
        for name, data in files.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != data
    }
    for name, data in changed.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return len(changed)


if __name__ == "__main__":
    pages = pages_of()
    print(f"{len(pages)} files of the book, {write_tree(Path(sys.argv[1]), pages)} of them new or changed")
