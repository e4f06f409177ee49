"""The registry, the runs that a request means, and the keys: what is refused at the door, the order of runs, what makes a result old."""
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import nbformat
import pytest
from hypothesis import given, strategies as st
from toys import CHAIN, SETTINGS, TOY, write_notebook, write_toys

from covidsev.core import ConfigError, NotebookError, repo_root
from covidsev.paper import experiments
from covidsev.paper.experiments import (cache_key, find_experiment, lint_notebook, load_registry,
                                        notebook_parameters, parse_settings, plan_runs, source_key,
                                        why_stale)

WHOLE = load_registry()


# --- the registry

@pytest.fixture
def toys(tmp_path):
    """A registry with needs of all kinds, and its small notebooks, to edit."""
    return write_toys(tmp_path)


@pytest.mark.parametrize("old, new, why", [
    ('needs = ["train/plain"]', 'needs = ["train/loop"]', "circle"),
    ('needs = ["train/plain"]', 'needs = ["train"]', "circle"),
    ('needs = ["train/plain"]', 'needs = ["train/plian@0"]', "did you mean 'plain'"),
    ('needs = ["train/plain"]', 'needs = ["train/plain@first"]', "not a need"),
    ('needs = ["train/plain"]', 'needs = ["train/plain%0"]', "not a need"),
    ('needs = ["train/plain"]', 'needs = ["train@0"]', "not a need"),
    ('needs = ["train/plain"]', 'control = "plian"', "control of labels/loop 'plian'"),
    ('keeps = ["start.pt"]', 'keep = ["start.pt"]', "did you mean 'keeps'"),
    ('keeps = ["start.pt"]', 'keeps = ["../start.pt"]', "cannot be the name of a file"),
    ('outputs = ["metrics.csv"]', 'outputs = ["/etc/metrics.csv"]', "cannot be the name of a file"),
    ('outputs = ["metrics.csv"]', 'outputs = ["tables/../../metrics.csv"]', "cannot be the name of a file"),
    ("[experiments.train.rows.spare]", '[experiments.train.rows."../spare"]', "cannot be the name of a file"),
    ("[experiments.picture]", '[experiments."../picture"]', "cannot be the name of a file"),
])
def test_faults_of_the_registry_are_found_when_it_is_read(toys, old, new, why):
    assert old in TOY
    (toys / "toy.toml").write_text(TOY.replace(old, new))
    with pytest.raises(ConfigError, match=why):
        load_registry(toys / "toy.toml")


