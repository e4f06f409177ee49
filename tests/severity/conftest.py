"""What the tests of this folder share."""
import pytest

from covidsev.severity import cases


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch):
    """No network comes with covidsev: those in weights/ learned from patients, and the scans here are phantoms."""
    monkeypatch.setattr(cases, "shipped", lambda name: None)
