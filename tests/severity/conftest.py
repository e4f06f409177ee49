"""What the tests of this folder share: two patients as files, and a network that was never trained."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from toys import write_patients, write_weights

from covidsev.severity import cases
from covidsev.severity.inputs import Options
from covidsev.severity.reports import Shown


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """No network comes with covidsev: those in weights/ learned from patients, and the scans here are phantoms."""
    monkeypatch.setattr(cases, "shipped", lambda name: None)


@pytest.fixture(scope="session")
def clinic(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("clinic"))


class Files(NamedTuple):
    """The files of one patient."""

    scan: Path
    mask: Path
    lungs: Path

    def options(self, **others):
        return Options(infection=self.mask, **others)


@pytest.fixture
def anna(clinic):
    return Files(*(clinic / name for name in ("scans/anna.nii.gz", "masks/anna.nii.gz", "lungs/anna_lungs.nii.gz")))


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """Options that predict, with (untrained) weights."""
    return Options(weights=write_weights(tmp_path_factory.mktemp("network") / "single.safetensors"), phantom=True)


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Drawing takes most of the time of a small case; where pictures do not matter, there is a small one."""
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(cases, "_pictures", lambda *_: [Shown("slice", np.zeros((4, 4, 3), np.uint8))])


@pytest.fixture
def real_pictures():
    """Asked for by tests that want the real ones."""
