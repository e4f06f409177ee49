"""Small notebooks, registries and scans, for the tests of what reads them."""
import gzip
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import nibabel
import numpy as np
import pytest
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


def write_patients(folder: Path) -> Path:
    """Two phantoms as NIfTI files in RAS order: their scans, and masks of infection, classes, lungs and lobes."""
    from covidsev.data.phantom import phantom_volume

    for seed, name in enumerate(("anna", "ben"), 5):
        patient = phantom_volume(seed, (14, 80, 80), ggo_fraction=0.2)
        for place, planes in (("scans", patient.hu.astype(np.int16)), ("masks", np.uint8(patient.labels > 0)),
                              ("classes", patient.labels), ("lungs", patient.lungs), ("lobes", patient.lobes)):
            tail = {"classes": "_mask", "lungs": "_lungs"}.get(place, "")
            write_nifti(folder / place / f"{name}{tail}.nii.gz", planes[:, ::-1, ::-1].transpose(2, 1, 0),
                        np.diag([*patient.spacing_mm[::-1], 1.0]))
    return folder


def write_weights(path: Path, seed: int = 0) -> Path:
    """A file of untrained weights."""
    import torch

    from covidsev.method.inference import ModelInfo, save_model
    from covidsev.method.unets import build_network

    torch.manual_seed(seed)
    info = ModelInfo("single", "infnet", 64, backbone="small", threshold=0.45, data_kind="phantom")
    return save_model(path, build_network("infnet", "small"), info)


PLANTED = ("PLANTEDNAME", "PLANTEDID", "19010101", "PLANTEDHOSPITAL", "PLANTEDDOCTOR", "PLANTEDTEXT")


def dicom_file(path: Path, k: int, array: Any, **changes: Any) -> None:
    """Slice k of a CT, in HU through slope and intercept, with a planted patient; None drops a tag, and a function
    gives its value for slice k."""
    pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = changes.pop("syntax", ExplicitVRLittleEndian)
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    file.PatientName, file.PatientID, file.PatientBirthDate = "PLANTEDNAME^A", "PLANTEDID", "19010101"
    file.InstitutionName, file.ReferringPhysicianName, file.StudyDescription = PLANTED[3:]
    file.Modality, file.SeriesInstanceUID, file.ImageType = "CT", "1.2.3.4", ["ORIGINAL", "PRIMARY", "AXIAL"]
    file.ImagePositionPatient, file.ImageOrientationPatient = [-15, -14, -30 + 5 * k], [1, 0, 0, 0, 1, 0]
    file.PixelSpacing, file.SliceThickness, file.Rows, file.Columns = [0.8, 0.8], 5, *array.shape
    file.RescaleSlope, file.RescaleIntercept, file.SamplesPerPixel, file.InstanceNumber = 2, -2000, 1, 99 - k
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.PhotometricInterpretation, file.PixelData = "MONOCHROME2", ((array + 2000) // 2).astype(np.uint16).tobytes()
    for name, value in changes.items():
        setattr(file, name, value(k) if callable(value) else value)
        if value is None:
            delattr(file, name)
    file.save_as(path, enforce_file_format=True)


def dicom_series(folder: Path, volume: Any, slices: Iterable[int], prefix: str = PLANTED[0], **changes: Any) -> Path:
    """A series in a folder, in an order of names that is not that of the slices; the first columns of `volume` are the
    first columns of each slice."""
    folder.mkdir(exist_ok=True, parents=True)
    for k in slices:
        dicom_file(folder / f"{prefix}_{(5 * k) % 12:02d}_{k // 12}.dcm", k, volume[:, :, k].T.astype(np.int32), **changes)
    return folder


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
