"""What the library notebooks look like beside what we aim at: short functions, prose, tests beside code.

    python docs/shape.py

Targets are aims and only reported; LIMITS are rules, and tests/test_house.py fails beyond them.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

TARGETS = {
    "median": "at most 6",
    "p90": "at most 18",
    "words": "from 400",
    "testing": "from 33 %",
    "shown": "from 85 %",
    "pictures": "2 to 6",
    "kB": "at most 600",
}
LIMITS = {"kB": 700, "longest": 40}
TEST = re.compile(r"^\s*(assert|test_\w+\(|with .*raises|np\.testing|assert_)", re.M)


@dataclass(frozen=True)
class Shape:
    """The shape of one notebook; functions count in lines without docstring, comments and blanks."""

    name: str
    words: int  # of prose
    cells: int  # of code
    testing: float  # share of the code cells that test
    lengths: tuple[int, ...]  # lines of code of each exported function and method
    longest: tuple[int, str]  # in lines of the file, docstring and all, with its name
    unseen: tuple[str, ...]  # exports not used in the next two code cells
    shown: float  # share of the exports that are
    pictures: int
    kB: float

    @property
    def median(self) -> float:
        return statistics.median(self.lengths) if self.lengths else 0

    @property
    def p90(self) -> float:
        return percentile90(self.lengths)

    def misses(self) -> list[str]:
        """The targets that this notebook does not reach, in words."""
        found = {
            "median": self.median > 6,
            "p90": self.p90 > 18,
            "words": self.words < 400,
            "testing": self.testing < 1 / 3,
            "shown": self.shown < 0.85,
            "pictures": not 2 <= self.pictures <= 6,
            "kB": self.kB > 600,
        }
        return [name for name, missed in found.items() if missed]


def percentile90(lengths: tuple[int, ...]) -> float:
    return (
        statistics.quantiles(lengths, n=10, method="inclusive")[-1]
        if len(lengths) > 1
        else float(sum(lengths))
    )


def functions_of(source: str) -> list[tuple[str, int, int]]:
    """Name, lines of code, and lines in the file of every function and method in a cell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            signature = range(node.lineno, node.body[0].lineno)
            used = {line for each in body for line in range(each.lineno, each.end_lineno + 1)} | set(
                signature
            )
            lines = source.splitlines()
            code = [
                line
                for line in used
                if lines[line - 1].strip() and not lines[line - 1].lstrip().startswith("#")
            ]
            found.append((node.name, len(code), node.end_lineno - node.lineno + 1))
    return found


def public_names(source: str) -> list[str]:
    """Functions and classes that a cell defines for others."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]


def shape_of(path: Path) -> Shape:
    """Measure one library notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    exports = [k for k, source in enumerate(code) if re.match(r"#\|\s*export\b", source)]
    names = [(name, k) for k in exports for name in public_names(code[k])]
    unseen = tuple(
        name for name, k in names if not any(re.search(rf"\b{name}\b", each) for each in code[k + 1 : k + 3])
    )
    functions = [each for k in exports for each in functions_of(code[k])]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return Shape(
        name=path.stem,
        words=sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown"),
        cells=len(code),
        testing=sum(bool(TEST.search(source)) for source in code) / max(len(code), 1),
        lengths=tuple(lines for _, lines, _ in functions),
        longest=max(((total, name) for name, _, total in functions), default=(0, "")),
        unseen=unseen,
        shown=1 - len(unseen) / len(names) if names else 1.0,
        pictures=sum(
            "image/png" in output.get("data", {}) or "image/svg+xml" in output.get("data", {})
            for output in outputs
        ),
        kB=path.stat().st_size / 1000,
    )


def library(root: Path) -> list[Path]:
    """The library notebooks in reading order: the parts of the house are folders, numbered like their notebooks."""
    found = [path for path in (root / "nbs").rglob("[0-9]*.ipynb") if path.parent.name != "experiments"]
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)


def module_of(notebook: Path) -> str:
    """The module that a library notebook makes: nbs/2_method/03_infnet.ipynb makes covidsev.method.infnet."""
    parts = [notebook.parent.name, notebook.stem] if notebook.parent.name != "nbs" else [notebook.stem]
    return ".".join(["covidsev", *(part.split("_", 1)[1] for part in parts)])


def shapes(root: Path) -> list[Shape]:
    """The shapes of all library notebooks, in reading order."""
    return [shape_of(path) for path in library(root)]


def beyond_limits(found: list[Shape]) -> list[str]:
    """What breaks a rule."""
    return [f"{each.name}: {each.kB:.0f} kB" for each in found if each.kB > LIMITS["kB"]] + [
        f"{each.name}: {each.longest[1]} has {each.longest[0]} lines"
        for each in found
        if each.longest[0] > LIMITS["longest"]
    ]


def report(found: list[Shape]) -> str:
    """The shapes as a Markdown table, what misses the targets in bold, and the worst offenders."""
    lengths = tuple(length for each in found for length in each.lengths)
    rows = [
        [each.name, *(f"**{value}**" if name in each.misses() else value for name, value in _values(each))]
        for each in found
    ]
    table = [["notebook", *TARGETS], ["---"] * (len(TARGETS) + 1), ["*aim*", *TARGETS.values()], *rows]
    summary = (
        f"{len(found)} notebooks, {len(lengths)} functions and methods: "
        f"median {statistics.median(lengths):g} lines of code, 90th percentile {percentile90(lengths):g}."
    )
    return "\n\n".join([summary, "\n".join(f"| {' | '.join(row)} |" for row in table), *offenders(found)])


def offenders(found: list[Shape], most: int = 5) -> list[str]:
    """The worst of all notebooks, in sentences."""
    far = sorted((each for each in found if each.misses()), key=lambda each: (-len(each.misses()), each.name))
    long = sorted(((each.longest, each.name) for each in found), reverse=True)
    hidden = sorted((each for each in found if each.unseen), key=lambda each: -len(each.unseen))
    lists = {
        "Furthest from the targets": [f"{each.name} ({', '.join(each.misses())})" for each in far],
        "Longest functions, docstring and all": [f"`{name}.{what}` {lines}" for (lines, what), name in long],
        "Most exports not shown within two cells": [
            f"{each.name} ({len(each.unseen)}: {', '.join(f'`{name}`' for name in each.unseen[:4])}"
            f"{', ...' if len(each.unseen) > 4 else ''})"
            for each in hidden
        ],
    }
    return [f"{what}: {'; '.join(names[:most])}." for what, names in lists.items() if names]


def _values(each: Shape) -> list[tuple[str, str]]:
    values = [
        f"{each.median:g}",
        f"{each.p90:.0f}",
        str(each.words),
        f"{each.testing:.0%}",
        f"{each.shown:.0%}",
        str(each.pictures),
        f"{each.kB:.0f}",
    ]
    return list(zip(TARGETS, values))


PAGE = """# The shape of the notebooks

Measured when this site was built; in bold what misses its target. *median* and *p90* are lines of code of the
exported functions, without docstring, comments and blank lines; *testing* is the share of the code cells that
test; *shown* the share of exports that are used within the next two code cells.

"""


def page(root: Path) -> str:
    """The report as a page of the site."""
    return PAGE + report(shapes(root)) + "\n"


if __name__ == "__main__":
    print(report(shapes(Path(__file__).resolve().parents[1])))
