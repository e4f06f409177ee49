"""What a run starts from: what a pretext sees and hands over, priors that leak nothing, pseudo labels; stops and faults."""
import os
import pickle
import signal
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from covidsev.core import (CheckpointError, ConfigError, DataMissingError, GeometryError,
                           LeakageError)
from covidsev.data.datasets import KNOWN_SHARED_GROUPS, Splits, group_folds, to_tensors
from covidsev.method import training
from covidsev.method.coach import Pretext
from covidsev.method.training import (TrainingInterrupted, load_checkpoint, run_to_end,
                                      save_checkpoint, weights_hash)
from covidsev.paper import starts
from covidsev.paper.runs import build_started, load_run_data, start_from
from covidsev.paper.starts import (PriorRun, SplitPriors, build_players, game_identity,
                                   image_hashes, label_pool, load_pool, load_pretext_images,
                                   load_priors, pretext_metrics, pretrain_network, read_priors,
                                   save_priors, start_game, train_priors)

from tiny import tiny_backbone


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_backbone():
        yield


SHARED = {"profile": "smoke", "seed": 0, "data": "phantom", "size": 64, "n_train": 8, "n_test": 4, "n_unlabelled": 8,
          "init": "scratch", "form": "small", "batch_size": 4, "learning_rate": 2e-3, "precision": "float32", "save_every": 1,
          "device": "cpu", "threads": 1, "results": "", "data_root": "", "start": ""}
BASE = SHARED | {"row": "infnet_coach", "model": "infnet", "backbone": "tiny", "heads": "linear", "task": "inpainting", "masks": "coach",
                 "images": "labelled", "images_per_epoch": 0, "priors": "", "warmup_epochs": 1, "rounds": 1, "coach_epochs": 1,
                 "network_epochs": 1, "later_rate": 0.5, "coach_learning_rate": 2e-3, "coach_backbone": "tiny", "augment": "paper"}
FIRST = SHARED | {"row": "unet", "size": 32, "model": "unet", "backbone": "small", "n_folds": 2, "epochs": 2, "augment": "paper"}
SEMI = SHARED | {"row": "loop", "size": 32, "model": "segnet", "backbone": "small", "source": "loop", "rounds": 2, "epochs_per_round": 1,
                 "round_learning_rate": 1e-3, "epochs": 2, "n_train": 4, "n_unlabelled": 6}


def placed(settings: dict, folder: Path, **changes) -> dict:
    return settings | {"output": str(folder / "output"), "checkpoints": str(folder / "checkpoints"), **changes}


@lru_cache
def training_images(n: int) -> starts.PretextImages:
    """The images of `BASE` with `n` training slices, made once."""
    return load_pretext_images({**BASE, "n_train": n})


def new_game(settings=BASE, kind=None) -> Pretext:
    game = start_game(settings, build_players(settings), training_images(settings["n_train"]))
    game.__class__ = kind or game.__class__
    return game


def play(game: Pretext, folder: Path, **options) -> Pretext:
    run_to_end(game, folder, game_identity(BASE, game), save_every=1, **options)
    return game


def bits(game: Pretext) -> list:
    result = game.result()
    return [weights_hash(game.network), weights_hash(game.coach), result.history.to_csv(), result.masks.numpy().tobytes()]


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory) -> list:
    return bits(play(new_game(), tmp_path_factory.mktemp("whole")))


# what a pretext sees

@pytest.mark.parametrize("images", ["labelled", "unlabelled"])
def test_test_slices_are_never_seen(images):
    found, splits = load_pretext_images({**BASE, "images": images, "n_train": 10}), load_run_data({**BASE, "n_train": 10})
    assert not set(image_hashes(to_tensors(splits.test, 64)[0])) & set(image_hashes(found.tensor))
    assert found.ids[:10] == splits.train.ids and found.labelled == 10 and not set(splits.test.ids) & set(found.ids)
    assert len(found.tensor) == len(set(found.ids)) == (10 if images == "labelled" else 18)
    assert set(image_hashes(found.watched)) <= set(image_hashes(found.tensor[:10]))  # the same ones in both arms


def test_a_test_slice_in_the_pool_stops_the_run(monkeypatch):
    stolen = to_tensors(load_run_data(BASE).test.subset([3]), 64)
    monkeypatch.setattr(starts, "phantom_pseudo_labels", lambda n, size: (*stolen, ["pool-000"]))
    with pytest.raises(LeakageError, match="test test-003 = pool-000"):
        load_pretext_images({**BASE, "images": "unlabelled"})


