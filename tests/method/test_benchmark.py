"""The benchmark: both ways give the same values, ratios are paired, and a dead worker is noticed."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch

from covidsev.method import benchmark
from covidsev.method.benchmark import Case, Worker, bench, device_label, make_work, plain_loss, run_benchmark, timed
from covidsev.core import ConfigError, CovidSevError
from covidsev.data.datasets import mask_edge
from covidsev.method.losses import SideOutputs, infnet_loss

TINY, CPU = Case(64, 2, "small"), torch.device("cpu")


@pytest.mark.parametrize("seed", range(3))
def test_the_plain_loss_is_our_loss(seed):
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 1, 48, 40, generator=draw) > 0.7).float()
    outputs = SideOutputs(*(3 * torch.randn(2, 1, 48, 40, generator=draw) for _ in range(5)))
    edge = mask_edge(mask > 0).float()
    assert float(plain_loss(outputs, mask, edge)) == pytest.approx(
        float(infnet_loss(outputs, mask, edge).total), rel=1e-5
    )


def test_both_steps_are_the_same_step():
    losses = {}
    for variant in ("published", "ours"):
        step = make_work("training step", variant, TINY, CPU)
        losses[variant] = [step(), step(), step()]
    assert losses["ours"][0] == pytest.approx(losses["published"][0], rel=1e-5)
    assert losses["ours"] == pytest.approx(losses["published"], rel=2e-2)
    assert losses["ours"][2] != losses["ours"][0]


def test_both_evaluations_give_the_same_logits():
    published, ours = (make_work("evaluation", variant, TINY, CPU)() for variant in ("published", "ours"))
    assert ours.shape == (2, 64, 64) and published.std() > 0.01 * np.abs(published).max() > 0
    assert np.abs(ours - published).max() < 1e-3 * np.abs(published).max()


@pytest.mark.parametrize("size", [64, 160])  # among ten slices of 160 pixels some have no infection
def test_both_scorings_give_the_same_curves(size):
    published, ours = (make_work("scores", variant, Case(size, 10, "small"), CPU)() for variant in ("published", "ours"))
    assert ours.shape == (10, 5, 256) and (published.std(axis=2) > 0).any(axis=0).all()
    np.testing.assert_allclose(ours, published, rtol=0, atol=1e-12)


def test_scores_are_measured_on_the_processor_beside_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(benchmark, "_measure_stage", lambda stage, names, *rest: asked.append((stage, names, rest[-1])) or [{"stage": stage, "variant": names[0]}])
    run_benchmark(64, 2, "small", device="cuda")
    assert asked == [("training step", benchmark.VARIANTS, "cuda"), ("evaluation", benchmark.VARIANTS, "cuda"),
                     ("scores", ("published", "ours"), "cpu")]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'ours'"):
        make_work("evaluation", "our", TINY, CPU)
    with pytest.raises(ConfigError, match="training step"):
        make_work("train", "ours", TINY, CPU)


class FakeWorker:
    """Answers like a worker, with times that are known; notes the order of the questions."""

    order: list[str] = []
    seconds = {"published": iter([2.0, 8.0, 4.0] * 3), "ours": iter([1.0, 2.0, 2.0] * 3)}

    def __init__(self, **spec):
        self.name = spec["variant"]

    def ask(self, keep=None):
        if keep:
            np.save(keep, np.array([4.0, 2.0 if self.name == "published" else 2.5]))
            return {"seconds": 99.0, "peak": 1.0}
        self.order.append(self.name)
        return {
            "seconds": next(self.seconds[self.name]),
            "peak": {"published": 300.0, "ours": 100.0}[self.name],
        }

    def close(self):
        pass


def test_ratios_are_paired_alternating_and_leave_out_the_first_answer(monkeypatch):
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    table = run_benchmark(64, 2, "small", repeats=3, device="cpu").set_index(["stage", "variant"])
    assert FakeWorker.order == ["published", "ours"] * 9
    row = table.loc[("training step", "ours")]
    assert (row.ratio, row.ratio_low, row.ratio_high, row.seconds) == (2.0, 2.0, 4.0, 2.0)
    assert row.memory_ratio == 3.0 and row.difference == pytest.approx(0.5 / 4)
    assert (table.xs("published", level="variant")[["ratio", "memory_ratio"]] == 1).all().all()


def test_the_table_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "seconds", {"published": iter([2.0] * 3), "ours": iter([1.0] * 3)})
    table = bench([TINY], repeats=1, device="cpu", out_dir=tmp_path)
    assert "published" in capsys.readouterr().out
    kept = pd.read_csv(tmp_path / "cpu.csv")
    pd.testing.assert_frame_equal(kept, table, check_dtype=False)
    assert len(kept) == 6 and not {"host", "time", "user", "path"} & set(kept.columns)


def test_a_worker_that_dies_is_named_and_does_not_hang():
    worker = Worker(
        stage="training step", variant="ours", case=Case(63, 2, "small"), threads=1, device="cpu"
    )  # 63 does not fit
    started = time.monotonic()
    with pytest.raises(CovidSevError, match="ended early") as caught:
        worker.ask()
        worker.ask()
    worker.close()
    assert (
        "ours" in str(caught.value)
        and "exit status 1" in str(caught.value)
        and time.monotonic() - started < 120
    )


def test_processor_time_is_counted_and_waiting_is_not():
    asleep, value = timed(lambda: time.sleep(0.2) or 7, CPU)
    busy, _ = timed(lambda: sum(range(3_000_000)), CPU)
    assert value == 7 and asleep < 0.1 < 0.2 and busy > 0.01


def test_the_file_is_named_after_the_device():
    assert device_label("cpu") == "cpu"
    assert json.dumps(device_label("auto")).isascii()
