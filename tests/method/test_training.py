"""The training loop: order, schedule, scales, selection, determinism. Faults: test_training_faults.py."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from covidsev.method import training
from covidsev.core import ConfigError, MaskError, NonFiniteError
from covidsev.data.datasets import mask_edge
from covidsev.method.losses import SideOutputs
from covidsev.method.training import (
    PUBLISHED,
    TrainConfig,
    WeightAverage,
    data_hash,
    draw_scales,
    epoch_batches,
    evaluate_loss,
    fit,
    learning_rate_at,
    load_checkpoint,
    make_config,
    make_optimiser,
    scaled_size,
    weights_hash,
)

TOY = TrainConfig(
    epochs=4, batch_size=4, learning_rate=1e-2, scales=(1.0,), augment="paper", ema=0.5, save_every=2
)


class ToyNet(nn.Module):
    """Small, but with what makes a run hard to repeat: batch normalisation, dropout, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = (
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Dropout2d(0.2),
        )
        self.head = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, images: torch.Tensor) -> SideOutputs:
        s_g, s_3, edge = self.head(self.drop(torch.relu(self.norm(self.conv(images))))).split(1, dim=1)
        return SideOutputs(s_g=s_g, s_5=None, s_4=None, s_3=s_3, edge=edge)


def toy_network(seed: int = 0) -> ToyNet:
    torch.manual_seed(seed)
    return ToyNet()


def toy_data(count: int = 10, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a brighter square, whose place is the label."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 120, (count, 1, size, size))
    labels = np.zeros((count, 1, size, size), np.uint8)
    for index, (top, left) in enumerate(draw.integers(0, size - 12, (count, 2))):
        labels[index, 0, top : top + 12, left : left + 12] = 1 + index % 2
    return torch.from_numpy((images + 100 * (labels > 0)).astype(np.uint8)), torch.from_numpy(labels)


TRAIN, VAL = toy_data(10, seed=1), toy_data(5, seed=2)


def run(folder, config=TOY, train=TRAIN, val=VAL, **options):
    return fit(toy_network(), train, val, config, folder, **options)


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"scales": (1.0, -1.0)},
        {"ema": 1.0},
        {"clip_value": -1.0},
        {"warmup_epochs": 99.0},
        {"optimiser": "sgd"},
        {"monitor": "test"},
        {"augment": "all"},
        {"cutout": 2.0},
        {"patience": -1},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(bad):
    with pytest.raises(ConfigError) as caught:
        make_config(**bad)
    assert next(iter(bad)).rstrip("s")[:6] in str(caught.value).replace("augmentation", "augment")


def test_a_misspelt_setting_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        make_config(batchsize=4)


# --- schedule -----------------------------------------------------------------------------------------------


@given(st.sampled_from(["cosine", "step", "constant", "compounding"]), st.floats(0, 1), st.integers(1, 300))
def test_the_rate_never_exceeds_the_setting_nor_falls_below_zero(schedule, part, epochs):
    config = TrainConfig(epochs=epochs, schedule=schedule, warmup_epochs=epochs / 10)
    assert 0 <= learning_rate_at(config, part * epochs) <= config.learning_rate