def test_real_slices_that_are_not_there_are_named(tmp_path):
    for read in (load_pretext_images, load_pool):
        with pytest.raises(DataMissingError, match="covidsev data get"):
            read({**BASE, "data": "covid-semiseg", "data_root": str(tmp_path)})


def test_the_pool_of_the_real_data_is_disjoint_from_the_test_slices(data_root):
    real = {**BASE, "data": "covid-semiseg", "data_root": str(data_root), "n_train": None, "n_test": None, "images": "unlabelled"}
    found = load_pretext_images({**real, "n_unlabelled": 20})
    assert (found.labelled, len(found.tensor), found.source.kind) == (50, 70, "real") and found.stored is not None
    pool = load_pool({**real, "n_unlabelled": 20})
    assert pool.labels.shape == pool.images.shape and pool.ids == found.ids[50:]


# the loop drives a pretext: exact resume, signals, faults

class StopsAt(Pretext):
    """Sends a signal to its own process before the batch number `at`."""

    at, number = -1, signal.SIGTERM

    def learn(self, x, phase):
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), self.number)
        return super().learn(x, phase)


@pytest.mark.parametrize("at, number, code, damage", [(1, signal.SIGTERM, 143, False), (4, signal.SIGINT, 130, True)])
def test_a_signal_saves_in_the_middle_and_the_resumed_run_has_the_same_bits(tmp_path, expected, at, number, code, damage):
    game = new_game(kind=StopsAt)
    game.at, game.number = at, number
    with pytest.raises(TrainingInterrupted) as stopped:
        play(game, tmp_path)
    state = load_checkpoint(tmp_path / "last.pt")
    assert stopped.value.code == code and 2 * state["epoch"] + state["batch"] == at  # the present batch was finished
    if damage:
        (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-9])
        with pytest.warns(UserWarning, match="prev.pt"):
            assert bits(play(new_game(), tmp_path)) == expected
    else:
        assert bits(play(new_game(), tmp_path, resume="must")) == expected


@pytest.mark.parametrize("changed, line", [({"learning_rate": 0.5}, "learning_rate: 0.002 -> 0.5"), ({"n_train": 10}, "images: "),
                                           ({"seed": 1}, "setting seed: 0 -> 1"), ({"masks": "random"}, "setting masks: coach -> random")])
def test_another_run_is_not_gone_on_with(tmp_path, changed, line):
    play(new_game(), tmp_path)
    other, settings = new_game({**BASE, **changed}), {**BASE, **changed}
    before = weights_hash(other.network)
    with pytest.raises(ConfigError, match=line):
        run_to_end(other, tmp_path, game_identity(settings, other))
    assert weights_hash(other.network) == before
    same = {**BASE, "save_every": 9, "output": "/elsewhere", "data_root": "/other"}  # no matter where files lie
    assert game_identity(same, other) == game_identity(BASE, other)


# what a pretext hands over

