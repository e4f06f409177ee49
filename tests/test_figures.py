"""Figures: the same bytes whatever the process, masks where they belong, pictures of any shape."""
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from covidsev import figures
from covidsev.config import GeometryError

IMAGES = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))

DRAW = """
import sys
import pandas as pd
from covidsev import figures
history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3., 2., 1.5], "val_loss_sum": [3., 2.5, 2.4]})
figures.save_figure(figures.learning_curves({"SInfNet": {0: history}}, stamp_text="toy"), sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path):
    for name, environment in (("a", {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"}), ("b", {"PYTHONHASHSEED": "2", "LC_ALL": "C"})):
        (tmp_path / f"work-{name}").mkdir()
        subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / name)], check=True, cwd=tmp_path / f"work-{name}",
                       env={**os.environ, **environment})
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


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
