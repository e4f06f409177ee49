"""Figures: legends that keep to the picture, empty panels, files that are whole or not there."""
import os

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from covidsev.data.show import strip
from covidsev.paper import tables
from covidsev.paper.experiments import load_registry


def history(**columns):
    return pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.0], **columns})


def test_curves_with_missing_epochs_no_column_or_no_run():
    figure = tables.learning_curves({"single": {"row": {0: history(val_dice=[np.nan, 0.5, np.nan])}}, "multi": {}}, ("train_loss", "val_dice"))
    panels = [ax for part in figure.subfigs for ax in part.axes]
    assert list(panels[1].get_lines()[0].get_xdata()) == [2] and [text.get_text() for text in panels[3].texts] == ["not run"]
    assert len(tables.learning_curves({"": {"row": {0: history()}}}, ("val_dice",)).subfigs[0].axes) == 1


@pytest.mark.parametrize("number", [1, 4, None])
def test_legends_touch_no_panel_and_stay_in_the_picture(number):
    titles = list(load_registry().titles("train_single").values())[:number]
    rows = {title: {0: history(val_dice=[0.1, 0.2, 0.3])} for title in titles}
    figure = tables.learning_curves({"single": rows, "multi": rows}, ("train_loss", "val_dice"))
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [ax.get_tightbbox(renderer) for part in figure.subfigs for ax in part.axes]
    for (legend,) in (part.legends for part in figure.subfigs):
        extent = legend.get_window_extent(renderer)
        assert extent.x1 <= 1.001 * figure.bbox.width and not any(extent.overlaps(box) for box in boxes)


def test_full_disk_is_named_and_leaves_the_old_figure(tmp_path, monkeypatch):
    stem = tmp_path / "figure"
    figure = strip([np.zeros((4, 4), np.uint8)])
    before = [path.read_bytes() for path in tables.save_figure(figure, stem)]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        tables.save_figure(strip([np.full((4, 4), 9, np.uint8)]), stem)
    assert str(stem) in str(caught.value)
    monkeypatch.undo()
    assert [(tmp_path / f"figure.{suffix}").read_bytes() for suffix in ("svg", "png")] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure.svg"]