LAST = ["decoder.head", "attention_5.head", "attention_4.head", "attention_3.head", "edge_attention.head"]
HANDED_OVER = {"infnet": ({}, LAST), "as_published": ({"heads": "as_published"}, LAST),
               "segnet": ({"model": "segnet", "backbone": "small", "masks": "random"}, ["head"]),
               "rotation": ({"task": "rotation", "masks": "none", "augment": "none"},
                            ["rfb_3", "rfb_4", "rfb_5", "decoder", "edge_attention", "attention_5",
                             "attention_4", "attention_3"])}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_the_start_file_holds_all_but_the_fresh_layers(tmp_path, name):
    changed, fresh = HANDED_OVER[name]
    settings = placed(BASE, tmp_path, warmup_epochs=2, rounds=0, **changed)
    run = pretrain_network(settings, training_images(8))
    assert (run.steps, run.coach_steps, run.draws) == (4, 0, 16)
    state, (network, _) = load_checkpoint(tmp_path / "checkpoints" / "start.pt"), build_started(settings)
    assert sorted(state["layers_fresh"]) == sorted(fresh)
    under = tuple(f"{layer}." for layer in fresh)
    assert set(state["weights"]) == {key for key in network.state_dict() if not key.startswith(under)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report, after = start_from(network, tmp_path / "checkpoints" / "start.pt"), network.state_dict()
    assert all(torch.equal(after[key], state["weights"][key]) for key in report.loaded)
    assert all(torch.equal(after[key], before[key]) for key in report.fresh)
    assert any(not torch.equal(after[key], before[key]) for key in report.loaded)  # it is not the fresh network of that seed


@pytest.mark.parametrize("changed, message", [
    ({"model": "infnett"}, "did you mean 'infnet'"), ({"task": "rotations"}, "did you mean 'rotation'"),
    ({"model": "unet", "backbone": "small", "heads": "as_published"}, "heads of unet"),
    ({"model": "unet", "backbone": "small", "task": "rotation", "masks": "none"}, "model of the rotation pretext"),
    ({"model": "multi", "images": "unlabelled"}, "the pool has no priors"), ({"model": "multi"}, "priors"),
    ({"images": "unlabeled"}, "did you mean 'unlabelled'"), ({"masks": "none"}, "masks"),
    ({"batch_size": 9}, "batch_size"), ({"size": 60}, "multiple"), ({"device": "tpu"}, "device")])
def test_settings_that_cannot_work_stop_before_the_first_step(tmp_path, changed, message):
    settings = placed(BASE, tmp_path, **changed)
    with pytest.raises((ConfigError, ValueError), match=message):
        pretrain_network(settings, load_pretext_images(settings))
    assert not list(tmp_path.rglob("*.pt"))


def test_the_coach_is_measured_after_each_of_its_turns(tmp_path):
    run = pretrain_network(placed(BASE, tmp_path, warmup_epochs=2, rounds=2), training_images(8))
    history = run.result.history
    history["rec_random"], history["rec_coach"] = 1.0, [1.0, 1.05, 1.3, 1.2, 1.4, 1.1]
    value = pretext_metrics(run).set_index("metric")["value"]
    assert value["ratio_untrained"] == 1.05 and value["ratio_after_turns_lowest"] == 1.3 and value["ratio_last"] == 1.1
    alone = pretrain_network(placed(BASE, tmp_path / "random", masks="random"), training_images(8))
    metrics = pretext_metrics(alone)
    assert metrics.value.notna().all() and not {"rec_coach", "ratio_last"} & set(metrics.metric)


# priors

@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_run_data(FIRST)


def constant_run(splits: Splits, n_folds: int = 2) -> PriorRun:
    """A first stage that knows nothing: the same map everywhere; right folds."""
    maps = [[np.full(image.shape, 0.4, np.float32) for image in part.images] for part in (splits.train, splits.test)]
    return PriorRun(splits, group_folds(splits.train, n_folds), SplitPriors(*maps), {})


@pytest.fixture()
def file(splits, tmp_path) -> Path:
    save_priors(tmp_path / "priors.npz", constant_run(splits))
    return tmp_path / "priors.npz"


def test_stopped_by_a_signal_in_the_second_fold_and_resumed(splits, tmp_path, monkeypatch):
    """A checkpoint, an error that says so, and the same bits as a run that was never stopped; what is written is read."""
    whole, steps, step = train_priors(placed(FIRST, tmp_path / "whole"), splits), [], training.train_step
    here = placed(FIRST, tmp_path / "stopped")

    def interrupted(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:  # each fold has one batch of four slices, two epochs: this is fold 1, epoch 2
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(TrainingInterrupted):
        train_priors(here, splits)
    assert len(steps) == 4 and not (tmp_path / "stopped" / "checkpoints" / "all").exists()
    resumed = train_priors(here, splits)
    assert len(steps) == 4 + 4  # nothing is trained twice: only the two epochs of two batches of the last network
    save_priors(tmp_path / "priors.npz", resumed)
    for maps in (resumed.priors, read_priors(tmp_path / "priors.npz", splits)):
        assert all(np.array_equal(a, b) for pair in zip(whole.priors, maps) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: b"<html>not found</html>",
                                    lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:]],
                         ids=["empty", "no tail", "html", "one bit"])
