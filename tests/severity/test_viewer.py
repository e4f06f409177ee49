"""The slice viewer: a picture is a plain function of what there is and what to show; the page draws the same in a browser."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from covidsev.core import ConfigError, CovidSevError
from covidsev.data.phantom import phantom_volume, to_uint8
from covidsev.data.scans import turn_picture
from covidsev.severity.score import partition_regions
from covidsev.severity.viewer import (COLOURINGS, Look, Study, Viewer, make_study, render_slice, slice_facts, snapshot,
                                      spread_slices, view)

SHAPE = (5, 64, 64)


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    patient = phantom_volume(3, SHAPE)
    hu, lungs, truth = (array.T[::-1, ::-1] for array in (patient.hu, patient.lungs, patient.labels))
    return view(hu, (hu > -550) & (lungs > 0), truth=truth, lungs=lungs, regions=partition_regions(lungs))


@pytest.fixture(scope="module")
def study(viewer) -> Study:
    return viewer.study


# ---------------------------------------------------------------- the picture

masks = arrays(np.uint8, (5, 4, 3), elements=st.integers(0, 2))
volumes = arrays(np.float32, (5, 4, 3), elements=st.floats(-1024, 3000, width=32).filter(lambda hu: not 0 <= hu <= 1))
looks = st.builds(Look, k=st.integers(0, 2), level=st.floats(-1000, 500), width=st.floats(1, 4000),
                  colour=st.sampled_from(COLOURINGS), alpha=st.floats(0, 1), edge=st.booleans(), lungs=st.booleans())


@given(volumes, masks, masks, looks)
def test_a_picture_changes_nothing_and_is_a_function_of_its_arguments(hu, infection, truth, look):
    layers = [hu, infection, truth, infection / np.float32(2)]
    before = [array.copy() for array in layers]
    study = make_study(hu, infection, truth=truth, probs=layers[3], lungs=truth)
    picture = render_slice(study, look)
    assert picture.shape == (4, 5, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render_slice(study, look))
    assert all(np.array_equal(array, copy) for array, copy in zip(layers, before))


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


@given(st.integers(1, 40), st.integers(1, 9))
def test_slices_are_spread_over_the_whole_from_top_to_base(depth, n):
    chosen = spread_slices(make_study(np.full((2, 2, depth), -700.0)), n)
    assert chosen == sorted(set(chosen), reverse=True) and len(chosen) <= max(n, 1)
    assert 0 <= chosen[-1] and chosen[0] < depth and (depth < 2 * n or len(chosen) == n)


def test_a_slice_looks_as_in_its_volume_and_grey_values_have_no_window(study):
    look = Look(2, colour="mask", edge=True)
    alone = make_study(*(turn_picture(study.layers[name][..., 2]) if name else turn_picture(study.image[..., 2])
                         for name in ("", "infection")))
    assert np.array_equal(render_slice(study, look), render_slice(alone, replace(look, k=0)))
    grey = make_study(to_uint8(study.image))
    assert np.array_equal(render_slice(grey, Look(2, level=40, width=400)), render_slice(study, Look(2)))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("layer", [
    {"infection": np.full((6, 5), 3)}, {"infection": np.full((6, 5), -1)}, {"infection": np.zeros((5, 6))},
    {"truth": np.full((6, 5), np.nan)}, {"truth": np.full((6, 5), 0.5)}, {"lungs": np.full((6, 5), 3)},
    {"regions": np.full((6, 5), 21)}, {"probs": np.full((6, 5), 1.01)}, {"probs": np.full((6, 5), -0.01)},
    {"probs": np.full((6, 5), np.inf)}, {"probs": np.zeros((6, 5, 1))}], ids=str)
def test_layers_that_do_not_fit(layer):
    pytest.raises(CovidSevError, make_study, np.full((6, 5), -700.0), **layer).match(next(iter(layer)))


@pytest.mark.parametrize("image", [np.zeros((0, 4)), np.zeros((2, 2, 2, 2)), np.full((3, 3), 0.5),
                                   np.full((3, 3), -np.inf)], ids=lambda image: str(image.shape))
def test_images_that_are_no_scan(image):
    pytest.raises(CovidSevError, make_study, image).match("expected")


@pytest.mark.parametrize("look", [Look(-1), Look(width=-5), Look(level=float("nan")), Look(width=float("inf")),
                                  Look(alpha=1.5), Look(colour="masks"), Look(colour="probability")], ids=str)
def test_looks_that_cannot_be(study, look):
    pytest.raises(ConfigError, render_slice, study, look)


def test_a_failed_snapshot_leaves_no_figure_open(study):
    pytest.raises(ConfigError, snapshot, study.image, slices=[0, 99]).match("no slice 99")
    snapshot(study.image)
    assert not plt.get_fignums()


def test_importing_the_viewer_loads_no_torch():
    code = "import sys; import covidsev.severity.viewer; print(sorted({'torch', 'ipywidgets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- the page


def test_the_committed_notebook_keeps_pictures_and_no_scan(repository):
    notebook = nbformat.read(repository / "nbs" / "3_severity/06_viewer.ipynb", 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds and "iframe" not in str(outputs), "execute the notebook with COVIDSEV_QUIET=1"


DRIVE = """<script>setTimeout(() => {
const seen = [], note = () => seen.push([look.k, look.level, look.width, look.colour, +root.dataset.sum]);
note();
document.querySelector("canvas").dispatchEvent(new WheelEvent("wheel", {deltaY: 100, cancelable: true})); note();
root.dispatchEvent(new KeyboardEvent("keydown", {key: "Home", bubbles: true})); note();
root.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
root.dispatchEvent(new KeyboardEvent("keydown", {key: "M", bubbles: true})); note();
by("colour").value = "errors"; by("colour").onchange({target: by("colour")}); note();
by("edge").checked = true; by("edge").onchange({target: by("edge")}); note();
document.body.setAttribute("data-seen", JSON.stringify([seen, by("facts").textContent, by("keys").textContent]));
}, 1000)</script></body>"""


def test_in_a_browser(viewer, tmp_path):
    """Wheel, keys and boxes, in a real browser: each picture is that of `render_slice`, to 256 grey values."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    page = viewer.save(tmp_path / "viewer.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", DRIVE), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=8000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen, facts, keys = json.loads(re.search('data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    k = viewer.look.k
    assert [look[:4] for look in seen] == [
        [k, -600, 1500, "mask"], [max(0, k - 1), -600, 1500, "mask"], [4, -600, 1500, "mask"], [3, 40, 400, "mask"],
        [3, 40, 400, "errors"], [3, 40, 400, "errors"]]
    for number, (at, level, width, colour, total) in enumerate(seen):
        expected = render_slice(viewer.study, Look(at, level, width, colour, edge=number == 5)).sum()
        assert total == pytest.approx(int(expected), rel=0.01), number
    assert f"Dice {slice_facts(viewer.study, 3)['dice']:.3f}" in facts and keys.split() == ["found", "missed", "invented"]