def test_misspelt_parameters_are_refused_with_a_suggestion(tmp_path):
    text = (WHOLE.folder / "experiments.toml").read_text(encoding="utf-8")
    (tmp_path / "train_single.ipynb").write_bytes((WHOLE.folder / "train_single.ipynb").read_bytes())
    (tmp_path / "experiments.toml").write_text(text.replace("cutout = 0.5", "cutuot = 0.5"), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'cutout'"):
        experiments.resolve(load_registry(tmp_path / "experiments.toml"), "smoke", "train_single", "sinfnet_aug_0.5", 0)


def test_every_experiment_notebook_is_registered_and_clean():
    """But for two whose answers are about the machine: `covidsev bench` and `reproduce --rehearse` execute them."""
    assert {path.name for path in WHOLE.folder.glob("*.ipynb")} - {"benchmark.ipynb", "rehearsal.ipynb"} == {
        each.notebook.name for each in WHOLE.experiments.values()}
    for path in WHOLE.folder.glob("*.ipynb"):
        assert lint_notebook(path) == []
        notebook = nbformat.read(path, 4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(notebook.cells) <= 60, path
        lengths = [len(cell.source.splitlines()) for cell in code[1:]]
        assert sum(lengths) <= 12 * len(lengths) and sorted(lengths)[-2] <= 25, (path, lengths)  # one may be a table of words
        for cell in code:  # nothing that only a kernel understands
            compile(cell.source, path.name, "exec")


def test_render_notebooks_cannot_train_and_drawing_makes_no_network_old():
    for each in WHOLE.experiments.values():
        source = "\n".join(cell["source"] for cell in experiments.code_cells(each.notebook))
        names = set(source_key(source, experiments.DRAWING if each.kind == "compute" else ()))
        trains = each.name.split("_")[0] in ("train", "pretext", "priors", "pseudo")
        assert "train_step" not in names or each.kind == "compute", each.name
        assert "train_step" in names or not each.name.startswith("train_"), each.name
        assert not trains or not {"caption", "collect", "reproduce"} & names, each.name


def test_profiles_state_their_device_data_and_whether_they_are_committed():
    for name, profile in WHOLE.profiles.items():
        parameters = profile.parameters["train_single"]
        assert parameters["device"] == ("cuda" if name == "paper" else "cpu")
        assert (parameters["data"] == "phantom") == (name == "smoke")
        assert name not in ("smoke", "cpu", "paper") or profile.committed == (name != "smoke")
        assert len(profile.seeds) >= (3 if name in ("cpu", "paper") else 1)


# --- notebooks and settings

def test_lost_doubled_and_empty_parameters_are_refused(tmp_path):
    for tags in ((), ("params",)):
        with pytest.raises(NotebookError, match="0 cells carry the tag"):
            notebook_parameters(write_notebook(tmp_path / "n.ipynb", SETTINGS, "1", tags=tags))
    path = write_notebook(tmp_path / "two.ipynb", SETTINGS, "epochs = 4")
    notebook = nbformat.read(path, 4)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match="2 cells carry the tag"):
        notebook_parameters(path)
    notebook.cells[0].metadata["tags"] = []
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match="code stands before"):
        notebook_parameters(path)
    with pytest.raises(NotebookError, match="an empty `parameters` cell"):
        notebook_parameters(write_notebook(tmp_path / "empty.ipynb", "# nothing here", "1"))
    with pytest.raises(NotebookError, match="not a readable notebook"):
        notebook_parameters(tmp_path / "none.ipynb")


@pytest.mark.parametrize("line, refused", [
    ("files = !ls", True), ("%%bash\nfalse", True), ("  !false", True), ("%sx false", True),
    ("a != b", False), ("x = 'wow!'", False), ("%matplotlib inline", False), ("# not !a command", False)])
def test_shell_lines_are_refused(tmp_path, line, refused):
    faults = lint_notebook(write_notebook(tmp_path / "n.ipynb", SETTINGS, line))
    assert any("shell command" in fault for fault in faults) == refused == bool(faults)


@pytest.mark.parametrize("text, value", [
    (" 1e-4 ", 1e-4), ("-2", -2), ("('a', 1)", ("a", 1)), ("'true'", "true"), ("", ""), ("1.0.0", "1.0.0"),
    ("[1, 2", "[1, 2"), ("{[1]: 2}", "{[1]: 2}"), ("(" * 999, "(" * 999)])
def test_a_setting_is_what_python_reads_or_the_text(text, value):
    assert parse_settings([f"start={text}"]) == {"start": value}
    assert type(parse_settings([f" start = {text}"])["start"]) is type(value)


JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                           lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@given(JSON_VALUES)
def test_a_setting_that_python_wrote_is_read_back(value):
    assert parse_settings(["x=1", f"x={value!r}"]) == {"x": value}  # of one given twice the last counts


@pytest.mark.parametrize("pair, why", [(" = 2", "NAME=VALUE"), ("", "NAME=VALUE"), ("start=null", "start=None")])
def test_a_setting_without_name_or_in_another_spelling_is_refused(pair, why):
    with pytest.raises(ConfigError, match=why):
        parse_settings(["size=64", pair])


# --- the plan

def planned(toys, *only, **options):
    return [run.name for run in plan_runs(load_registry(toys / "toy.toml"), "smoke", only or None, **options)]


