"""What all tests share: one thread, no bars, no windows, and the real data where there is some."""
import os
import signal

# before anything loads torch: two threads sum in another order, and give other bits
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["COVIDSEV_QUIET"] = "1"

# a job in the background of a script ignores Ctrl-C, and so would all processes that the tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
from hypothesis import settings

from covidsev import core as config

# the same examples in every run: a failure in continuous integration must be one that anybody can repeat
settings.register_profile("covidsev", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("covidsev")


# Files of a minute, most of it other processes. Begun last, one of them would keep one worker busy and the others idle.
LONGEST = ("test_reproduce.py", "test_cli.py", "test_training_faults.py", "test_viewer.py", "test_coach.py", "test_tables.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this repository."""
    return config.repo_root(Path(__file__).parent)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data; the test is skipped where COVID-SemiSeg is not in it."""
    root = config.data_root()
    if root is None or not (root / "covid-semiseg").is_dir():
        pytest.skip("needs the real data: set COVIDSEV_DATA, or run `covidsev data get covid-semiseg`")
    return root


@pytest.fixture(scope="session")
def published_root(data_root: Path) -> Path:
    """The folder of the published prediction maps; the test is skipped where it is missing."""
    root = data_root / "published-predictions"
    if not root.is_dir():
        pytest.skip("needs the published prediction maps in the data folder")
    return root
