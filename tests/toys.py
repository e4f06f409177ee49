"""Small notebooks, registries and scans, for the tests of what reads them."""
import gzip
import json
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import nibabel
from nbformat.v4 import new_code_cell, new_notebook


def write_notebook(path: Path, *cells: str, tags: tuple[str, ...] = ("parameters",)) -> Path:
    """A notebook of these code cells; the first has the `tags`."""
    notebook = new_notebook(cells=[new_code_cell(textwrap.dedent(cell)) for cell in cells],
                            metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}})
    notebook.cells[0].metadata["tags"] = list(tags)
    nbformat.write(notebook, path)
    return path


def table(name: str, **lines: Any) -> str:
    """[name] and its lines as TOML, which writes texts, numbers and lists like JSON; a dictionary on one line."""
    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{key} = {value(each)}" for key, each in item.items()) + " }"
        return json.dumps(item)

    return "\n".join([f"[{name}]", *(f"{key} = {value(item)}" for key, item in lines.items())]) + "\n"


def experiment(name: str, notebook: str = "work.ipynb", rows: dict[str, dict] | None = None, **lines: Any) -> str:
    """An experiment of a toy registry. It computes, or draws if it has no rows; a title is the name; rows: name ->
    its lines, of which `parameters` may be left out."""
    shape = {"kind": "compute", "outputs": ["metrics.csv"]} if rows else {"kind": "render"}
    parts = [table(f"experiments.{name}", title=name.capitalize(), notebook=notebook, **{**shape, **lines})]
    return "".join(parts + [table(f"experiments.{name}.rows.{row}", title=row.capitalize(), **{"parameters": {}, **more})
                            for row, more in (rows or {}).items()])


def write_nifti(path: Path, array: Any, affine: Any, **fields: Any) -> Path:
    """A NIfTI file in which header fields are then overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    if fields:
        packed = path.name.endswith(".gz")
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        raw = nibabel.Nifti1Header(data[:348], check=False)
        for name, value in fields.items():
            raw[name] = value
        data = raw.binaryblock + data[348:]
        path.write_bytes(gzip.compress(data) if packed else data)
    return path


SETTINGS = 'profile = "smoke"\nrow = "a"\nseed = 0\nepochs = 3\noutput = ""'
TRAIN = 'profile = "smoke"\nrow = "a"\nseed = 0\nepochs = 3\nstart = ""\noutput = ""\ncheckpoints = ""'
RECORD = """
import json, pathlib
out, kept = pathlib.Path(output), pathlib.Path(checkpoints)
kept.mkdir(parents=True, exist_ok=True)
said = {"profile": profile, "row": row, "seed": seed, "epochs": epochs, "start": start}
(out / "run.json").write_text(json.dumps({"parameters": said, "commit": "abc"}))
(out / "metrics.csv").write_text(f"{row} {seed} {epochs ** 2}")
"""
KEEP = "(kept / 'start.pt').write_text(f'weights {seed}')\n(kept / 'last.pt').write_text('state')"
DRAW = """
import json, pathlib
(pathlib.Path(output) / "run.json").write_text(json.dumps({"parameters": {"profile": profile}}))
"""
CHAIN = ["pretext/coach", "priors/fold@0"]
TOY = "".join([
    table("profiles.smoke", title="toy", seeds=[0, 1],
          rows={"train": ["plain", "started", "loop"], "pretext": ["coach", "random"], "priors": ["fold"]}),
    experiment("table", "table.ipynb", needs=["train"]),
    experiment("picture", "table.ipynb", needs=CHAIN),
    experiment("train", rows={
        "plain": {"parameters": {"row": "plain"}},
        "started": {"parameters": {"start": "pretext/coach"}, "needs": CHAIN},
        "loop": {"parameters": {"start": "labels/loop"}, "needs": ["labels/loop"]},
        "spare": {"needs": ["pretext/spare"]}}),  # named in no profile
    experiment("pretext", "pretext.ipynb", {"coach": {}, "random": {}, "spare": {}}, keeps=["start.pt"]),
    experiment("labels", rows={"loop": {"needs": ["train/plain"]}}),
    experiment("priors", rows={"fold": {}}),
])


def write_toys(folder: Path) -> Path:
    """A registry with needs of all kinds (toy.toml) and its small notebooks."""
    write_notebook(folder / "work.ipynb", TRAIN, RECORD)
    write_notebook(folder / "pretext.ipynb", TRAIN, RECORD, KEEP)
    write_notebook(folder / "table.ipynb", 'profile = "smoke"\noutput = ""', DRAW)
    (folder / "toy.toml").write_text(TOY)
    return folder