def test_a_damaged_file(splits, file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        read_priors(file, splits)


def test_a_file_of_something_else_or_one_that_would_run_code(splits, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "priors.npz"
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_priors(path, splits)

    class Trap:
        def __reduce__(self):
            return Path.touch, (canary,)

    np.savez(path, **{"train/0": np.zeros((32, 32), np.uint8)})
    traps = [path.read_bytes(), pickle.dumps(Trap())]
    np.savez(path, about=np.array([Trap()], dtype=object))
    canary.unlink(missing_ok=True)  # saving may not call it; reading must not
    for content in [path.read_bytes(), *traps]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_priors(path, splits)
    assert not canary.exists()


def changed(part, **fields):
    other = part.subset(range(len(part)))
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def test_priors_of_a_slice_without_one_or_of_another_size(splits, file, tmp_path):
    with pytest.raises(ConfigError, match="no prior for test/test-004"):
        read_priors(file, load_run_data({**FIRST, "n_test": 6}))
    run = constant_run(splits)
    save_priors(tmp_path / "half.npz", run._replace(priors=run.priors._replace(test=[one[::2, ::2] for one in run.priors.test])))
    with pytest.raises(GeometryError, match=r"uint8 \(16, 16\)"):
        read_priors(tmp_path / "half.npz", splits)


def test_priors_from_a_network_that_saw_the_scan_or_the_truth(splits, file, tmp_path):
    test, run = splits.test.subset(range(len(splits.test))), constant_run(splits)
    test.groups = [splits.test.groups[0], splits.train.groups[3], *splits.test.groups[2:]]
    with pytest.raises(LeakageError, match=test.ids[1]):
        read_priors(file, splits._replace(test=test))
    truth = [splits.train.infection(k).astype(np.float32) for k in range(8)]
    save_priors(tmp_path / "truth.npz", run._replace(priors=run.priors._replace(train=truth)))
    with pytest.raises(LeakageError, match="the priors are the ground truth"):
        read_priors(tmp_path / "truth.npz", splits)


def test_the_real_scans_that_are_known_to_be_shared(data_root, tmp_path):
    real = load_run_data({**FIRST, "data": "covid-semiseg", "data_root": str(data_root), "n_train": None, "n_test": None})
    save_priors(tmp_path / "priors.npz", constant_run(real, 5))
    assert [len(each) for each in read_priors(tmp_path / "priors.npz", real)] == [50, 48]
    assert {*real.train.groups} & {*real.test.groups} <= {*KNOWN_SHARED_GROUPS}
    assert len(read_priors(tmp_path / "priors.npz", real._replace(train=real.train.subset(range(20)))).train) == 20


def test_both_stages_read_the_priors_of_their_own_seed_and_check_them(splits, tmp_path, monkeypatch):
    """The second stage and the multi-class pretext: one run of priors a seed, the image and the fold are checked."""
    folder, asked = tmp_path / "priors", []
    folder.mkdir()
    save_priors(folder / "priors.npz", constant_run(splits))
    monkeypatch.setattr(starts, "checkpoint_of", lambda settings, *names: asked.append(names) or folder / "priors.npz")
    settings = placed(BASE, tmp_path, model="multi", size=32, priors="priors/infnet", seed=2, prior="ground_truth")
    given = load_priors(settings, splits)
    assert asked == [("priors/infnet-seed2", "priors.npz")]
    assert all(np.array_equal(one, splits.train.infection(k)) for k, one in enumerate(given.train)) and given.test[0].max() < 0.5
    images = load_pretext_images({**settings, "prior": "predicted"})
    assert images.tensor.shape == (8, 2, 32, 32) and set(images.tensor[:, 1].unique().tolist()) == {102}
    run = constant_run(splits)
    save_priors(folder / "priors.npz", run._replace(folds=np.arange(8) % 2))
    with pytest.raises(LeakageError, match="saw the slice or its scan"):
        load_pretext_images({**settings, "prior": "predicted"})
    with pytest.raises(ConfigError, match="no run is named"):
        load_priors({**settings, "priors": ""}, splits)


# pseudo labels


def test_a_pool_without_labels_serves_the_loop(tmp_path):
    from PIL import Image

    folder = tmp_path / "TrainingSet/LungInfection-Train/Pseudo-label/Imgs"
    folder.mkdir(parents=True)
    for k, image in enumerate(load_pool(SEMI).images[:3, 0].numpy()):
        Image.fromarray(np.kron(image, np.ones((2, 2), np.uint8))).save(folder / f"Data-1_coronacases_org_001_{k}.png")
    bare = load_pool({**SEMI, "data": "covid-semiseg", "data_root": str(tmp_path), "n_unlabelled": None})
    assert bare.labels is None and len(bare.ids) == 3


def test_a_teacher_that_is_no_network_of_this_kind_is_refused(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", {"weights": build_started(SEMI | {"model": "unet"})[0].state_dict()})
    monkeypatch.setattr(starts, "checkpoint_of", lambda *names: tmp_path / "last.pt")
    with pytest.raises(CheckpointError):
        label_pool(placed(SEMI, tmp_path / "x", start="train_single/unet"), load_run_data(SEMI), load_pool(SEMI))
    assert not (tmp_path / "x" / "checkpoints" / "rounds").exists()
