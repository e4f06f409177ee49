"""Pseudo labels: dealing, maps, labels, what the loop may see, going on after a stop, the start file."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from covidsev.paper import runs
from covidsev.method import semi
from covidsev.method.unets import SegNet
from covidsev.core import (CheckpointError, ConfigError, DataMissingError, LeakageError, MaskError,
                             NonFiniteError, RunLockedError, seed_everything)
from covidsev.data.datasets import SliceSet, load_splits, to_tensors
from covidsev.method.losses import SideOutputs
from covidsev.core import run_lock
from covidsev.method.semi import LoopConfig, PseudoSet
from covidsev.method.training import (TrainConfig, TrainingInterrupted, load_checkpoint, save_checkpoint,
                               weights_hash)

CONFIG = TrainConfig(epochs=2, batch_size=4, learning_rate=2e-3, scales=(1.0,), augment="paper", cutout=0.3)
LOOP = LoopConfig(rounds=3, epochs=1, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("COVIDSEV_QUIET", "1")


@pytest.fixture(scope="module")
def splits():
    return load_splits("phantom", size=32, n_train=4, n_test=3, val_slices=3)


@pytest.fixture(scope="module")
def pool():
    return semi.load_pool("phantom", 32, 7)


def network(seed=0):
    seed_everything(seed, threads=1)
    return SegNet("small", width=0.5)


class Says(nn.Module):
    """A network that answers with given logits, whatever it sees."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return SideOutputs(s_3=self.logits[:len(x)])


def run(splits, pool, folder, *, config=CONFIG, loop=LOOP, seed=0):
    return semi.pseudo_label_loop(network(seed), to_tensors(splits.train, 32), pool, config, loop, folder,
                                  ids=splits.train.ids)


