"""The slice viewer: the picture is a plain function of what there is and what to show; the widget only asks for it.

It is driven three ways: through its traits here, in a kernel, and in a real JupyterLab in headless Chromium."""
import base64
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from covidsev.core import ConfigError, CovidSevError, MissingExtraError
from covidsev.data.show import ERROR_NAMES, ERRORS
from covidsev.data.phantom import phantom_volume, to_uint8
from covidsev.data.scans import turn_picture
from covidsev.severity.score import partition_regions
from covidsev.severity.viewer import (COLOURINGS, Look, Study, colourings, facts_html, make_study, render_slice, slice_facts,
                             slice_png, snapshot, spread_slices, view)

WIDGET = "application/vnd.jupyter.widget-view+json"
SHAPE = (5, 64, 64)
MAKE = f"""from covidsev.data.phantom import phantom_volume
from covidsev.severity.score import partition_regions
from covidsev.severity.viewer import view
patient = phantom_volume(3, {SHAPE})
hu, lungs, truth = (array.T[::-1, ::-1] for array in (patient.hu, patient.lungs, patient.labels))
viewer = view(hu, (hu > -550) & (lungs > 0), truth=truth, lungs=lungs, regions=partition_regions(lungs))"""


@pytest.fixture(scope="module")
def study() -> Study:
    """What MAKE makes."""
    patient = phantom_volume(3, SHAPE)
    hu, lungs, truth = (array.T[::-1, ::-1] for array in (patient.hu, patient.lungs, patient.labels))
    return make_study(hu, (hu > -550) & (lungs > 0), truth=truth, lungs=lungs, regions=partition_regions(lungs))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- the picture

masks = arrays(np.uint8, (5, 4, 3), elements=st.integers(0, 2))
volumes = arrays(np.float32, (5, 4, 3), elements=st.floats(-1024, 3000, width=32).filter(lambda hu: not 0 <= hu <= 1))
looks = st.builds(Look, k=st.integers(0, 2), level=st.floats(-1000, 500), width=st.floats(1, 4000),
                  colour=st.sampled_from(COLOURINGS), alpha=st.floats(0, 1), edge=st.booleans(), lungs=st.booleans())


@given(volumes, masks, masks, looks)
def test_a_picture_changes_nothing_and_is_a_function_of_its_arguments(hu, infection, truth, look):
    given_arrays = [hu, infection, truth, infection / np.float32(2)]
    before = [array.copy() for array in given_arrays]
    study = make_study(hu, infection, truth=truth, probs=given_arrays[3], lungs=truth)
    picture = render_slice(study, look)
    assert picture.shape == (4, 5, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render_slice(study, look))
    assert all(np.array_equal(array, copy) for array, copy in zip(given_arrays, before))


@given(volumes, masks, masks, looks)
def test_colour_stays_where_its_layer_is(hu, infection, truth, look):
    study = make_study(hu, infection, truth=truth, probs=infection / np.float32(2), lungs=truth)
    grey = render_slice(study, Look(look.k, look.level, look.width))
    changed = (render_slice(study, look) != grey).any(axis=2)
    allowed = turn_picture((infection > 0)[..., look.k])
    if look.colour == "errors" or look.lungs:
        allowed = allowed | turn_picture((truth > 0)[..., look.k])
    assert not (changed & ~allowed).any()


@given(volumes, st.floats(-1000, 500), st.floats(1, 4000))
def test_the_window_keeps_the_order_of_densities(hu, level, width):
    picture = render_slice(make_study(hu), Look(1, level, width))
    order = np.argsort(turn_picture(hu[..., 1]), axis=None)
    assert (np.diff(picture[..., 0].ravel()[order].astype(int)) >= 0).all()
    assert (picture == picture[..., :1]).all()  # grey


