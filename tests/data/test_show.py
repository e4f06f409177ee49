"""Pictures: masks where they belong, marks that keep to the picture, pictures of any shape."""
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.backends.backend_agg import FigureCanvasAgg

from covidsev.core import GeometryError
from covidsev.data import show

IMAGES = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@given(IMAGES, st.integers(0, 2**32 - 1))
def test_overlay_touches_only_the_mask(image, seed):
    labels = np.random.default_rng(seed).integers(0, 3, image.shape)
    picture = show.overlay(image, labels)
    assert picture.shape == (*image.shape, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture[labels == 0], np.repeat(image[labels == 0][:, None], 3, axis=1))


@given(IMAGES)
def test_contour_lies_inside_and_touches_the_outside(image):
    mask = image > 127
    rim = show.contour(mask)
    assert not (rim & ~mask).any() and rim.any() == mask.any()
    assert not (show.contour(mask & ~rim) & rim).any()


@given(IMAGES, IMAGES)
def test_errors_count_every_pixel_once(one, other):
    if one.shape != other.shape:
        pytest.raises(GeometryError, show.error_map, one > 127, other > 127)
        return
    truth, prediction = one > 127, other > 127
    errors = show.error_map(truth, prediction)
    assert (errors > 0).sum() == (truth | prediction).sum()
    assert np.array_equal(errors == 1, truth & prediction)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=20))
def test_ranks_are_ordered(values):
    cases = show.ranked_cases(values)
    assert bool(cases) != np.isnan(values).all()
    if cases:
        best, median, worst = (values[cases[name]] for name in ("best", "median", "worst"))
        assert np.nanmax(values) == best >= median >= worst == np.nanmin(values)


@given(IMAGES)
def test_real_slices_are_turned_and_phantoms_are_not(image):
    assert np.array_equal(show.upright(image, "real"), image.T)
    assert np.array_equal(show.upright(image, "phantom"), image)
    colour = np.stack([image] * 3, axis=-1)
    assert show.upright(colour, "real").shape == (*image.T.shape, 3)


def test_narrow_figures_break_their_stamp():
    figure = show.captioned(plt.figure(figsize=(2, 2), layout="constrained"), "real · cpu · seeds 0-2 · n = 48 · a long row title")
    stamp = figure._supxlabel
    assert stamp.get_text().replace("\n", " · ") == "real · cpu · seeds 0-2 · n = 48 · a long row title" and "\n" in stamp.get_text()
    assert stamp.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= 1.02 * figure.bbox.width