@pytest.fixture(scope="module")
def whole(splits, pool, tmp_path_factory):
    """A loop that nobody disturbed: its result, the hash of its weights, its folder (not to be touched)."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(splits, pool, folder)
    return result, weights_hash(result.model), folder


# --- dealing ----------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(0, 10**6), st.data())
def test_every_slice_is_dealt_once_into_groups_of_nearly_equal_size(n, seed, data):
    rounds = data.draw(st.integers(1, n))
    groups = semi.deal_groups(n, rounds, seed)
    assert sorted(k for group in groups for k in group) == list(range(n)) and len(groups) == rounds
    assert max(map(len, groups)) - min(map(len, groups)) <= 1 and groups == semi.deal_groups(n, rounds, seed)


@pytest.mark.parametrize("n, rounds", [(0, 1), (0, 0), (3, 4), (3, 0), (3, -1)])
def test_what_cannot_be_dealt_is_refused(n, rounds):
    with pytest.raises(ConfigError, match="at least one unlabelled slice"):
        semi.deal_groups(n, rounds, 0)


# --- maps and labels --------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99), st.floats(0.1, 20), st.floats(-20, 20))
def test_the_stretch_keeps_the_order_of_pixels_and_forgets_shift_and_scale_of_the_probability(n, batch, seed,
                                                                                              scale, shift):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, 1, 32, 32, generator=generator) + shift
    images, config = torch.zeros(n, 1, 32, 32, dtype=torch.uint8), replace(CONFIG, batch_size=n)
    maps = semi.soft_maps(Says(logits), images, config)
    plain = semi.soft_maps(Says(logits), images, config, min_max=False)
    for one, other, logit in zip(maps, plain, logits, strict=True):
        order = logit.ravel().argsort()
        for each in (one, other):
            assert (each.ravel()[order].int().diff() >= 0).all()
        if torch.sigmoid(logit).max() - torch.sigmoid(logit).min() > 1e-6:
            assert one.min() == 0 and one.max() == 255
    assert torch.equal(semi.labels_of(plain) == 1, torch.sigmoid(logits) >= 0.5)


def test_the_size_of_the_batches_changes_no_label():
    model = network()
    images = torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8)
    whole, pieces = (semi.labels_of(semi.soft_maps(model, images, replace(CONFIG, batch_size=size)))
                     for size in (5, 2))
    assert (whole != pieces).float().mean() < 1e-3 and not model.training


def test_asking_for_maps_leaves_a_network_that_can_still_learn():
    model, images = network(), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    semi.soft_maps(model, images, CONFIG)
    model.train()(torch.rand(2, 1, 32, 32)).s_3.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("min_max", [True, False])
def test_no_labels_from_a_network_that_gives_no_numbers(min_max):
    logits = torch.zeros(2, 1, 32, 32)
    logits[1, 0, 3, 3] = float("nan")  # one pixel is enough
    with pytest.raises(NonFiniteError, match="gives no numbers"):
        semi.soft_maps(Says(logits), torch.zeros(2, 1, 32, 32, dtype=torch.uint8), CONFIG, min_max=min_max)


# --- the loop ---------------------------------------------------------------------------------------------

def test_two_runs_are_equal_in_every_bit_and_another_seed_differs(splits, pool, tmp_path, whole):
    first, weights, _ = whole
    second = run(splits, pool, tmp_path / "b")
    assert torch.equal(first.pool.labels, second.pool.labels) and weights_hash(second.model) == weights
    for name, history in first.histories.items():
        assert history.equals(second.histories[name])
    other = run(splits, pool, tmp_path / "c", config=replace(CONFIG, seed=1))
    assert weights_hash(other.model) != weights


def test_the_loop_sees_training_slices_and_the_pool_and_nothing_else(splits, pool, tmp_path, monkeypatch):
    """What `fit` gets are training slices and the pool, in the right order, and never a validation set."""
    calls, true_fit = [], semi.fit

    def watch(model, train, val, config, folder, **options):
        calls.append((train, val, config))
        return true_fit(model, train, val, config, folder, **options)

    monkeypatch.setattr(semi, "fit", watch)
    result = semi.label_pool("loop", network(), to_tensors(splits.train, 32), pool, CONFIG, LOOP, tmp_path)
    semi.train_phase_one(network(), result.pool, CONFIG, tmp_path)

    def keys(images):
        return [image.numpy().tobytes() for image in images]
    mine, unlabelled = keys(to_tensors(splits.train, 32)[0]), keys(pool.images)
    forbidden = {*keys(to_tensors(splits.val, 32)[0]), *keys(to_tensors(splits.test, 32)[0])}
    groups = semi.deal_groups(7, 3, CONFIG.seed)
    joined = [mine + [unlabelled[k] for group in groups[:r] for k in group] for r in (1, 2, 3)]
    expected = [mine, *joined, unlabelled]
    assert [keys(train[0]) for train, _, _ in calls] == expected
    assert all(val is None and config.monitor == "last" for _, val, config in calls)
    assert not forbidden & {key for train, _, _ in calls for key in keys(train[0])}
    assert torch.equal(calls[3][0][1][:4], to_tensors(splits.train, 32)[1])  # true labels stay as they are


def test_labels_come_from_the_snapshot_before_and_are_kept(pool, whole):
    (result, weights, folder), model = whole, network()
    groups = semi.deal_groups(7, 3, CONFIG.seed)
    for number, group in enumerate(groups, 1):
        now = semi.labels_of(semi.soft_maps(model, pool.images[group], CONFIG))
        assert torch.equal(now, result.pool.labels[group])
        model.load_state_dict(load_checkpoint(folder / f"round-{number:03d}/snapshot.pt")["weights"])
    assert weights_hash(model) == weights


def test_labels_that_the_pool_has_are_not_looked_at(splits, pool, tmp_path, whole):
    assert weights_hash(run(splits, pool._replace(labels=None), tmp_path).model) == whole[1]


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_stopped_loop_goes_on_to_the_same_end_and_does_nothing_twice(splits, pool, tmp_path, monkeypatch,
                                                                       stop_at, whole):
    true_fit, count = semi.fit, []

    def stop(*args, **options):
        count.append(1)
        if len(count) == stop_at:
            raise TrainingInterrupted(15)
        return true_fit(*args, **options)

    monkeypatch.setattr(semi, "fit", stop)
    with pytest.raises(TrainingInterrupted):
        run(splits, pool, tmp_path / "stopped")
    again = run(splits, pool, tmp_path / "stopped")
    assert len(count) == stop_at + LOOP.rounds - (stop_at - 1)  # finished rounds are not trained again
    assert torch.equal(again.pool.labels, whole[0].pool.labels) and weights_hash(again.model) == whole[1]
    assert not list((tmp_path / "stopped").rglob("fit"))
    run(splits, pool, tmp_path / "stopped")
    assert len(count) == stop_at + LOOP.rounds - (stop_at - 1)


def test_a_killed_process_leaves_what_another_can_go_on_from(splits, pool, tmp_path, whole):
    """The process kills itself (signal 9) when the second round has given its labels and not yet trained."""
    code = f"""
