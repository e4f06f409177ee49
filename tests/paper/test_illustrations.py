"""Drawings of the networks and of the augmentation: traced, not typed; the same bytes every time."""
import ast
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from covidsev.paper import experiments
from covidsev.paper import illustrations
from covidsev.method.augmentation import Augmentation, augment
from covidsev.method.unets import build_network
from covidsev.core import ConfigError, DataMissingError, repo_root
from covidsev.core import read_json

FOLDER = repo_root() / "nbs" / "experiments"


@pytest.mark.parametrize("name, files", [
    ("figure_architectures", {f"architecture_{name}.{end}" for name in ("single", "multi") for end in ("svg", "png")}),
    ("figure_augmentation", {"augmentation.svg", "augmentation.png"})])
def test_figures_without_results(name, files, tmp_path):
    """They need no run, and write the same bytes twice."""
    for part in ("a", "b"):
        space = {"profile": "smoke", "results": str(tmp_path / "none"), "output": str(tmp_path / part)}
        for cell in experiments.code_cells(FOLDER / f"{name}.ipynb")[1:]:
            exec(compile(ast.parse(cell["source"]), name, "exec"), space)
        plt.close("all")
    assert {path.name for path in (tmp_path / "a/figures").iterdir()} == files
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name
    record = read_json(tmp_path / "a/run.json")
    assert record["parameters"] == {"profile": "smoke"} and record["shows"] == []


class Out(NamedTuple):
    out: torch.Tensor


class Chain(nn.Module):
    """Blocks of which each reads the sum of those that a table of zeros and ones names."""

    def __init__(self, reads: list[list[int]]):
        super().__init__()
        self.reads, self.blocks = reads, nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in reads)

    def forward(self, x):
        made = []
        for block, reads in zip(self.blocks, self.reads):
            made.append(block(sum(made[k] for k in reads) if reads else x))
        return Out(made[-1])


@settings(max_examples=15)
@given(st.data())
def test_arrows_are_exactly_what_each_block_reads(data):
    number = data.draw(st.integers(1, 6))
    reads = [sorted(data.draw(st.sets(st.integers(0, k - 1), max_size=k))) if k else [] for k in range(number)]
    network = Chain(reads)
    traced = illustrations.trace(network, {f"b{k}": (f"blocks.{k}",) for k in range(number)}, {"x": torch.rand(1, 1, 4, 4)})
    expected = {(f"b{j}", f"b{k}") for k, each in enumerate(reads) for j in each}
    expected |= {("x", f"b{k}") for k, each in enumerate(reads) if not each} | {(f"b{number - 1}", "out")}
    assert set(traced.arrows) == expected and len(traced.arrows) == len(expected)


def test_a_trace_agrees_with_the_network_that_is_trained():
    """Shapes and counts of the drawing are those of a network on numbers."""
    traced, network = illustrations.trace_infnet("small", 96), build_network("infnet", "small")
    assert sum(traced.parameters.values()) == sum(value.numel() for value in network.parameters())
    features = network.encode(torch.rand(2, 1, 96, 96))
    assert [traced.shapes[name] for name in features._fields] == [tuple(each.shape[1:]) for each in features]


def test_a_trace_leaves_no_hooks_behind_when_the_network_fails():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(2, 1, 1))
    with pytest.raises(RuntimeError):
        illustrations.trace(network, {"a": ("0",), "b": ("1",)}, {"x": torch.rand(1, 1, 4, 4)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_stale_drawing_is_refused():
    traced = illustrations.trace_infnet("small", 96)
    places = illustrations._infnet_places(4.0)
    routes = illustrations._infnet_routes(places)
    fewer = traced._replace(arrows=[pair for pair in traced.arrows if pair != ("f3", "rfb_3")])
    with pytest.raises(ConfigError, match=r"not real: \[\('f3', 'rfb_3'\)\]"):
        illustrations.draw_network(fewer, places, routes, (3.5, 4.0), {})
    with pytest.raises(ConfigError, match="the boxes of the drawing"):
        illustrations.draw_network(traced._replace(shapes={**traced.shapes, "new": (1,)}), places, routes, (3.5, 4.0), {})


@settings(max_examples=15)
@given(st.sampled_from((0.2, 0.4, 0.5, 0.7)), st.sampled_from(("side", "area")), st.integers(0, 10_000))
def test_the_measured_fraction_is_what_is_painted(c, mode, seed):
    picture = 0.3 + 0.4 * torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(seed))
    labels = torch.zeros(1, 1, 48, 48, dtype=torch.uint8)
    changed, _ = augment(picture, labels, Augmentation(cutout=c, cutout_mode=mode), torch.Generator().manual_seed(seed))
    measured = illustrations.erased_fractions(c, mode, size=48, draws=1, seed=seed)[0]
    assert float((changed != picture).float().mean()) == pytest.approx(measured, abs=1.5 / 48**2)


def test_pictures_of_a_pretext_come_back_and_a_missing_file_is_named(tmp_path):
    watched, masks = np.zeros((2, 1, 32, 32), np.uint8), np.ones((2, 2, 1, 2, 2), bool)
    np.savez(tmp_path / "run.npz", watched=watched, masks=masks, epochs=[0, 1], phases=np.array(["warm-up", "coach"]), picture_1=watched)
    result, again = illustrations.read_pretext(tmp_path / "run.npz")
    assert list(result.history.phase) == ["warm-up", "coach"] and list(result.pictures) == [1]
    assert again.dtype == torch.uint8 and result.masks.dtype == torch.bool
    with pytest.raises(DataMissingError, match="not on this machine"):
        illustrations.read_pretext(tmp_path / "none.npz")