def test_a_row_brings_exactly_the_rows_that_it_needs(toys):
    assert planned(toys, "train", rows=["started"], seeds=[1]) == ["pretext/coach-seed1", "priors/fold-seed0", "train/started-seed1"]
    assert planned(toys, "train", rows=["plain"]) == ["train/plain-seed0", "train/plain-seed1"]
    assert planned(toys, "train", rows=["loop"], seeds=[0]) == ["train/plain-seed0", "labels/loop-seed0", "train/loop-seed0"]
    assert planned(toys, "train", rows=["spare"], seeds=[5]) == ["pretext/spare-seed5", "train/spare-seed5"]
    assert planned(toys, "pretext", seeds=[0]) == ["pretext/coach-seed0", "pretext/random-seed0"]


def test_a_row_may_have_its_own_number_of_seeds_and_share_what_it_needs(toys):
    (toys / "toy.toml").write_text(TOY.replace('needs = ["pretext/spare"]', 'needs = ["pretext/spare%3"]')
                                   + '\n[profiles.smoke.row_seeds]\n"train/spare" = 5\n')
    names = planned(toys, "train", rows=["spare"])
    assert sorted(names) == sorted([f"pretext/spare-seed{k}" for k in range(3)] + [f"train/spare-seed{k}" for k in range(5)])
    runs = {run.name: run.needs for run in plan_runs(load_registry(toys / "toy.toml"), "smoke", ["train"], ["spare", "plain"])}
    assert runs["train/spare-seed4"] == ("pretext/spare-seed1",) and "train/plain-seed2" not in runs


def test_a_profile_may_set_what_one_row_sets_otherwise(toys):
    """Defaults, then profile, then row, then the row in this profile, then what is asked for."""
    name, more = toys / "toy.toml", '\n[profiles.smoke.parameters."train/started"]\nepochs = 7\n'
    name.write_text(TOY + more + "[profiles.smoke.expects.train]\nn_train = 3\n")
    registry = load_registry(name)
    runs = {row: experiments.resolve(registry, "smoke", "train", row, 0) for row in ("plain", "started")}
    assert runs["started"].parameters["epochs"] == 7 != runs["plain"].parameters["epochs"]
    other = experiments.resolve(registry, "smoke", "train", "started", 0, {"epochs": 9})
    assert other.parameters["epochs"] == 9 and (runs["plain"].expects, other.expects) == ({"n_train": 3}, {})
    name.write_text(TOY + more.replace("started", "startled"))
    with pytest.raises(ConfigError, match="row of train in profile smoke 'startled'"):
        load_registry(name)


def test_tables_are_content_with_the_rows_that_were_asked_for(toys):
    assert planned(toys, "table", rows=["plain"], seeds=[0]) == ["train/plain-seed0", "table"]
    assert planned(toys, "table", rows=["started"], seeds=[1]) == ["pretext/coach-seed1", "priors/fold-seed0", "train/started-seed1", "table"]
    assert planned(toys, "picture") == ["pretext/coach-seed0", "pretext/coach-seed1", "priors/fold-seed0", "picture"]
    assert planned(toys, "picture", rows=["coach"], seeds=[1]) == ["pretext/coach-seed1", "picture"]
    assert planned(toys, "table", with_needs=False) == ["table"]


def test_everything_is_planned_once_after_what_it_needs(toys):
    runs = plan_runs(load_registry(toys / "toy.toml"), "smoke")
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 2 + 1 * 2 + 2 + 2  # train, pretext, priors, labels (needed only), render
    assert all(names.index(need) < names.index(run.name) for run in runs for need in run.needs)
    by_name = {run.name: run for run in runs}
    assert by_name["train/started-seed1"].needs == ("pretext/coach-seed1", "priors/fold-seed0")
    assert by_name["picture"].needs == ("pretext/coach-seed0", "pretext/coach-seed1", "priors/fold-seed0") and len(CHAIN) == 2
    assert {run.keeps for run in runs if run.experiment == "pretext"} == {("start.pt",)}