@given(st.integers(0, 400), st.integers(1, 90))
def test_the_step_schedule_is_the_formula(epoch, step):
    config = TrainConfig(epochs=500, schedule="step", step_epochs=step)
    assert learning_rate_at(config, epoch) == pytest.approx(config.learning_rate * 0.1 ** (epoch // step))


def test_the_published_schedule_compounds():
    rates = {epoch: learning_rate_at(PUBLISHED, epoch - 1) for epoch in (49, 50, 51, 55)}
    assert rates == pytest.approx({49: 1e-4, 50: 1e-5, 51: 1e-6, 55: 1e-10})


# --- batches and scales -------------------------------------------------------------------------------------


@given(st.integers(2, 70), st.integers(1, 30), st.integers(0, 5), st.integers(0, 5))
def test_batches_hold_each_slice_once_and_none_is_alone(count, size, seed, epoch):
    batches = epoch_batches(count, size, seed, epoch)
    assert sorted(torch.cat(batches).tolist()) == list(range(count))
    assert all(len(batch) <= size + 1 for batch in batches)
    assert size == 1 or min(len(batch) for batch in batches) > 1
    assert torch.equal(torch.cat(batches), torch.cat(epoch_batches(count, size, seed, epoch)))


@given(st.integers(1, 600), st.floats(0.1, 3), st.sampled_from([16, 32]))
def test_scaled_sizes_are_multiples_near_the_scale(side, scale, multiple):
    height, width = scaled_size((side, 2 * side), scale, multiple)
    if scale != 1:
        assert height % multiple == width % multiple == 0 and height > 0
        assert abs(height - side * scale) <= max(multiple / 2, multiple - side * scale) + 1e-6


def test_each_scale_makes_its_own_step_with_an_edge_from_the_mask_of_that_size(tmp_path, monkeypatch):
    seen = []

    def spy(outputs, mask, edge, *options):
        if torch.is_grad_enabled():
            seen.append(mask.shape[-1])
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
            assert torch.equal(edge > 0, mask_edge(mask > 0))
        return original(outputs, mask, edge, *options)

    original = training.infnet_loss
    monkeypatch.setattr(training, "infnet_loss", spy)
    data = toy_data(4, size=64)
    run(tmp_path / "two", TrainConfig(epochs=1, batch_size=2, scales=(0.5, 1.5)), data, data)
    assert seen == [32, 96] * 2
    state = load_checkpoint(tmp_path / "two" / "last.pt")["optimiser"]["state"]
    assert {float(entry["step"]) for entry in state.values()} == {4.0}  # two batches at two scales
    seen.clear()
    run(
        tmp_path / "one",
        TrainConfig(epochs=2, batch_size=2, scales=(0.5, 1.5), scale_mode="random"),
        data,
        data,
    )
    assert len(seen) == 4 and set(seen) <= {32, 96}


def test_a_random_scale_comes_from_the_generator():
    config = TrainConfig(scale_mode="random")
    draws = [
        [draw_scales(config, generator) for _ in range(9)]
        for generator in (torch.Generator().manual_seed(4) for _ in range(2))
    ]
    assert draws[0] == draws[1] and len(set(draws[0])) > 1


# --- sizes that do not divide, and missing classes ----------------------------------------------------------


@pytest.mark.parametrize("count, batch_size", [(2, 8), (3, 2), (5, 4), (4, 1), (9, 4)])
def test_any_number_of_slices_trains(tmp_path, count, batch_size):
    result = run(tmp_path, replace(TOY, epochs=2, batch_size=batch_size), toy_data(count))
    assert np.isfinite(result.history.train_loss).all() and result.epochs_run == 2


@pytest.mark.parametrize("value", [0, 1, 2])
def test_a_missing_class_trains(tmp_path, value):
    images, labels = TRAIN
    result = run(tmp_path, replace(TOY, epochs=2), (images, labels * 0 + value), (VAL[0], VAL[1] * 0))
    assert np.isfinite(result.history[["train_loss", "val_loss_sum", "val_dice"]].to_numpy()).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i, t: (i[:1], t[:1]), "too few training slices"),
        (lambda i, t: (i.float(), t), "not uint8"),
        (lambda i, t: (i, t[:, :, :, :-1]), "differ in shape"),
        (lambda i, t: (i[..., :20], t[..., :20]), "do not fit the network"),
        (lambda i, t: (i, t * 0 + 255), "unknown classes"),
    ],
)
def test_bad_data_is_refused_before_the_first_step(tmp_path, change, message):
    with pytest.raises((ConfigError, MaskError), match=message):
        run(tmp_path / "never", train=change(*TRAIN))
    assert not (tmp_path / "never").exists()


# --- evaluation and selection -------------------------------------------------------------------------------


