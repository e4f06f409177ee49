"""Two processes that train together do what one does: the same steps in double precision, the same stops, the same errors."""
import json
import os
import signal
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from covidsev.method.unets import UNet, build_network
from covidsev.core import ConfigError, CovidSevError, NonFiniteError
from covidsev.data.datasets import load_phantom, to_tensors
from covidsev.paper.distributed import (Group, SharedBatchNorm2d, SharedTask, check_shares, fit_shared, group, main, own_device,
                                  share_of, share_weight, shared_network)
from covidsev.method.multiclass import MultiClassLoss
from covidsev.method.unets import MultiClassUNet
from covidsev.method.training import (SINGLE, Batch, MultiTask, TrainConfig, TrainingInterrupted, fit, load_checkpoint,
                               make_optimiser, train_step, weights_hash)

SIZE, STEPS = 64, 2  # of the phantom; the single steps take slices of half the side
TASKS = {"infnet": SINGLE,
         "multi softmax": MultiTask(MultiClassLoss(kind="softmax", class_weights=(0.2, 1.0, 3.0))),
         "multi sigmoid": MultiTask(MultiClassLoss(class_weights=(0.2, 1.0, 3.0)))}
CONFIG = TrainConfig(epochs=2, batch_size=5, learning_rate=1e-3, augment="paper", cutout=0.3, scales=(0.5, 1.0), scale_mode="all",
                     ema=0.9, clip_norm=1.0, channels_last=True, save_every=1)


def batch(seed: int) -> Batch:
    """Five noisy slices in double precision, with classes that are spread unevenly over them."""
    generator = torch.Generator().manual_seed(seed)
    images, prior = (torch.rand(5, 1, SIZE // 2, SIZE // 2, generator=generator).double() for _ in range(2))
    levels = torch.linspace(0.3, 0.95, 5)[:, None, None, None]
    return Batch(images, (images > levels).to(torch.uint8) + (images > 0.97).to(torch.uint8), prior)


def take_steps(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights after some optimiser steps of a small network, by as many processes as there are."""
    torch.manual_seed(0)
    network = MultiClassUNet("small") if name.startswith("multi") else build_network(name, "small")
    network, config = network.double().train(), TrainConfig(channels_last=False)
    task = SharedTask(TASKS[name], group()) if group().size > 1 else TASKS[name]
    optimiser = make_optimiser(network, config)
    if group().size == 1:  # torch's own normalisation
        losses = [train_step(network, optimiser, batch(k), config, task)[0] for k in range(STEPS)]
    else:
        with shared_network(network):
            losses = [train_step(network, optimiser, batch(k), config, task)[0] for k in range(STEPS)]
    assert not any(type(module) is SharedBatchNorm2d for module in network.modules())
    return losses, {key: value.clone() for key, value in network.state_dict().items()}


class Double(nn.Module):
    """A network that computes in double precision, so that rounding does not hide a mistake."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.network = UNet("small", width=0.25).double()

    def forward(self, x: torch.Tensor):
        return self.network(x.double())


@lru_cache(maxsize=1)
def phantom() -> tuple:
    return tuple(to_tensors(load_phantom(split, n=n, size=SIZE, seed=0), SIZE) for split, n in (("train", 8), ("val", 3)))


def fitted(folder: Path, **options):
    """A run of two epochs: history, and the weights that were chosen; batches of 5 and 3."""
    function = fit_shared if group().size > 1 else fit
    result = function(Double(), *phantom(), CONFIG, folder, **options)
    return result.history.to_dict("list"), {key: value.clone() for key, value in result.model.state_dict().items()}


class StopAfter(Double):
    """One process is told to stop in the middle of the second epoch, the other is not."""

    calls = 0

    def forward(self, x: torch.Tensor):
        self.calls += self.training
        if self.calls == 5 and self.training and group().rank == 1:
            self.calls += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)


def interrupted(folder: Path) -> tuple:
    """A run that was stopped and went on: exit status, checkpoint at the stop, and the result."""
    try:
        fit_shared(StopAfter(), *phantom(), CONFIG, folder)
        status = 0
    except TrainingInterrupted as stop:
        status = stop.code
    dist.barrier()
    state = load_checkpoint(folder / "last.pt")
    dist.barrier()
    return status, (state["epoch"], state["batch"]), fitted(folder, resume="must")


def message(call) -> tuple[str, str]:
    """Kind and text of the error of `call`."""
    try:
        call()
    except CovidSevError as error:
        return type(error).__name__, str(error)
    return "", ""


def broken() -> Double:
    network = Double()
    network.network.head.weight.data.fill_(float("inf"))
    return network


def faults(folder: Path) -> dict[str, tuple[str, str]]:
    rank = group().rank
    small = TrainConfig(epochs=1, batch_size=4, monitor="last")
    return {
        "other weights": message(lambda: fit_shared(Double(rank), *phantom(), CONFIG, folder / "a")),
        "other settings": message(lambda: fit_shared(Double(), *phantom(), TrainConfig(epochs=2 + rank), folder / "b")),
        "not finite": message(lambda: fit_shared(broken(), *phantom(), CONFIG, folder / "c")),
        "too few": message(lambda: fit_shared(Double(), tuple(x[:1] for x in phantom()[0]), None, small, folder / "d")),
    }


def work(rank: int, folder: str) -> None:
    """What each of the two processes does; each leaves what it found."""
    torch.set_num_threads(1)
    folder = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    found = {"steps": {name: take_steps(name) for name in TASKS}, "fit": fitted(folder / "fit"),
             "interrupted": interrupted(folder / "stop"), "faults": faults(folder / "faults")}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes found, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def difference(first: dict, second: dict) -> float:
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_one_process(together, name):
    (losses, weights), (_, others) = (found["steps"][name] for found in together[0])
    assert same(weights, others), "the two processes hold different weights"
    alone, expected = take_steps(name)
    assert losses == pytest.approx(alone, rel=1e-6)
    assert difference(weights, expected) < 1e-5  # an Adam step is 1e-3, and the loss itself is in single precision


def test_two_epochs_are_those_of_fit(together, tmp_path):
    (history, weights), (other_history, others) = (found["fit"] for found in together[0])
    assert str(history) == str(other_history) and same(weights, others)
    expected, alone = fitted(tmp_path)
    assert expected["epoch"] == history["epoch"] and len(history["epoch"]) == 2
    for column in ("lr", "train_loss", "train_s_3", "val_loss_sum", "val_loss_mean", "val_dice"):
        assert history[column] == pytest.approx(expected[column], rel=1e-5), column
    assert difference(weights, alone) < 1e-6


def test_only_the_first_process_writes(together):
    names = {path.name for path in (together[1] / "fit").iterdir()}
    assert {"best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256"} <= names <= {
        "best.pt", "best.pt.sha256", "last.pt", "last.pt.sha256", "prev.pt", "prev.pt.sha256", ".lock"}


def test_checkpoints_are_plain_ones(together):
    """Names without a prefix: the file loads into a network that knows nothing of processes."""
    weights = load_checkpoint(together[1] / "fit" / "best.pt")["weights"]
    Double().load_state_dict(weights)
    assert same(weights, together[0][0]["fit"][1])


def test_a_signal_to_one_stops_all_at_the_same_batch_and_the_run_goes_on(together):
    for found in together[0]:
        status, place, (history, weights) = found["interrupted"]
        assert status == 128 + signal.SIGTERM and place == (1, 1)  # one epoch and one batch were done
        assert same(weights, found["fit"][1]) and str(history) == str(found["fit"][0])  # every bit


def test_another_number_of_processes_does_not_resume(together):
    with pytest.raises(ConfigError, match="processes: 2 -> None"):
        fit(Double(), *phantom(), CONFIG, together[1] / "fit")


@pytest.mark.parametrize("fault, kind, words", [
    ("other weights", "CovidSevError", "differ in their settings, data or first weights"),
    ("other settings", "CovidSevError", "differ in their settings"), ("not finite", "NonFiniteError", "epoch 1, batch 1"),
    ("too few", "ConfigError", "smaller than the number of processes")])
def test_faults_reach_both(together, fault, kind, words):
    for found in together[0]:
        assert found["faults"][fault][0] == kind and words in found["faults"][fault][1]


# ------------------------------------------------------------------ one process


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_the_batch_once(size):
    whole = batch(0)
    shares = [share_of(whole, Group(rank, size)) for rank in range(size)]
    for name in Batch._fields:
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name))
    for task in TASKS.values():
        assert sum(share_weight(task, whole, share) for share in shares) == pytest.approx(1)
    assert share_of(whole._replace(prior=None), Group(0, size)).prior is None


