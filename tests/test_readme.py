"""README.md is rendered from nbs/index.ipynb, and what it says exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from covidsev.cli import main
from covidsev.core import repo_root

ROOT = repo_root()
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))


def test_readme_is_what_the_index_notebook_renders(tmp_path):
    target = tmp_path / "README.md"
    # -o: take the environment that runs this test as it is
    subprocess.run(["make", "--silent", "readme", f"README={target}", f"VENV={sys.prefix}", "-o",
                    f"{sys.prefix}/.installed"], cwd=ROOT, check=True, capture_output=True,
                   timeout=120)
    assert target.read_text(encoding="utf-8") == README, "run `make readme` and commit README.md"


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", COMMANDS, flags=re.MULTILINE))
    assert {"reproduce", "test"} <= named <= targets


def test_every_covidsev_command_of_the_readme_exists():
    named = re.findall(r"covidsev ([a-z]+)(?: ([a-z]+))?", COMMANDS)
    assert named
    for first, second in named:
        command = main.commands[first]
        assert not hasattr(command, "commands") or second in command.commands


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_local_link_of_the_readme_leads_somewhere(target):
    assert target.startswith("http") or (ROOT / target).exists()


def test_readme_fits_two_screens():
    assert len(README.splitlines()) <= 110
    assert Path(ROOT / "README.md").stat().st_size < 12_000