def test_evaluation_changes_nothing_and_records_nothing():
    network = toy_network().train()
    before = weights_hash(network)
    scores = [evaluate_loss(network, VAL, replace(TOY, batch_size=size)) for size in (1, 2, 5)]
    assert weights_hash(network) == before and network.training
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)
    assert scores[0]["loss_sum"] == pytest.approx(2 * scores[0]["loss_mean"])  # the toy has two maps
    assert all(weight.grad is None for weight in network.parameters())


def test_the_weights_that_come_back_are_the_best_of_validation(tmp_path):
    result = run(tmp_path, replace(TOY, epochs=6))
    assert result.best_value == result.history.val_dice.max()
    assert result.best_epoch == int(result.history.epoch[result.history.val_dice.idxmax()])
    assert evaluate_loss(result.model, VAL, TOY)["dice"] == pytest.approx(result.best_value, abs=1e-6)
    assert not result.model.training
    saved = load_checkpoint(tmp_path / "best.pt")
    assert saved["epoch"] == result.best_epoch and saved["value"] == result.best_value


def test_selection_by_loss_takes_the_lowest(tmp_path):
    result = run(tmp_path, replace(TOY, monitor="loss", epochs=5))
    assert result.best_value == result.history.val_loss_sum.min()


def test_early_stop_counts_from_the_best_epoch(tmp_path, monkeypatch):
    values = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    monkeypatch.setattr(
        training, "evaluate_loss", lambda *_: {"loss_sum": 1.0, "loss_mean": 0.5, "dice": next(values)}
    )
    result = run(tmp_path, replace(TOY, epochs=50, patience=3))
    assert (result.best_epoch, result.epochs_run, result.stopped_early) == (
        2,
        5,
        True,
    )  # an equal value is not better


def test_evaluating_less_often_leaves_gaps_but_always_the_last(tmp_path):
    history = run(tmp_path, replace(TOY, epochs=5, eval_every=2)).history
    assert history.val_dice.notna().tolist() == [False, True, False, True, True]
    assert list(history.columns) == [
        "epoch",
        "lr",
        "train_loss",
        "train_s_g",
        "train_s_5",
        "train_s_4",
        "train_s_3",
        "train_edge",
        "val_loss_sum",
        "val_loss_mean",
        "val_dice",
    ]
    assert history.train_s_5.isna().all()  # the toy has no such map
    parts = history[["train_s_g", "train_s_3", "train_edge"]].sum(axis=1)
    assert np.allclose(parts, history.train_loss, rtol=1e-5)


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training,
        "evaluate_loss",
        lambda *_: {"loss_sum": float("nan"), "loss_mean": float("nan"), "dice": 0.9},
    )
    with pytest.raises(NonFiniteError, match="validation loss is not finite"):
        run(tmp_path)
    assert not (tmp_path / "best.pt").exists()


def test_training_learns(tmp_path):
    result = run(tmp_path, replace(TOY, epochs=25, augment="none", learning_rate=3e-2))
    assert result.best_value > 0.8


def test_without_validation_slices_the_last_epoch_is_kept(tmp_path):
    result = run(tmp_path / "a", replace(TOY, monitor="last"), val=None)
    assert result.best_epoch == TOY.epochs and result.history.val_dice.isna().all()
    watched = run(tmp_path / "b", replace(TOY, monitor="last"))
    assert weights_hash(watched.model) == weights_hash(result.model)  # watching changes nothing
    assert watched.best_epoch == TOY.epochs and watched.history.val_dice.notna().all()
    with pytest.raises(ConfigError, match="no validation slices"):
        run(tmp_path / "c", val=None)


def test_the_focal_loss_changes_training_and_not_the_gradient_free_parts(tmp_path):
    plain, focal = (run(tmp_path / str(g), replace(TOY, focal_gamma=g)) for g in (0.0, 2.0))
    assert weights_hash(plain.model) != weights_hash(focal.model)
    assert focal.history.train_s_3[0] < plain.history.train_s_3[0]


# --- lookahead ----------------------------------------------------------------------------------------------


