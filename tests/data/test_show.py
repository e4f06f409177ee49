"""Figures: masks where they belong, legends and marks that keep to the picture, pictures of any shape."""
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays
from matplotlib.backends.backend_agg import FigureCanvasAgg

from covidsev.data import show as figures
from covidsev.core import GeometryError
from covidsev.paper.experiments import load_registry

IMAGES = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@given(IMAGES, st.integers(0, 2**32 - 1))
def test_overlay_touches_only_the_mask(image, seed):
    labels = np.random.default_rng(seed).integers(0, 3, image.shape)
    picture = figures.overlay(image, labels)
    assert picture.shape == (*image.shape, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture[labels == 0], np.repeat(image[labels == 0][:, None], 3, axis=1))


@given(IMAGES)
def test_contour_lies_inside_and_touches_the_outside(image):
    mask = image > 127
    rim = figures.contour(mask)
    assert not (rim & ~mask).any()
    assert rim.any() == mask.any()
    once_more = figures.contour(mask & ~rim)
    assert not (once_more & rim).any()


@given(IMAGES, IMAGES)
def test_errors_count_every_pixel_once(one, other):
    if one.shape != other.shape:
        with pytest.raises(GeometryError):
            figures.error_map(one > 127, other > 127)
        return
    truth, prediction = one > 127, other > 127
    errors = figures.error_map(truth, prediction)
    assert (errors > 0).sum() == (truth | prediction).sum()
    assert np.array_equal(errors == 1, truth & prediction)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=20))
def test_ranks_are_ordered(values):
    cases = figures.ranked_cases(values)
    if not cases:
        assert np.isnan(values).all()
        return
    assert values[cases["best"]] >= values[cases["median"]] >= values[cases["worst"]]
    assert values[cases["best"]] == np.nanmax(values) and values[cases["worst"]] == np.nanmin(values)


@given(IMAGES)
def test_real_slices_are_turned_and_phantoms_are_not(image):
    assert np.array_equal(figures.upright(image, "real"), image.T)
    assert np.array_equal(figures.upright(image, "phantom"), image)
    colour = np.stack([image] * 3, axis=-1)
    assert figures.upright(colour, "real").shape == (*image.T.shape, 3)


def test_curves_with_missing_epochs_and_one_point():
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], "val_loss_sum": [np.nan, 2.5, np.nan]})
    figure = figures.learning_curves({"row": {0: history}})
    assert list(figure.axes[1].get_lines()[0].get_xdata()) == [2]


def test_stamp_is_in_the_figure():
    figure = figures.strip([np.zeros((4, 4), np.uint8)], stamp_text=figures.caption("phantom", "smoke", [0, 1], 3))
    assert [text.get_text() for text in figure.texts] == ["phantom · smoke · seeds 0-1 · n = 3"]


def test_full_disk_is_named_and_leaves_the_old_figure(tmp_path, monkeypatch):
    stem = tmp_path / "figure"
    figure = figures.strip([np.zeros((4, 4), np.uint8)])
    before = [path.read_bytes() for path in figures.save_figure(figure, stem)]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        figures.save_figure(figures.strip([np.full((4, 4), 9, np.uint8)]), stem)
    assert str(stem) in str(caught.value)
    monkeypatch.undo()
    assert [(tmp_path / f"figure.{suffix}").read_bytes() for suffix in ("svg", "png")] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure.svg"]


@given(st.lists(st.sampled_from(["warm-up", "coach", "network"]), min_size=1, max_size=12))
def test_shaded_turns_are_the_epochs_of_the_coach(phases):
    history = pd.DataFrame({"epoch": range(len(phases)), "phase": phases})
    shaded = [k for k in range(len(phases)) if any(low < k < high for low, high in figures.coach_turns(history))]
    assert shaded == [k for k, phase in enumerate(phases) if phase == "coach"]


def legends_on_panels(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = list(figure.subfigs) or [figure]
    boxes = [ax.get_tightbbox(renderer) for part in parts for ax in part.axes]
    return sum(legend.get_window_extent(renderer).overlaps(box) for part in parts for legend in part.legends for box in boxes)


def test_legends_touch_no_panel_however_many_rows():
    history = pd.DataFrame({"epoch": [1, 2, 3], "phase": ["warm-up", "coach", "network"], "train_loss": [3.0, 2.0, 1.0],
                            "val_loss_sum": [3.0, 2.5, 2.0], **dict.fromkeys([*figures.RECONSTRUCTION, *figures.ENTROPIES], 0.5)})
    for number in (1, 4, 15):
        rows = {f"a row with quite a long title, number {k}": {0: history} for k in range(number)}
        assert legends_on_panels(figures.curve_blocks({"single": rows, "multi": rows})) == 0
    assert legends_on_panels(figures.coach_curves({"row": {0: history, 1: history}})) == 0


def test_legends_of_all_rows_stay_in_the_picture():
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "val_loss_sum": [2.0, 1.0], "val_dice": [0.1, 0.2]})
    titles = load_registry().titles("train_single").values()
    for shown in (titles, sorted(titles, key=len)[:6], sorted(titles, key=len)[-6:]):
        figure = figures.curve_blocks({"single": {title: {0: history} for title in shown}}, ("train_loss", "val_loss_sum", "val_dice"))
        (legend,) = figure.subfigs[0].legends
        FigureCanvasAgg(figure).draw()
        assert legend.get_window_extent().x1 <= 1.001 * figure.bbox.width and legends_on_panels(figure) == 0


def test_curves_without_a_validation_column_or_any_run():
    """The last epoch may be kept without validation; a block without a run says so."""
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0]})
    figure = figures.curve_blocks({"single": {"row": {0: history}}, "multi": {}})
    panels = [ax for part in figure.subfigs for ax in part.axes]
    assert len(panels[0].get_lines()) == 2 and [text.get_text() for text in panels[3].texts] == ["not run"]


def test_narrow_figures_break_their_stamp():
    figure = figures.captioned(plt.figure(figsize=(2, 2), layout="constrained"), "real · cpu · seeds 0-2 · n = 48 · a long row title")
    stamp = figure._supxlabel
    assert stamp.get_text().replace("\n", " · ") == "real · cpu · seeds 0-2 · n = 48 · a long row title" and "\n" in stamp.get_text()
    assert stamp.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= 1.02 * figure.bbox.width


def test_class_colours_are_the_palette_and_grids_of_nothing_are_no_error():
    image, labels = np.full((8, 8), 100, np.uint8), np.zeros((8, 8), np.uint8)
    labels[:4], labels[4:6] = 1, 2
    figure = figures.class_grid({"multi": {"best": (image, labels, 0 * labels, 0.5)}}, "phantom", "phantom")
    assert np.array_equal(figure.axes[0].get_images()[0].get_array(), figures.overlay(image, labels))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ground-glass opacity", "consolidation"]
    assert figures.class_grid({}, "real").axes and figures.case_grid({}, "real").axes