def test_other_names_of_a_figure_find_it(toys):
    (toys / "toy.toml").write_text(TOY.replace('title = "Picture"', 'title = "Picture"\nalso = ["figure3"]'))
    registry = load_registry(toys / "toy.toml")
    assert [find_experiment(registry, name) for name in ("figure3", "pict", "table")] == ["picture", "picture", "table"]
    with pytest.raises(ConfigError, match="did you mean 'table'"):
        find_experiment(registry, "tabel")


# --- keys

PLAIN = st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
LINES = st.dictionaries(st.text(alphabet="abcxyz_", min_size=1, max_size=6), PLAIN, max_size=5)
PARTS = st.dictionaries(st.sampled_from(["parameters", "data", "notebook"]), LINES, min_size=1)


@given(PARTS, PARTS)
def test_a_key_differs_exactly_where_there_is_a_reason(old, new):
    reasons = why_stale(old, new)
    assert (cache_key(old) == cache_key(new)) == (reasons == []) or \
        {k: v for k, v in old.items() if v} == {k: v for k, v in new.items() if v}  # an empty part says nothing


def test_reasons_read_like_sentences():
    digests = {f"X{k}": f"{k:016d}" for k in range(9)}
    old = {"parameters": {"epochs": 40, "ema": 0.5}, "notebook": {"a.ipynb": "0" * 64}, "code": digests}
    new = {"parameters": {"epochs": 60, "seed": None}, "notebook": {"a.ipynb": "1" * 64}, "code": {"X1": "a" * 16}}
    assert why_stale(old, new) == [
        "code: X0 is gone, X1 changed, X2 is gone, X3 is gone, X4 is gone, X5 is gone and 3 more",
        "notebook a.ipynb changed", "parameter ema is gone", "parameter epochs: 40 -> 60", "parameter seed is new"]
    assert why_stale(old, json.loads(json.dumps(old))) == []  # parts read back from a file are the same


