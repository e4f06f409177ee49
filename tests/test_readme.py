"""README.md is rendered from nbs/index.ipynb, and what it says exists; so does what the files beside it say: citation,
check list, rules for a cluster."""
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

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


def test_citation_and_codecheck_agree_with_settings_and_readme():
    cited, checked = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in ("CITATION.cff", "codecheck.yml"))
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    own, paper = settings["DEFAULT"], checked["paper"]
    assert (cited["version"], [each["name"] for each in cited["authors"]]) == (own["version"], [own["author"]])
    assert cited["title"].lower().startswith(f"{own['lib_name']}: {own['description'].partition(':')[0].lower()}")
    assert cited["license"].lower().replace("-", "").removesuffix(".0") == own["license"]
    draft = cited["references"][0]
    assert draft["title"] == paper["title"] and f"*{paper['title']}*" in README
    assert [f"{each['given-names']} {each['family-names']}" for each in draft["authors"]] == [each["name"] for each in paper["authors"]]
    assert f"({', '.join(each['family-names'] for each in draft['authors'])})" in README
    files = [each["file"] for each in checked["manifest"]]
    assert len(files) == len(set(files)) and not [name for name in files if not (ROOT / name).is_file()]
    for command in checked["summary"].split("; "):
        assert command.split()[1] in main.commands


def test_the_plan_for_a_scheduler_has_what_the_snakefile_reads(tmp_path):
    rules = (ROOT / "workflow" / "Snakefile").read_text(encoding="utf-8")

    def plan(*words):
        done = CliRunner().invoke(main, ["reproduce", "--out", str(tmp_path), *words, "--explain", "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    whole = plan("--only", "table2", "--row", "sinfnet_self")
    assert set(re.findall(r'each\["(\w+)"\]', rules)) == set(whole[0])
    names = [each["run"] for each in whole]
    for place, each in enumerate(whole):  # of a table, also runs that were not asked for are needed, if they are there
        assert all(names.index(need) < place for need in each["needs"] if need in names)
        assert each["reasons"] == ["never run"] and isinstance(each["threads"], int) and each["gpu"] is False
    trained = next(each for each in whole if each["experiment"] == "train_single")
    assert plan("--only", trained["experiment"], *trained["options"])[-1] == trained  # a job asks for its own run
    assert not list(tmp_path.iterdir())


def test_minutes_of_the_reading_path_are_those_of_the_notebooks():
    """Words / 200 + lines of code / 30, as the front door counts them; a tenth may pass before it is counted again."""
    cell, = (cell for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"] if "def minutes(" in "".join(cell["source"]))
    names = {"json": json, "repo_root": repo_root}
    exec("".join(cell["source"]).partition("def minutes(")[1] + "".join(cell["source"]).partition("def minutes(")[2].partition("PATH = ")[0], names)
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*\.ipynb[^|]*) \| (\d+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 7
    for what, links, stated in rows:
        true = names["minutes"](*(link.removeprefix("nbs/") for link in re.findall(r"\]\(([^)]+)\)", links)))
        assert abs(int(stated) - true) <= 1 + true / 10, f"{what}: {true} minutes; run nbs/index.ipynb and `make readme`"
