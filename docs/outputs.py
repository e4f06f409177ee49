"""Brings what the notebooks show up to date: `make outputs`, or `python docs/outputs.py NAME ...`.

Experiments that draw tables or curves show those of the results of `cpu`: numbers, no slices. Those that compute, and pictures of slices,
show a run of `smoke`, on the phantom. The front door and the last part of the quarter of an hour show numbers of `cpu`, too.
nbs/experiments/outputs.json keeps a hash of the code and of the results behind each; a test compares.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from covidsev.core import DataMissingError, read_json, sha256_bytes, sha256_json, write_json
from covidsev.paper.experiments import Registry, Step, code_cells, load_registry, resolve, steps_of
from covidsev.paper.runner import Child, Places

ROOT = Path(__file__).resolve().parents[1]
SLICES = {"figure_qualitative", "figure_coach", "figure_reconstruction"}  # pictures of slices are in these
FRONT = {"index": "", "quarter_hour": 'results = repo_root() / "results"'}  # from which cell on; "" is all of it
READ = "cpu/tables/claims.csv", "cpu/tables/findings.md", "cpu/tables/table2_dice.csv", "cpu/scan_test/metrics.csv"


def notebook_of(root: Path, name: str) -> Path:
    return root / "nbs" / ("" if name in FRONT else "experiments") / f"{name}.ipynb"


def profile_of(registry: Registry, name: str) -> str:
    """The profile whose outputs a notebook shows."""
    each = registry.experiments.get(name)
    return "smoke" if each and (each.kind == "compute" or name in SLICES) else "cpu"


def _imports_alone(source: str) -> bool:
    lines = re.sub(r"\([^)]*\)", "", source).splitlines()
    return all(re.match(r"(#|import |from |$)", line) for line in lines)


def shown_cells(root: Path, name: str) -> list[dict]:
    """The code cells whose outputs are kept here, and before them those with imports alone."""
    cells = code_cells(notebook_of(root, name))
    first = next((k for k, cell in enumerate(cells) if FRONT.get(name, "") in cell["source"]), len(cells))
    return [cell for k, cell in enumerate(cells) if k >= first or _imports_alone(cell["source"])]


def stamp(root: Path, registry: Registry, name: str) -> dict[str, str]:
    """What the outputs of a notebook come from: the profile, a hash of its code, and one of the results of `cpu`."""
    profile = profile_of(registry, name)
    code = sha256_bytes("\n\n".join(cell["source"] for cell in shown_cells(root, name)).encode())
    if profile == "smoke":
        return {"profile": profile, "code": code[:16]}
    if name in FRONT:
        files = [root / "results" / path for path in READ]
        results = [sha256_bytes(path.read_bytes()) if path.is_file() else "" for path in files]
    else:
        results = Places(root).record(profile, name).get("outputs", {})
    return {"profile": profile, "code": code[:16], "results": sha256_json(results)[:16]}


def stale(root: Path, registry: Registry) -> list[str]:
    """The notebooks whose outputs are not those of their code and of the results that are here."""
    path = root / "nbs" / "experiments" / "outputs.json"
    kept = read_json(path) if path.is_file() else {}
    return [name for name in (*FRONT, *registry.experiments)
            if kept.get(name) != stamp(root, registry, name)]


def clean(output: dict, root: Path) -> dict | None:
    """An output without the place of this checkout, or None for what was only said on the way."""
    if output.get("name") == "stderr":
        return None
    text = json.dumps(output, ensure_ascii=False).replace(f"{root}/", "").replace(str(root), ".")
    return json.loads(re.sub(r"/tmp/covidsev-outputs-\w+/", "", text))


def _half_drawn(copy: list[dict], number: int) -> set[str]:
    """The sizes of pictures that a cell leaves behind without showing them and that a later cell goes on with."""
    def sizes(cell: dict) -> set[str]:
        texts = ("".join(output.get("data", {}).get("text/plain", "")) for output in cell["outputs"])
        return {size for text in texts for size in re.findall(r"Figure size [\d.x]+", text)}

    body = ast.parse(copy[number]["source"]).body
    left = set() if body and isinstance(body[-1], ast.Expr) else sizes(copy[number])
    return left & set().union(*(sizes(cell) for cell in copy[number + 1:]))


def outputs_of(executed: Path, cells: list[dict], root: Path) -> list[list[dict]] | None:
    """The outputs of `cells` in an executed copy, or None if it has other code or was run without pictures."""
    try:
        copy = [cell for cell in code_cells(executed) if "injected-parameters" not in cell["tags"]]
    except Exception:  # there is none
        return None
    blind = any("<Figure size" in str(output.get("data", {}).get("text/plain")) and "image/png" not in output["data"]
                for cell in copy for output in cell["outputs"])
    if blind or [cell["source"] for cell in copy] != [cell["source"] for cell in cells]:
        return None
    found = []
    for number, cell in enumerate(copy):
        half = _half_drawn(copy, number)
        whole = [each for each in cell["outputs"] if not any(size in str(each.get("data", {}).get("text/plain")) for size in half)]
        found.append([kept for each in whole if (kept := clean(each, root))])
    return found


def draw(root: Path, registry: Registry, name: str, folder: Path) -> Path:
    """The executed copy of a notebook that only reads results; it leaves them alone."""
    copy, places = folder / f"{name}.ipynb", Places(root)
    if name in FRONT:
        cells = [{**cell, "outputs": [], "metadata": {}} for cell in shown_cells(root, name)]
        cells[0]["metadata"]["tags"] = ["parameters"]  # papermill asks for one
        kept = [{key: value for key, value in cell.items() if key != "tags"} for cell in cells]
        write_json(folder / "front.ipynb", {**read_json(notebook_of(root, name)), "cells": kept})
        child = Child("covidsev.paper.runner.execute", folder / "front.ipynb", {}, copy)
    else:
        run = resolve(registry, "cpu", name)
        where = {"output": folder / name, "results": places.results("cpu"), "local": folder / "local", "checkpoints": folder / "none"}
        child = Child("covidsev.paper.runner.perform", run, folder / name, copy, {key: str(path) for key, path in where.items()})
    try:
        child.result()
    finally:
        child.stop()
    return copy


def compute(root: Path, registry: Registry, name: str) -> Path:
    """The executed copy of a run on the phantom: the one that is here, or a new one."""
    steps = steps_of(registry, "smoke", name)  # none for what only others ask for
    step = steps[0] if steps else Step(name, next(iter(registry.experiments[name].rows)), 0)
    folder = root / "results" / "smoke" / step.name
    if outputs_of(folder / "executed.ipynb", shown_cells(root, name), root) is None:
        shutil.rmtree(folder, ignore_errors=True)
        chosen = ["--row", step.row, "--seed", str(step.seed)] if step.row else []
        command = [sys.executable, "-m", "covidsev.cli", "reproduce", "--only", name, *chosen, "--out", str(root)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "executed.ipynb"


def update(root: Path, registry: Registry, name: str) -> None:
    """Puts outputs and their stamp in place."""
    path, cells, said = notebook_of(root, name), shown_cells(root, name), stamp(root, registry, name)
    with tempfile.TemporaryDirectory(prefix="covidsev-outputs-") as folder:
        try:
            executed = compute(root, registry, name) if said["profile"] == "smoke" else draw(root, registry, name, Path(folder))
            found = outputs_of(executed, cells, root)
        except DataMissingError:  # nothing to show yet
            found = [[] for _ in cells]
    if found is None:
        raise SystemExit(f"{executed}: other code, or no pictures; run it again")
    whole, new = read_json(path), dict(zip((cell["id"] for cell in cells), found, strict=True))
    for cell in whole["cells"]:
        if cell["id"] in new:
            cell["outputs"] = new[cell["id"]]
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    stamps = root / "nbs" / "experiments" / "outputs.json"
    write_json(stamps, {**(read_json(stamps) if stamps.is_file() else {}), name: said})


def main(names: list[str]) -> None:
    os.environ.pop("MPLBACKEND", None)  # notebooks show their pictures themselves
    registry = load_registry(ROOT / "nbs" / "experiments" / "experiments.toml")
    todo = names or stale(ROOT, registry)
    for number, name in enumerate(todo, 1):
        print(f"{number}/{len(todo)} {name}", flush=True)
        update(ROOT, registry, name)
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], check=True, cwd=ROOT)
    print("nothing to do" if not todo else f"{len(todo)} notebooks")


if __name__ == "__main__":
    main(sys.argv[1:])