def test_class_weights_weigh_the_shares():
    whole = batch(0)
    shares = [share_of(whole, Group(rank, 2)) for rank in range(2)]
    assert share_weight(TASKS["multi softmax"], whole, shares[0]) != pytest.approx(3 / 5, rel=1e-3)


def test_a_group_of_one_is_plain_fit(tmp_path):
    assert group() == Group(0, 1)
    first, second = (function(Double(), *phantom(), CONFIG, tmp_path / name) for name, function in
                     (("a", fit), ("b", fit_shared)))
    assert weights_hash(first.model) == weights_hash(second.model)


def test_batches_must_have_a_slice_for_each():
    check_shares(9, TrainConfig(batch_size=4), 4)  # the last one joins the batch before it
    with pytest.raises(ConfigError, match="fewer processes"):
        check_shares(10, TrainConfig(batch_size=4), 3)


def test_the_network_is_as_before_even_after_an_error():
    network = UNet("small", width=0.25)
    with pytest.raises(NonFiniteError), shared_network(network):
        assert sum(type(module) is SharedBatchNorm2d for module in network.modules()) > 10
        raise NonFiniteError("stop")
    assert not any(type(module) is SharedBatchNorm2d for module in network.modules())


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["--row", "unte", "--out", str(tmp_path)]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["--set", "epoch=3", "--out", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert main(["--device", "cuda", "--out", str(tmp_path)]) == 2
        assert own_device("auto") == "cpu"
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_run(tmp_path, capsys):
    small = {"size": 64, "n_train": 4, "n_test": 2, "val_slices": 2, "batch_size": 4, "epochs": 1, "warmup_epochs": 0}
    pairs = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    assert main(["--row", "unet", "--out", str(tmp_path / "run"), *pairs]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["parameters"]["processes"] == 1 and record["parameters"]["epochs"] == 1
    assert "wrote run" in capsys.readouterr().out
