"""The one loop: settings, batches, scales, means, precision; labels of its own; several processes."""
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, strategies as st
from torch import nn

from covidsev.core import ConfigError, MaskError, NonFiniteError
from covidsev.data.datasets import mask_edge
from covidsev.method import training
from covidsev.method.losses import SideOutputs
from covidsev.method.unets import MultiClassOutputs
from covidsev.method.training import (MULTI, SINGLE, Batch, SelfLabelling, Supervised, TrainConfig,
                                      WeightAverage, data_hash, deal_groups, epoch_batches, fit,
                                      group, learning_rate_at, load_checkpoint, make_optimiser,
                                      run_to_end, scaled, soft_maps, train_step, weights_hash)

TOY = TrainConfig(epochs=3, batch_size=4, learning_rate=1e-2, augment="paper", precision="float32")


class Toy(nn.Module):
    """Two maps and an edge from one convolution, normalisation and a head."""

    def __init__(self, seed: int = 0, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head, self.frozen = nn.Conv2d(4, 3, 1), frozen

    def train(self, mode: bool = True) -> "Toy":
        super().train(mode)
        self.norm.train(mode and not self.frozen)
        return self

    def forward(self, images: torch.Tensor) -> SideOutputs:
        s_g, s_3, edge = self.head(torch.relu(self.norm(self.conv(images)))).split(1, dim=1)
        return SideOutputs(s_g=s_g, s_3=s_3, edge=edge)


def toy_data(count: int, seed: int = 1, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a brighter square, whose place is the label."""
    draw = np.random.default_rng(seed)
    images, labels = draw.integers(0, 120, (count, 1, size, size)), np.zeros((count, 1, size, size), np.uint8)
    for index, (top, left) in enumerate(draw.integers(0, size - 12, (count, 2))):
        labels[index, 0, top:top + 12, left:left + 12] = 1 + index % 2
    return torch.from_numpy((images + 100 * (labels > 0)).astype(np.uint8)), torch.from_numpy(labels)


TRAIN = toy_data(10)


def run(folder, config=TOY, train=TRAIN, model=None, **options):
    return fit(model or Toy(), train, config, folder, **options)


# settings, rate, batches, scales

@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"scales": (1.0, -1.0)}, {"ema": 1.0},
                                 {"clip_norm": -1.0}, {"warmup_epochs": 99.0}, {"schedule": "step"}, {"augment": "all"},
                                 {"cutout": 2.0}, {"precision": "half"}, {"images_per_epoch": -1}, {"lookahead": -1}])
def test_a_setting_that_cannot_work_is_refused_by_name(bad):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**bad)
    assert next(iter(bad)).rstrip("s")[:6] in str(caught.value).replace("augmentation", "augment")


@given(st.sampled_from(["cosine", "constant"]), st.floats(0, 1), st.integers(1, 300))
def test_the_rate_never_exceeds_the_setting_nor_falls_below_zero(schedule, part, epochs):
    config = TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=epochs / 10)
    assert 0 <= learning_rate_at(config, part * epochs) <= config.learning_rate


@given(st.integers(2, 70), st.integers(1, 30), st.integers(0, 5), st.integers(0, 5), st.integers(0, 150))
def test_batches_hold_each_slice_equally_often_and_none_is_alone(count, size, seed, epoch, draws):
    batches = epoch_batches(count, size, seed, epoch, draws)
    times = torch.cat(batches).bincount(minlength=count)
    assert int(times.sum()) == (draws or count) and int(times.max() - times.min()) <= 1
    assert all(len(batch) <= size + 1 for batch in batches)
    assert size == 1 or len(batches) == 1 or min(len(batch) for batch in batches) > 1
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(count, size, seed, epoch, draws)))


@given(st.integers(1, 600), st.floats(0.1, 3))
def test_scaled_sizes_are_multiples_near_the_scale(side, scale):
    height, width = scaled(Batch(torch.zeros(1, 1, side, 2 * side), torch.zeros(1, 1, side, 2 * side, dtype=torch.uint8)),
                           scale).images.shape[-2:]
    if scale != 1:
        assert height % 32 == width % 32 == 0 and height > 0
        assert abs(height - side * scale) <= max(16, 32 - side * scale) + 1e-6


def test_each_scale_makes_its_own_step_with_an_edge_from_the_mask_of_that_size(tmp_path, monkeypatch):
    seen, original = [], training.infnet_loss

    def spy(outputs, mask, edge, **options):
        seen.append(mask.shape[-1])
        assert set(mask.unique().tolist()) <= {0.0, 1.0} and torch.equal(edge > 0, mask_edge(mask > 0))
        return original(outputs, mask, edge, **options)

    monkeypatch.setattr(training, "infnet_loss", spy)
    result = run(tmp_path, replace(TOY, epochs=1, batch_size=2, scales=(0.5, 1.5)), toy_data(4, size=64))
    assert seen == [32, 96] * 2 and (result.steps, result.draws) == (4, 4)


# what is learned from

@pytest.mark.parametrize("count, batch_size", [(2, 8), (3, 2), (5, 4), (4, 1), (9, 4)])
def test_any_number_of_slices_trains(tmp_path, count, batch_size):
    result = run(tmp_path, replace(TOY, epochs=2, batch_size=batch_size), toy_data(count))
    assert np.isfinite(result.history.train_loss).all() and result.draws == 2 * count


@pytest.mark.parametrize("value", [0, 1, 2])
def test_a_missing_class_trains(tmp_path, value):
    result = run(tmp_path, replace(TOY, epochs=2), (TRAIN[0], TRAIN[1] * 0 + value))
    assert np.isfinite(result.history.train_loss).all()


@pytest.mark.parametrize("change, message", [
    (lambda i, t: (i[:1], t[:1]), "too few training slices"), (lambda i, t: (i.float(), t), "not uint8"),
    (lambda i, t: (i, t[:, :, :, :-1]), "differ in shape"), (lambda i, t: (i[..., :20], t[..., :20]), "do not fit the network"),
    (lambda i, t: (i, t * 0 + 255), "unknown classes"), (lambda i, t: (i, t, t), "does not fit the single task")])
def test_bad_data_is_refused_before_the_first_step(tmp_path, change, message):
    with pytest.raises((ConfigError, MaskError), match=message):
        run(tmp_path / "never", train=change(*TRAIN))
    assert not (tmp_path / "never").exists()


def test_data_is_never_changed_in_place(tmp_path):
    train = tuple(tensor.clone() for tensor in TRAIN)
    run(tmp_path, replace(TOY, augment="strong", cutout=0.4), train)
    assert data_hash(*train) == data_hash(*TRAIN)


# what comes out

def test_training_learns_and_gives_the_mean_of_the_last_epoch(tmp_path):
    result = run(tmp_path, replace(TOY, epochs=25, augment="none", learning_rate=3e-2, ema=0.8))
    history, saved = result.history, load_checkpoint(tmp_path / "last.pt")
    assert history.train_loss.iloc[-1] < 0.5 * history.train_loss.iloc[0] and not result.model.training
    assert list(history.columns) == ["epoch", "lr", *(f"train_{name}" for name in ("loss", "s_g", "s_5", "s_4", "s_3", "edge"))]
    assert history.train_s_5.isna().all()  # the toy has no such map
    parts = history[["train_s_g", "train_s_3", "train_edge"]].sum(axis=1)
    assert np.allclose(parts, history.train_loss, rtol=1e-5)
    assert saved["epoch"] == 25 and not {"network", "optimiser"} & set(saved)  # of a finished run: what it gives
    assert all(torch.equal(value, saved["weights"][name]) for name, value in result.model.state_dict().items())
    with torch.no_grad():
        found = result.model(TRAIN[0].float() / 255).s_3 > 0
    assert (found == (TRAIN[1] > 0)).float().mean() > 0.9


def test_the_mean_follows_buffers_and_copies_counters():
    network = Toy()
    average = WeightAverage(network, 0.9)
    network.norm.running_mean.fill_(10.0)
    network.norm.num_batches_tracked.fill_(7)
    average.update(network)
    assert torch.allclose(average.model.norm.running_mean, torch.full((4,), 9.0))  # first decay is 1/10
    assert average.model.norm.num_batches_tracked == 7


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "lookahead": 2, "images_per_epoch": 13}])
def test_interrupted_between_epochs_the_bits_are_the_same(tmp_path, changes):
    config = replace(TOY, **changes)
    whole, half = run(tmp_path / "whole", config), Supervised(Toy(), TRAIN, config)
    while half.epoch < 2:
        half.step()
    resumed = Supervised(Toy(3), TRAIN, config)
    torch.save(half.state(), tmp_path / "state.pt")
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    while not resumed.done:
        resumed.step()
    assert weights_hash(resumed.result().model) == weights_hash(whole.model)
    assert resumed.result().history.equals(whole.history) and resumed.steps == whole.steps
    if changes:
        assert weights_hash(whole.model) != weights_hash(run(tmp_path / "plain").model)


def test_two_runs_give_the_same_bits_and_another_seed_does_not(tmp_path):
    first, second = (run(tmp_path / name) for name in ("first", "a second folder"))
    assert weights_hash(first.model) == weights_hash(second.model)
    assert len({(tmp_path / name / "last.pt").read_bytes() for name in ("first", "a second folder")}) == 1
    assert weights_hash(run(tmp_path / "third", replace(TOY, seed=1)).model) != weights_hash(first.model)
    seldom = run(tmp_path / "fourth", replace(TOY, save_every=1))  # saving more often changes no number
    assert weights_hash(seldom.model) == weights_hash(first.model) and seldom.history.equals(first.history)


# precision, optimiser, device

def test_both_precisions_end_near_each_other(tmp_path):
    """A short run: losses within 5 %, the same decision in 97 % of the pixels; weights and means stay float32."""
    config = replace(TOY, epochs=12, learning_rate=2e-2, augment="none", ema=0.8)
    low, high = (run(tmp_path / name, replace(config, precision=name)) for name in ("bfloat16", "float32"))
    assert low.history.train_loss.iloc[-1] == pytest.approx(high.history.train_loss.iloc[-1], rel=0.05)
    with torch.no_grad():
        maps = [result.model(TRAIN[0].float() / 255).s_3 > 0 for result in (low, high)]
    assert (maps[0] == maps[1]).float().mean() > 0.97 and weights_hash(low.model) != weights_hash(high.model)
    assert {value.dtype for value in low.model.state_dict().values()} == {torch.float32, torch.int64}


def test_the_gradient_is_not_longer_than_the_limit():
    network, batch = Toy(), Batch(TRAIN[0].float() / 255, TRAIN[1])
    for limit in (0.0, 1e-3):
        train_step(network, make_optimiser(network, TOY), batch, replace(TOY, clip_norm=limit))
        norm = float(nn.utils.get_total_norm([weight.grad for weight in network.parameters()]))
        assert (norm <= 1.001e-3) == bool(limit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_and_not_a_fallback(tmp_path):
    with pytest.raises(ConfigError, match="--device cpu"):
        run(tmp_path / "never", device="cuda")
    assert not (tmp_path / "never").exists()


def test_out_of_gpu_memory_suggests_a_smaller_batch(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(ConfigError, match="smaller batch_size"):
        run(tmp_path)


# labels of its own

@given(st.integers(1, 80), st.integers(0, 10**6), st.data())
def test_every_slice_is_dealt_once_into_groups_of_nearly_equal_size(n, seed, data):
    groups = deal_groups(n, data.draw(st.integers(1, n)), seed)
    assert sorted(torch.cat(groups).tolist()) == list(range(n))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize("n, rounds", [(0, 1), (0, 0), (3, 4), (3, 0), (3, -1)])
def test_what_cannot_be_dealt_is_refused(n, rounds):
    with pytest.raises(ConfigError, match="set n_unlabelled and rounds"):
        deal_groups(n, rounds, 0)


class Says(nn.Module):
    """A network that answers with given logits, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return SideOutputs(s_3=self.logits[:len(x)])


@given(st.integers(1, 9), st.integers(0, 99), st.floats(0.1, 20), st.floats(-20, 20))
def test_the_stretch_keeps_the_order_of_pixels(n, seed, scale, shift):
    logits = scale * torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) + shift
    maps = soft_maps(Says(logits), torch.zeros(n, 1, 32, 32, dtype=torch.uint8), n)
    for one, logit in zip(maps, logits, strict=True):
        assert (one.ravel()[logit.ravel().argsort()].int().diff() >= 0).all()
        if torch.sigmoid(logit).max() - torch.sigmoid(logit).min() > 1e-6:
            assert one.min() == 0 and one.max() == 255


def test_maps_know_no_batches_and_leave_a_network_that_can_still_learn():
    model, images = Toy(), TRAIN[0]
    whole, pieces = (soft_maps(model, images, size) >= 128 for size in (10, 3))
    assert (whole != pieces).float().mean() < 1e-3 and not model.training
    model.train()(torch.rand(2, 1, 32, 32)).s_3.sum().backward()
    hollow = torch.zeros(2, 1, 32, 32)
    hollow[1, 0, 3, 3] = float("nan")  # one pixel is enough
    with pytest.raises(NonFiniteError, match="gives no numbers"):
        soft_maps(Says(hollow), torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    assert soft_maps(model, images[:0]).shape == (0, 1, 32, 32)


ROUNDS, POOL = replace(TOY, epochs=6, schedule="constant", ema=0.5), toy_data(7, seed=5)[0]


def rounds(folder, pool=POOL, config=ROUNDS, model=None, kind=SelfLabelling, **options) -> SelfLabelling:
    game = kind(model or Toy(), tuple(each[:4] for each in TRAIN), pool, config, 3)
    run_to_end(game, folder, game.identity(), save_every=1, **options)
    return game


def test_the_rounds_label_a_group_each_and_learn_from_all_that_has_a_label(tmp_path, monkeypatch):
    """Labels come from the mean that the former round left; true labels stay as they are; no pool label is looked at."""
    given, original = [], training.soft_maps

    def watch(model, images, batch_size):
        given.append((weights_hash(model), images))
        return original(model, images, batch_size)

    monkeypatch.setattr(training, "soft_maps", watch)
    game = rounds(tmp_path)
    groups = deal_groups(7, 3, 0)
    assert all(torch.equal(images, POOL[members]) for (_, images), members in zip(given, groups, strict=True))
    assert given[0][0] == weights_hash(Toy()) and len({weights for weights, _ in given}) == 3
    assert torch.equal(game.data[1][:4].cpu(), TRAIN[1][:4]) and len(game.data[0]) == 11
    assert game.draws == 2 * (7 + 9 + 11) and set(game.labels.unique().tolist()) == {0, 1}


class Stops(SelfLabelling):
    """Ends the process, in its way, before a batch."""

    at = (2, 1)

    def step(self):
        if (self.epoch, self.batch) == self.at:
            raise KeyboardInterrupt
        super().step()


@pytest.mark.parametrize("at", [(2, 1), (4, 0)])
def test_stopped_rounds_go_on_to_the_same_end(tmp_path, at, monkeypatch):
    whole = rounds(tmp_path / "whole")
    monkeypatch.setattr(Stops, "at", at)
    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path / "stopped", kind=Stops)
    again = rounds(tmp_path / "stopped", resume="must")
    assert torch.equal(again.labels, whole.labels)
    assert weights_hash(again.result().model) == weights_hash(whole.result().model)


@pytest.mark.parametrize("options, words", [({"config": replace(ROUNDS, learning_rate=1e-3)}, "config.learning_rate: 0.01"),
                                            ({"pool": POOL.flip(-1)}, "pool: "), ({"model": Toy(1)}, "first weights: ")])
def test_rounds_of_another_run_are_refused_with_the_difference(tmp_path, options, words):
    rounds(tmp_path)
    with pytest.raises(ConfigError, match=words):
        rounds(tmp_path, **options)


def test_rounds_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiple of rounds"):
        rounds(tmp_path, config=replace(ROUNDS, epochs=7))


# several processes

def gradients(count: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Gradients and losses of one batch of five slices, by as many processes as there are, normalisation frozen."""
    game = Supervised(Toy(frozen=True), toy_data(5), replace(TOY, batch_size=5, augment="none", scales=(1.0, 2.0), clip_norm=0.0))
    game.optimiser.step = lambda: None  # the second scale starts from the same weights
    game.learner.train()
    losses = game._learn(game._augmented(torch.arange(5)))
    return {name: weight.grad.clone() for name, weight in game.model.named_parameters()}, losses


def work(rank: int, folder: str) -> None:
    """What each of two processes does; each leaves what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {"gradients": gradients(2), "group": tuple(group())}
    result = fit(Toy(frozen=True), TRAIN, replace(TOY, save_every=1), Path(folder) / "fit")
    found["fit"] = weights_hash(result.model), result.history.to_dict("list"), result.steps
    try:
        fit(Toy(), toy_data(3), replace(TOY, batch_size=1), Path(folder) / "few")
    except ConfigError as error:
        found["few"] = str(error)
    os.environ.update(WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two processes found, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


def test_two_processes_give_the_gradient_of_one(together):
    alone, losses = gradients(1)
    for found in together[0]:
        theirs, their_losses = found["gradients"]
        for name, gradient in alone.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)
        assert np.allclose(their_losses, losses, rtol=1e-5, equal_nan=True)


def test_a_run_of_two_processes_is_that_of_one_and_the_first_writes_it(together, tmp_path):
    (first, second), folder = together
    assert first["fit"][0] == second["fit"][0] and first["fit"][2] == second["fit"][2] == 9
    assert [each["group"] for each in together[0]] == [(0, 2), (1, 2)]
    alone = run(tmp_path, model=Toy(frozen=True))
    assert first["fit"][1]["train_loss"] == pytest.approx(alone.history.train_loss.tolist(), rel=1e-3)
    Toy().load_state_dict(load_checkpoint(folder / "fit" / "last.pt")["weights"])  # names without a prefix
    with pytest.raises(ConfigError, match="processes: 2 -> 1"):
        run(folder / "fit", replace(TOY, save_every=1), model=Toy(frozen=True))
    assert "smaller than the number of processes" in first["few"]


def test_the_multi_task_reads_a_prior(tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)

        def forward(self, image, prior):
            return MultiClassOutputs(self.conv(torch.cat([image, prior], 1)))

    data = (*TRAIN, (TRAIN[1] > 0).to(torch.uint8) * 255)
    result = run(tmp_path, replace(TOY, epochs=12, learning_rate=0.1), data, Three(), task=MULTI)
    assert result.history.train_loss.iloc[-1] < 0.7 * result.history.train_loss.iloc[0]
    assert list(result.history.columns) == ["epoch", "lr", "train_loss"]
    with pytest.raises(ConfigError, match="does not fit the multi task"):
        run(tmp_path / "x", train=TRAIN, model=Three(), task=MULTI)
    assert SINGLE.parts[0] == MULTI.parts[0] == "total"