@given(masks, masks)
def test_errors_add_up(infection, truth):
    for k in range(3):
        facts = slice_facts(make_study(np.full((5, 4, 3), -700.0), infection, truth=truth), k)
        found, missed, invented = (facts["errors"][name] for name in ERROR_NAMES.values())
        assert found + missed == (truth[..., k] > 0).sum() and found + invented == (infection[..., k] > 0).sum()
        assert (facts["dice"] is None) == (found + missed + invented == 0)


@given(st.integers(1, 40), st.integers(1, 9))
def test_slices_are_spread_over_the_whole_from_top_to_base(depth, n):
    chosen = spread_slices(make_study(np.full((2, 2, depth), -700.0)), n)
    assert chosen == sorted(set(chosen), reverse=True) and len(chosen) <= max(n, 1)
    assert 0 <= chosen[-1] and chosen[0] < depth and (depth < 2 * n or len(chosen) == n)


def test_a_volume_is_shown_as_its_slices_are():
    """The slice of a volume looks as the same slice given alone: right side left, front up."""
    patient = phantom_volume(3, SHAPE)
    study = make_study(patient.hu.T[::-1, ::-1], patient.labels.T[::-1, ::-1])
    alone = make_study(patient.hu[2], patient.labels[2])
    look = Look(colour="mask", edge=True)
    assert np.array_equal(render_slice(study, Look(2, colour="mask", edge=True)), render_slice(alone, look))


def test_grey_values_have_no_window(study):
    grey = make_study(to_uint8(study.image))
    assert np.array_equal(render_slice(grey, Look(2, level=40, width=400)), render_slice(study, Look(2)))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("layer", [
    {"infection": np.full((6, 5), 3)}, {"infection": np.full((6, 5), -1)}, {"infection": np.zeros((5, 6))},
    {"truth": np.full((6, 5), np.nan)}, {"truth": np.full((6, 5), 0.5)}, {"lungs": np.full((6, 5), 3)},
    {"regions": np.full((6, 5), 21)}, {"probs": np.full((6, 5), 1.01)}, {"probs": np.full((6, 5), -0.01)},
    {"probs": np.full((6, 5), np.inf)}, {"probs": np.zeros((6, 5, 1))}], ids=str)
def test_layers_that_do_not_fit(layer):
    with pytest.raises(CovidSevError, match=next(iter(layer))):
        make_study(np.full((6, 5), -700.0), **layer)


@pytest.mark.parametrize("image", [np.zeros((0, 4)), np.zeros(4), np.zeros((2, 2, 2, 2)), np.full((3, 3), np.nan),
                                   np.full((3, 3), 0.5), np.full((3, 3), -np.inf)], ids=lambda image: str(image.shape))
def test_images_that_are_no_scan(image):
    with pytest.raises(CovidSevError, match="expected"):
        make_study(image)


@pytest.mark.parametrize("look", [Look(-1), Look(5), Look(width=0), Look(width=-5), Look(level=float("nan")),
                                  Look(width=float("inf")), Look(alpha=1.5), Look(colour="masks"),
                                  Look(colour="probability")], ids=str)
def test_looks_that_cannot_be(study, look):
    with pytest.raises(ConfigError):
        render_slice(study, look)


def test_a_failed_snapshot_leaves_no_figure_open(study):
    with pytest.raises(ConfigError, match="no slice 99"):
        snapshot(study.image, slices=[0, 99])
    snapshot(study.image)
    assert not plt.get_fignums()