def test_lookahead_moves_half_way_and_survives_an_interruption(tmp_path, monkeypatch):
    config = replace(TOY, lookahead=3)
    whole = run(tmp_path / "whole", config)
    assert weights_hash(whole.model) != weights_hash(run(tmp_path / "off").model)
    monkeypatch.setattr(training, "_is_finished", lambda state: state.epoch >= 2)
    run(tmp_path / "half", config)
    monkeypatch.undo()
    assert weights_hash(run(tmp_path / "half", config).model) == weights_hash(whole.model)


# --- mean of the weights ------------------------------------------------------------------------------------


def test_the_mean_is_what_is_validated_and_saved(tmp_path):
    config = replace(TOY, ema=0.9, epochs=2)
    run(tmp_path, config)
    last, best = load_checkpoint(tmp_path / "last.pt"), load_checkpoint(tmp_path / "best.pt")
    assert last["best_epoch"] == best["epoch"]
    if best["epoch"] == 2:
        assert all(
            torch.equal(best["weights"][name], value) for name, value in last["average"]["weights"].items()
        )
    assert not torch.equal(last["weights"]["conv.weight"], last["average"]["weights"]["conv.weight"])


def test_the_mean_follows_buffers_and_copies_counters():
    network = toy_network()
    average = WeightAverage(network, 0.9)
    network.norm.running_mean.fill_(10.0)
    network.norm.num_batches_tracked.fill_(7)
    average.update(network)
    assert torch.allclose(average.model.norm.running_mean, torch.full((4,), 9.0))  # first decay is 1/10
    assert (
        average.model.norm.num_batches_tracked == 7
        and average.model.norm.num_batches_tracked.dtype == torch.int64
    )


# --- determinism (row 69) -----------------------------------------------------------------------------------


def test_two_runs_give_the_same_bits_and_another_seed_does_not(tmp_path):
    hashes = [weights_hash(run(tmp_path / name).model) for name in ("first", "a second folder")]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "first" / "best.pt").read_bytes() == (
        tmp_path / "a second folder" / "best.pt"
    ).read_bytes()
    assert weights_hash(run(tmp_path / "third", replace(TOY, seed=1)).model) != hashes[0]


def test_data_is_never_changed_in_place(tmp_path):
    train = tuple(tensor.clone() for tensor in TRAIN)
    before = data_hash(*train)
    run(tmp_path, replace(TOY, augment="strong", cutout=0.4), train)
    assert data_hash(*train) == before


def test_saving_more_often_changes_no_number(tmp_path):
    often, seldom = (run(tmp_path / str(every), replace(TOY, save_every=every)) for every in (1, 4))
    assert weights_hash(often.model) == weights_hash(seldom.model)
    assert often.history.equals(seldom.history)


# --- optimiser and device -----------------------------------------------------------------------------------


def test_a_fused_step_equals_a_plain_one():
    networks = [toy_network(), toy_network()]
    fused = make_optimiser(networks[0], replace(TOY, optimiser="adam", weight_decay=0.0))
    plain = torch.optim.Adam(networks[1].parameters(), lr=TOY.learning_rate, foreach=False)
    assert fused.defaults["fused"]
    for network, optimiser in zip(networks, (fused, plain), strict=True):
        for _ in range(3):
            optimiser.zero_grad()
            network.eval()(TRAIN[0].float() / 255).s_3.mean().backward()
            optimiser.step()
    for mine, theirs in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_and_not_a_fallback(tmp_path):
    with pytest.raises(ConfigError, match="--device cpu"):
        run(tmp_path / "never", device="cuda")
    assert not (tmp_path / "never").exists()


def test_out_of_gpu_memory_suggests_a_smaller_batch(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(ConfigError, match="smaller batch_size"):
        run(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_in_bfloat16(tmp_path):
    result = run(tmp_path, replace(TOY, epochs=20, learning_rate=3e-2, augment="none"), device="cuda")
    assert result.best_value > 0.5 and next(result.model.parameters()).device.type == "cuda"