def test_keys_do_not_depend_on_hash_seed_folder_locale_or_time_zone(tmp_path):
    code = """
        from covidsev.paper.experiments import cache_key, source_key
        parts = {"parameters": {"classes": {"ggo", "consolidation", "background"}, "rates": (0.75, 1.0)},
                 "code": source_key("from covidsev.method.training import fit\\nfit")}
        print(cache_key(parts))
    """
    places = ((tmp_path, "1", "UTC", "C"), (repo_root(), "2", "Asia/Tokyo", "C.UTF-8"))
    keys = {subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale}).stdout.strip()
            for folder, seed, zone, locale in places}
    assert len(keys) == 1 and len(keys.pop()) == 64


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in place of ours, to edit: package(a="X = 1"). b imports a, c is alone."""
    monkeypatch.setattr(experiments, "LIBRARY", tmp_path / "covidsev")

    def write(**modules):
        experiments.imports_of.cache_clear()  # it remembers which modules there are
        for name, source in modules.items():
            file = tmp_path / "covidsev" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))

    write(a="X = 1\n", b="from .a import X\n\ndef f():\n    return X\n", c="Y = 1\n")
    return write


def key(source):
    return source_key(textwrap.dedent(source))


USE_A, USE_B = "from covidsev.a import X\nX", "from covidsev.b import f\nf()"


def test_a_key_follows_names_and_leaves_the_rest_alone(package):
    before = key(USE_B)
    assert set(before) == {"X", "f"}
    package(a="X = 1\nZ = 2\n\ndef g(): pass\n", c="Y = 2\n")
    assert key(USE_B) == before
    package(a="X = 2\n")
    assert why_stale({"code": before}, {"code": key(USE_B)}) == ["code: X changed"]


def test_a_definition_may_move(package):
    """To another module, another folder: its key is its own."""
    before = key(USE_B)
    package(deep__far="X = 1\n\ndef f():\n    from ..c import Y\n    return X\n", a="", b="from .deep.far import X, f\n")
    moved = key(USE_B)
    assert moved["X"] == before["X"] and set(moved) == {"X", "Y", "f"}
    package(deep__far="from covidsev.b import f\n", b="X = 1\n\ndef f():\n    from covidsev.c import Y\n    return X\n")
    assert key("from covidsev.deep.far import f\nf()") == moved


@pytest.mark.parametrize("source", ['"""Doc."""\nX = 1\n', "# why\nX  =  1  # because\n\n\n", "__all__ = ['X']\nX = 1\n",
                                    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nX = 1\n"])
def test_words_do_not_change_a_key(package, source):
    before = key(USE_A)
    package(a=source)
    assert key(USE_A) == before


def test_docstrings_and_texts_of_errors_do_not_count_and_what_they_show_does(package):
    body = '''
        def f(x):
            """{0}"""
            if x:
                raise ValueError(f"{0} {{x}}", hint="{0}")
            return KeyError("{0}"), "{1}"
    '''
    package(a=body.format("old", "text"))
    before = key("from covidsev.a import f\nf")
    package(a=body.format("new", "text"))
    assert key("from covidsev.a import f\nf") == before
    package(a=body.format("new", "other"))
    assert key("from covidsev.a import f\nf") != before
    package(a=body.format("new", "text").replace("{x}", "{-x}"))
    assert key("from covidsev.a import f\nf") != before


@pytest.mark.parametrize("source", ["X = 1.0\n", "X = 1\nX += 0\n", "X = '1'\n", "def X(): 'doc'\n", "X = 1\nX = 1\n",
                                    "if True:\n    X = 1\n", "from .c import Y as X\n", "X = 1\nassert X\n"])
def test_code_does_change_a_key(package, source):
    before = key(USE_A)
    package(a=source)
    assert key(USE_A) != before


SPELLINGS = {"from covidsev import a\na.f()": {"f", "LIMIT"},
             "from covidsev import a as first\nfirst.f": {"f", "LIMIT"},
             "import covidsev.a\ncovidsev.a.f()": {"f", "LIMIT"},
             "from covidsev.a import f, K\nf": {"f", "LIMIT", "K", "Base", "helper"},
             "def later():\n    from covidsev.a import f\n    return f()": {"f", "LIMIT"},
             "from covidsev import a\nprint(f'{a.f():.{a.DIGITS}f}')": {"f", "LIMIT", "DIGITS"},
             "%time\nfrom covidsev import a\na.DIGITS": {"DIGITS"}, "text = 'covidsev.a.f'": set()}


@pytest.mark.parametrize("source", SPELLINGS)
def test_all_spellings_reach_what_they_name(package, source):
    package(a="""
        DIGITS, LIMIT = 2, 9

        def helper(DIGITS):
            LIMIT = DIGITS  # both are local here
            return LIMIT

        def f(x=LIMIT):
            return [helper for helper in range(x)]

        class Base:
            pass

        class K(Base):
            def m(self):
                return helper(1)
    """)
    assert set(key(source)) == SPELLINGS[source]


@pytest.mark.parametrize("statement", ["TABLE['f'] = 1", "TABLE.update(f=1)", "for k in 'ab':\n    TABLE[k] = k",
                                       "try:\n    import fast\nexcept ImportError:\n    fast = TABLE", "assert not TABLE"])
def test_statements_that_define_nothing_always_count(package, statement):
    """Whoever imports the module runs them, even through another module; what they use counts too."""
    package(a=f"class X:\n    pass\n\nTABLE = {{}}\n{statement}\n", b="from .a import X\n\ndef g():\n    return 1\n")
    assert {"(module level)", "TABLE", "g"} <= set(key("from covidsev import b\nb.g()"))


def test_the_meaning_of_an_imported_name_counts(package):
    package(a="import math as m\n\ndef f():\n    return m.pi\n")
    before = key("from covidsev.a import f\nf")
    package(a="import cmath as m\n\ndef f():\n    return m.pi\n")
    assert key("from covidsev.a import f\nf") != before


def test_all_definitions_of_one_name_count_in_what_is_imported(package):
    package(a="def f(): return 1\n", b="from .a import f\n\ndef g(): return f()\n", c="def f(): return 3\n")
    before = key("from covidsev.b import g\ng")
    package(c="def f(): return 4\n")
    assert key("from covidsev.b import g\ng") == before  # c is imported by nobody
    both = key("from covidsev import b, c\nb.g()")
    package(c="def f(): return 5\n")
    assert key("from covidsev import b, c\nb.g()")["f"] != both["f"]


@pytest.mark.parametrize("source, why", [
    ("from covidsev.z import f", "no module 'covidsev.z'"), ("import covidsev.z", "no module 'covidsev.z'"),
    ("from covidsev import z", "no module 'covidsev'"), ("from covidsev.b import g", "covidsev.b has no 'g'"),
    ("from covidsev.b import *", r"covidsev.b has no '\*'"), ("from covidsev.d import f", "no module 'covidsev.gone'"),
    ("def later():\n    from covidsev.a import gone", "covidsev.a has no 'gone'")])
def test_what_is_not_there_is_an_error(package, source, why):
    package(d="def f():\n    from .gone import g\n")
    with pytest.raises(ConfigError, match=why):
        key(source)


def test_circles_and_free_modules(package):
    package(a="import covidsev.b\n\ndef g():\n    return covidsev.b.f()\n", b="from .a import g\n\ndef f():\n    return g\n")
    assert set(key("from covidsev.a import g\ng")) == {"covidsev", "f", "g"}
    assert source_key("from covidsev.a import g\ng", without=["covidsev.a"]) == {}


def test_the_key_of_this_library_holds_what_it_should():
    source = "from covidsev.data import show\nfrom covidsev.paper import runs\nruns.train_network"
    found = source_key(source, without=["covidsev.data.show"])
    assert {"fit", "train_network"} <= set(found) and {"check_covid_semiseg", "grey_profile", "caption"}.isdisjoint(found)


def test_words_of_the_registry_make_tables_old_and_networks_not(toys):
    def parts():
        runs = plan_runs(load_registry(toys / "toy.toml"), "smoke", ["table"], ["plain"], [0])
        return {run.name: experiments.cache_parts(run, {}, {}) for run in runs}

    before = parts()
    (toys / "toy.toml").write_text(TOY.replace('title = "Plain"', 'title = "Plain, as in Table I"'))
    assert parts()["train/plain-seed0"] == before["train/plain-seed0"] and parts()["table"] != before["table"]


def test_data_key_knows_the_unlabelled_pool(data_root):
    """Names and sizes of the pool count where it is read, and nowhere else."""
    settings = {"data": "covid-semiseg", "size": 64, "n_train": 4}
    plain = experiments.data_key({**settings, "images": "labelled"}, data_root)
    assert {"train", "test"} <= set(plain) and "pool" not in plain
    pool = experiments.data_key({**settings, "images": "unlabelled"}, data_root)
    assert pool.pop("pool") == experiments.pool_key(data_root) and pool == plain
    assert "pool" in experiments.data_key({**settings, "source": "released", "n_unlabelled": 0}, data_root)
    assert experiments.data_key({**settings, "data": "phantom", "images": "unlabelled"}) == {}


def test_pool_key_changes_with_names_and_sizes(tmp_path, monkeypatch):
    from covidsev.data import datasets

    for name in ("Imgs/a.jpg", "Imgs/b.jpg", "GT/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    monkeypatch.setattr(datasets, "load_unlabelled", lambda root: SimpleNamespace(paths=sorted((tmp_path / "Imgs").iterdir())))
    keys = [experiments.pool_key()]
    (tmp_path / "GT/a.png").write_bytes(b"123456")
    keys.append(experiments.pool_key())
    (tmp_path / "Imgs/b.jpg").rename(tmp_path / "Imgs/c.jpg")
    keys.append(experiments.pool_key())
    assert len(set(keys)) == 3 and experiments.pool_key() == keys[2]