def test_without_ipywidgets(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'covidsev\[viewer\]'.*snapshot"):
        view(study.image)
    still = snapshot(study.image, study.layers["infection"], slices=[1, 2])
    assert np.array_equal(still.axes[1].images[0].get_array(), render_slice(study, Look(2, colour="mask")))


def test_the_extra_that_the_error_names_is_declared(repository):
    settings = (repository / "settings.ini").read_text(encoding="utf-8")
    assert "viewer_requirements =\n    ipywidgets" in settings


def test_importing_the_viewer_loads_no_widgets_and_no_torch():
    code = "import sys, covidsev.severity.viewer; print(*sorted({'ipywidgets', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# ---------------------------------------------------------------- the widget


@pytest.fixture
def viewer(study):
    pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'covidsev[viewer]'")
    return view(study.image, **study.layers)


def test_every_control_changes_the_picture(study, viewer):
    start = viewer.look
    for name, value in {"slice": 2, "level": 0, "width": 300, "colour": "errors", "alpha": 0.9, "edge": True,
                        "lungs": True}.items():
        before = viewer.picture.value
        viewer.controls[name].value = value
        assert viewer.picture.value != before, name
        assert viewer.picture.value == slice_png(render_slice(study, viewer.look))
        assert viewer.text.value == facts_html(study, viewer.look)
    assert viewer.look == Look(1, 0, 300, "errors", 0.9, True, True) != start
    assert "slice 2 of 5" in viewer.text.value and all(colour in viewer.text.value for colour in ERRORS.values())


def test_controls_only_for_what_is_there(study, viewer):
    assert colourings(study) == ["nothing", "mask", "errors"] == list(viewer.controls["colour"].options)
    assert list(view(study.image).controls) == ["slice", "level", "width"]
    assert list(view(to_uint8(study.image[..., 2])).controls) == []


def test_the_first_slice_shown_has_the_most_infection(study, viewer):
    areas = ((study.layers["infection"] > 0) & (study.layers["lungs"] > 0)).sum(axis=(0, 1))
    assert viewer.look.k == int(areas.argmax()) and viewer.look.colour == "mask"


def test_the_committed_notebook_keeps_pictures_and_no_widget(repository):
    notebook = nbformat.read(repository / "nbs" / "3_severity/06_viewer.ipynb", 4)
    assert "widgets" not in notebook.metadata, "widget state is kept: delete metadata.widgets"
    kinds = {kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert "image/png" in kinds and WIDGET not in kinds, "execute the notebook with CI=1"


# ---------------------------------------------------------------- in a kernel


def clean_environment(folder: Path) -> dict[str, str]:
    """An environment in which somebody watches, and in which no settings of the user are read or written."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("CI", "COVIDSEV_QUIET", "MPLBACKEND") and not name.startswith(("JUPYTER", "PYTEST"))}
    ours = {name: str(folder / name.lower()) for name in
            ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR",
             "JUPYTERLAB_WORKSPACES_DIR")}
    return {**kept, **ours, "JUPYTER_PREFER_ENV_PATH": "1"}


def notebook_of(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute(
        env=environment)
    return notebook


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> nbformat.NotebookNode:
    """A notebook that shows the viewer and then moves its slider, run through a kernel."""
    pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'covidsev[viewer]'")
    folder = tmp_path_factory.mktemp("kernel")
    sources = MAKE, "viewer", "viewer.controls['slice'].value = 2", "viewer.controls['colour'].value = 'errors'"
    return execute(notebook_of(*sources), folder, clean_environment(folder))


def test_a_kernel_sends_the_widget_and_the_strip(executed):
    [output] = executed.cells[1].outputs
    assert set(output.data) >= {WIDGET, "image/png", "text/plain"}
    still = Image.open(BytesIO(base64.b64decode(output.data["image/png"])))
    assert still.format == "PNG" and still.width > 2 * still.height  # a strip


def test_a_kernel_sends_the_new_picture_when_a_trait_is_set(study, executed):
    """nbclient stands for the browser: it keeps what the kernel sent to the picture on the screen."""
    states = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    [picture] = [state for state in states if state["model_name"] == "ImageModel"]
    [shown] = [base64.b64decode(part["data"]) for part in picture["buffers"]]
    assert shown == slice_png(render_slice(study, Look(1, colour="errors")))


def test_a_page_without_a_kernel_shows_the_strip(executed):
    from nbconvert import HTMLExporter

    kept = nbformat.from_dict(json.loads(json.dumps(executed)))
    del kept.metadata["widgets"]  # as committed, and as JupyterLab saves it
    page, _ = HTMLExporter().from_notebook_node(kept)
    assert executed.cells[1].outputs[0].data["image/png"].strip()[:200] in page.replace("\n", "")
    assert WIDGET not in page


@pytest.mark.parametrize("folder", ["nbs", "nbs/experiments"])
def test_a_kernel_in_the_notebooks_folder_imports_this_package(repository, tmp_path, folder):
    done = execute(notebook_of("import covidsev, sys; print(covidsev.__file__); print(sys.prefix)"),
                   repository / folder, clean_environment(tmp_path))
    module, prefix = done.cells[0].outputs[0].text.split()
    assert Path(module) == repository / "covidsev" / "__init__.py" and Path(prefix) == Path(sys.prefix)


# ---------------------------------------------------------------- in JupyterLab


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 40) -> None:
    """Returns when the server answers; fails with its log when it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with one notebook in its folder; yields the address of that notebook."""
    pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'covidsev[viewer]'")
    folder = tmp_path_factory.mktemp("lab")
    nbformat.write(notebook_of(MAKE, "viewer"), folder / "small.ipynb")
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}",
               "--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}",
               "--ServerApp.allow_root=True", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=clean_environment(folder), stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/small.ipynb?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the server ends its kernels
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def page(request):
    """A page of headless Chromium; skipped where there is no browser or nothing to drive it."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("needs Chromium: install your system's package chromium")
    request.getfixturevalue("lab")  # skipped browsers start no server
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(40_000)
        yield page
        browser.close()


PICTURE = "img.widget-image"
READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
BYTES = """async image => { const data = await (await fetch(image.src)).arrayBuffer();
                            return btoa(String.fromCharCode(...new Uint8Array(data))) }"""


def shown(page) -> bytes:
    """The bytes of the picture that is on the screen."""
    return base64.b64decode(page.locator(PICTURE).evaluate(BYTES))


def wait_until_shown(page, expected: bytes, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while (found := shown(page)) != expected and time.monotonic() < until:
        page.wait_for_timeout(50)
    assert sha(found) == sha(expected)


def keep_screenshot(page, name: str) -> None:
    """Writes a screenshot where COVIDSEV_SCREENSHOTS names a folder, to be looked at."""
    if folder := os.environ.get("COVIDSEV_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_in_jupyterlab(page, lab, study, viewer):
    """Opened, run, and moved by keyboard and mouse: each time the screen shows exactly what render_slice makes."""
    messages = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).wait_for()
    page.wait_for_function(READY)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.locator(PICTURE).wait_for()
    first = viewer.look.k
    wait_until_shown(page, slice_png(render_slice(study, Look(first, colour="mask"))))
    keep_screenshot(page, "opened")

    slider = page.locator(".widget-slider").first.locator(".noUi-handle")
    slider.focus()
    down = first == SHAPE[0] - 1
    page.keyboard.press("ArrowLeft" if down else "ArrowRight")
    k = first + (-1 if down else 1)
    wait_until_shown(page, slice_png(render_slice(study, Look(k, colour="mask"))))
    assert page.get_by_text(f"slice {k + 1} of {SHAPE[0]}").is_visible()

    page.get_by_role("button", name="errors", exact=True).click()
    wait_until_shown(page, slice_png(render_slice(study, Look(k, colour="errors"))))
    page.get_by_text("outline: edge").click()
    wait_until_shown(page, slice_png(render_slice(study, Look(k, colour="errors", edge=True))))
    assert page.get_by_role("columnheader", name="region").is_visible()
    box, beside = page.locator(PICTURE).bounding_box(), slider.bounding_box()
    assert beside["x"] > box["x"] + box["width"] and beside["y"] < box["y"] + 60  # controls stand beside the picture
    assert box["width"] == box["height"] == 440  # square pixels, and large enough to see
    keep_screenshot(page, "moved")
    assert not messages, messages