import os, signal
from covidsev.method import semi
import sys; sys.path.insert(0, "tests/method"); sys.path.insert(0, "tests"); from test_semi import *
true_fit = semi.fit
def fit(*args, **options):
    if "round-002" in str(args[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return true_fit(*args, **options)
semi.fit = fit
slices = load_splits("phantom", size=32, n_train=4, n_test=3, val_slices=3)
run(slices, semi.load_pool("phantom", 32, 7), {str(tmp_path / "k")!r})
"""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "COVIDSEV_QUIET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=False)
    assert killed.returncode == -9 and (tmp_path / "k/round-002/labels.pt").exists()
    assert not (tmp_path / "k/round-002/snapshot.pt").exists()
    again = run(splits, pool, tmp_path / "k")
    assert torch.equal(again.pool.labels, whole[0].pool.labels) and weights_hash(again.model) == whole[1]


def test_rounds_of_another_loop_are_refused_with_the_difference(splits, pool, whole):
    tmp_path = whole[2]  # refused before anything is written
    other = pool._replace(images=pool.images.flip(-1))
    for arguments, words in [({"config": replace(CONFIG, learning_rate=1e-3)}, "config.learning_rate: 0.002"),
                             ({"loop": LOOP._replace(min_max=False)}, "loop.min_max: True -> False"),
                             ({"seed": 1}, "first weights")]:
        with pytest.raises(ConfigError, match=words):
            run(splits, pool, tmp_path, **arguments)
    with pytest.raises(ConfigError, match="unlabelled data"):
        run(splits, other, tmp_path)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match="threads: 1 -> 2"):
            semi.pseudo_label_loop(SegNet("small", width=0.5), to_tensors(splits.train, 32), pool, CONFIG,
                                   LOOP, tmp_path)
    finally:
        torch.set_num_threads(1)


def test_a_damaged_round_is_named_and_a_folder_in_use_is_not_touched(splits, pool, tmp_path, whole):
    shutil.copytree(whole[2], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "round-002" / "snapshot.pt"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="damaged"):
        run(splits, pool, tmp_path)
    with run_lock(tmp_path / "busy"), pytest.raises(RunLockedError):
        run(splits, pool, tmp_path / "busy")
    assert not list((tmp_path / "busy").rglob("*.pt"))


def test_without_an_unlabelled_slice_there_is_no_loop_and_no_phase_one(splits, pool, tmp_path):
    nothing = PseudoSet(pool.images[:0], pool.labels[:0], [])
    before = weights_hash(network())
    model = network()
    with pytest.raises(ConfigError, match="at least one unlabelled slice"):
        semi.pseudo_label_loop(model, to_tensors(splits.train, 32), nothing, CONFIG, LOOP, tmp_path / "loop")
    with pytest.raises(ConfigError, match="phase 1 needs pseudo labels"):
        semi.train_phase_one(model, nothing, CONFIG, tmp_path)
    with pytest.raises(ConfigError, match="phase 1 needs pseudo labels"):
        semi.train_phase_one(model, pool._replace(labels=None), CONFIG, tmp_path)
    assert weights_hash(model) == before and not list(tmp_path.rglob("*.pt"))


def test_a_group_of_one_and_a_batch_of_one_work(splits, pool, tmp_path):
    one = PseudoSet(pool.images[:1], None, pool.ids[:1])
    result = run(splits, one, tmp_path, loop=LOOP._replace(rounds=1), config=replace(CONFIG, batch_size=1))
    assert result.pool.labels.shape == (1, 1, 32, 32)
    with pytest.raises(ConfigError, match="at least 2"):  # batch normalisation
        semi.train_phase_one(network(), result.pool, CONFIG, tmp_path)


@pytest.mark.parametrize("labels, error", [(torch.full((4, 1, 32, 32), 3, dtype=torch.uint8), MaskError),
                                           (torch.zeros(4, 1, 16, 32, dtype=torch.uint8), ConfigError),
                                           (torch.zeros(4, 1, 32, 32), ConfigError)])
def test_labels_that_are_none_are_refused_before_training(pool, labels, error, tmp_path):
    with pytest.raises(error):
        semi.train_phase_one(network(), PseudoSet(pool.images[:4], labels, pool.ids[:4]), CONFIG, tmp_path)


# --- leaks, sources, start --------------------------------------------------------------------------------

def test_a_test_slice_in_the_pool_is_a_leak(splits, pool):
    semi.check_unseen(pool, **splits._asdict())
    test, val = to_tensors(splits.test, 32)[0], to_tensors(splits.val, 32)[0]
    stolen = torch.cat([pool.images[:2], test[1:2], val[:1]])
    with pytest.raises(LeakageError) as caught:
        semi.check_unseen(PseudoSet(stolen, None, ["x", "y", "b", "c"]), **splits._asdict())
    assert "b is test test-001" in str(caught.value) and "c is val val-000" in str(caught.value)


def test_real_pools_without_labels_serve_the_loop_and_not_the_release(tmp_path, splits, pool):
    from PIL import Image

    folder = tmp_path / "TrainingSet/LungInfection-Train/Pseudo-label/Imgs"
    folder.mkdir(parents=True)
    for k, image in enumerate(pool.images[:3, 0].numpy()):
        name = f"Data-1_coronacases_org_001_{k}.png"
        Image.fromarray(np.kron(image, np.ones((2, 2), np.uint8))).save(folder / name)
    bare = semi.load_pool("covid-semiseg", 32, 0, root=tmp_path)
    assert bare.labels is None and len(bare.ids) == 3
    with pytest.raises(DataMissingError, match="no pseudo labels"):
        semi.label_pool("released", network(), to_tensors(splits.train, 32), bare, CONFIG, LOOP, tmp_path)
    with pytest.raises(DataMissingError):
        semi.load_pool("covid-semiseg", 32, 0, root=folder)
    with pytest.raises(ConfigError, match="0 .all. to 3"):
        semi.load_pool("covid-semiseg", 32, 4, root=tmp_path)


def test_a_start_from_another_network_is_refused_and_from_none_is_named(splits, pool, tmp_path):
    labelled = to_tensors(splits.train, 32)
    save_checkpoint(tmp_path / "best.pt", {"weights": SegNet("small", width=1).state_dict()})
    for file in (tmp_path / "best.pt", tmp_path / "nowhere.pt"):
        with pytest.raises(CheckpointError):
            semi.label_pool("loop", network(), labelled, pool, CONFIG, LOOP, tmp_path / "out", start=file)
    assert not (tmp_path / "out").exists()


def test_the_start_file_gives_every_weight_back(splits, pool, tmp_path):
    trained = semi.train_phase_one(network(), pool, CONFIG, tmp_path)
    fresh = network(9)
    report = runs.start_from(fresh, semi.save_start(tmp_path, trained.model))
    assert weights_hash(fresh) == weights_hash(trained.model)
    assert report.fresh == () and len(report.loaded) == len(fresh.state_dict())
    with pytest.raises(CheckpointError):
        runs.start_from(SegNet("small", width=1), tmp_path / "start.pt")


def test_what_a_run_writes_has_no_places_and_no_times(splits, pool, tmp_path):
    phase_1 = semi.train_phase_one(network(), pool, CONFIG, tmp_path)
    facts = semi.run_facts("released", "", pool, to_tensors(splits.train, 32), phase_1.model)
    for name in "ab":
        semi.save_pseudo_run(tmp_path / name, {"data": "phantom", "rounds": 1}, semi.label_metrics(pool, pool.labels, phase_1),
                             semi.join_histories({"phase_1": phase_1.history}), **facts)
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [path.name for path in files[0]] == ["history.csv", "metrics.csv", "run.json"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    record = json.loads(files[0][2].read_text(encoding="utf-8"))
    assert record["data"]["kind"] == "phantom" and record["source"] == "released" and str(tmp_path) not in json.dumps(record)
    table = (tmp_path / "a/metrics.csv").read_text(encoding="utf-8")
    assert table.startswith("metric,value,n\n") and "dice_with_released,1.0,7" in table


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_agreement_is_a_dice(seed, n, p, q):
    draw = np.random.default_rng(seed)
    first, second = (torch.from_numpy(draw.random((n, 1, 6, 6)) < share).byte() for share in (p, q))
    forth, back = semi.agreement(first, second), semi.agreement(second, first)
    assert torch.equal(forth, back) and ((0 <= forth) & (forth <= 1)).all()
    assert (semi.agreement(first, first) == 1).all()
    assert (forth[(first != second).flatten(1).any(1)] < 1).all()


def test_an_unlabelled_slice_set_is_never_a_slice_set(pool):
    """A pool has no groups and no classes: nothing that scores or splits takes it by mistake."""
    assert not isinstance(pool, SliceSet) and not hasattr(pool, "groups")
