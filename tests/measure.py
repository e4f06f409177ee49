"""The size and shape of the house, as numbers: python tests/measure.py. Code lines are neither blank, comment nor docstring."""
import ast
import io
import json
import re
import statistics
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def modules() -> dict[str, str]:
    """Name -> source of every module of the library."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
            for path in sorted((ROOT / "covidsev").rglob("[a-z]*.py"))}


def code_lines(source: str) -> set[int]:
    """The numbers of the code lines of a text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in SILENT for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, *DEFINITIONS)) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def function_lengths(source: str) -> dict[str, int]:
    """Function or Class.method -> its code lines; functions inside functions count with these."""
    lines, found = code_lines(source), {}
    for node in ast.parse(source).body:
        inner = [(f"{node.name}.", each) for each in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
        for prefix, each in inner:
            if isinstance(each, DEFINITIONS[:2]):
                found[prefix + each.name] = len(lines & set(range(each.lineno, each.end_lineno + 1)))
    return found


def foreign_private_names(sources: dict[str, str]) -> list[str]:
    """Every import of another module's `_name`."""
    return [f"{module}: {alias.name}" for module, source in sources.items() for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("covidsev"))
            for alias in node.names if re.match(r"_[^_]", alias.name)]


def notebook_code(folder: Path) -> str:
    """The code cells of all notebooks in a folder, as one text."""
    cells = [cell for path in sorted(folder.glob("*.ipynb")) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def without_user(sources: dict[str, str]) -> list[str]:
    """Public functions and classes that no other definition, experiment, page, script or command uses."""
    users = [notebook_code(ROOT / "nbs" / "experiments"), notebook_code(ROOT / "nbs")]
    users += [path.read_text(encoding="utf-8") for pattern in ("docs/*.py", "workflow/*", "settings.ini", "nbs/experiments/*.toml")
              for path in ROOT.glob(pattern) if path.is_file()]
    words = {name: set(re.findall(r"\w+", text)) for name, text in enumerate(users)}
    found, pieces = [], []
    for module, source in sources.items():
        for node in ast.parse(source).body:
            names = [node.name] if isinstance(node, DEFINITIONS) else []
            pieces.append((module, names, set(re.findall(r"\w+", ast.unparse(node))), getattr(node, "decorator_list", [])))
    for module, names, _, decorators in pieces:
        for name in names:
            decorated = any("command" in ast.unparse(each) or "group" in ast.unparse(each) for each in decorators)
            inside = any(name in used for other, others, used, _ in pieces if name not in others and "__all__" not in used)
            if not name.startswith("_") and not decorated and not inside and not any(name in each for each in words.values()):
                found.append(f"{module}.{name}")
    return found


def long_lines(sources: dict[str, str]) -> list[str]:
    """Lines of more than 100 characters, but for what nbdev writes and module docstrings."""
    made = ("# ", '"""', "__all__", " " * 11)
    return [f"{module} line {number}: {len(line)}" for module, source in sources.items()
            for number, line in enumerate(source.splitlines(), 1) if len(line) > 100 and not line.startswith(made)]


def measures() -> dict[str, object]:
    """All of it."""
    sources = modules()
    sizes = {name: len(code_lines(source)) for name, source in sources.items()}
    lengths = sorted(length for source in sources.values() for length in function_lengths(source).values())
    notebooks = {path.stem: len(json.loads(path.read_text(encoding="utf-8"))["cells"]) for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
                 if "default_exp" in path.read_text(encoding="utf-8")}
    tests = sum(len(code_lines(path.read_text(encoding="utf-8"))) for path in (ROOT / "tests").rglob("*.py"))
    return {"notebooks": len(notebooks), "code lines": sum(sizes.values()),
            "largest modules": sorted(((size, name) for name, size in sizes.items()), reverse=True)[:4],
            "median function": statistics.median(lengths), "90th percentile": lengths[int(0.9 * len(lengths))],
            "foreign private names": foreign_private_names(sources), "without a user": without_user(sources),
            "cells": {name: number for name, number in notebooks.items() if not 25 <= number <= 60},
            "test lines": tests, "long lines": long_lines(sources)}


if __name__ == "__main__":
    for what, value in measures().items():
        print(f"{what}: {value}" if not isinstance(value, list) else f"{what}: {len(value)}\n  " + "\n  ".join(map(str, value[:40])))
