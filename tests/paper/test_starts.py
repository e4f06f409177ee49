"""Pretext runs: what they see, that they resume with the same bits, what they hand over, and what they refuse."""
import json
import multiprocessing
import os
import signal
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from covidsev.paper import starts as pretext_runs
from covidsev.paper import runs
from covidsev.method.coach import Pretext, RotationNet
from covidsev.method.inpainting import InpaintingNet
from covidsev.core import CheckpointError, ConfigError, DataMissingError, LeakageError, NonFiniteError, RunLockedError
from covidsev.method.unets import build_network
from covidsev.data.datasets import load_splits, to_tensors
from covidsev.method.unets import MultiClassUNet
from covidsev.paper.starts import (build_players, check_unseen, game_identity, harder_than_random, image_hashes, load_pretext_images,
                                   pretext_run, pretrain, pretrain_network, start_game)
from covidsev.core import run_lock
from covidsev.method.training import TrainingInterrupted, load_checkpoint, weights_hash

from tiny import tiny_backbone


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_backbone():
        yield


BASE = {"profile": "smoke", "row": "infnet_coach", "seed": 0, "data": "phantom", "size": 64, "n_train": 8, "n_test": 4, "val_slices": 4, "split_seed": 0,
        "model": "infnet", "backbone": "tiny", "init": "scratch", "form": "small", "variant": "linear", "task": "inpainting",
        "masks": "coach", "images": "labelled", "n_unlabelled": 8, "images_per_epoch": 0, "priors": "", "warmup_epochs": 1, "rounds": 1,
        "coach_epochs": 1, "network_epochs": 1, "keep": 0.75, "batch_size": 4, "learning_rate": 2e-3, "later_rate": 0.5,
        "coach_learning_rate": 2e-3, "coach_backbone": "tiny", "augment": "paper", "save_every": 1, "device": "cpu", "threads": 1,
        "results": "", "data_root": ""}


@pytest.fixture
def base(tmp_path) -> dict:
    return {**BASE, "output": str(tmp_path / "output"), "checkpoints": str(tmp_path / "checkpoints")}


@lru_cache
def training_images(n: int) -> pretext_runs.PretextImages:
    """The images of `BASE` with `n` training slices, made once."""
    return load_pretext_images({**BASE, "n_train": n})


def play(game: Pretext, folder: Path, **options) -> None:
    """The game to its end, with a checkpoint after every epoch."""
    pretrain(game, folder, game_identity(BASE, game), save_every=1, **options)


def new_game(settings=BASE, kind=Pretext) -> Pretext:
    images, players = training_images(settings["n_train"]), build_players(settings)
    return kind(players.pretext, images.tensor, pretext_runs.pretext_config(settings), players.coach, watched=images.watched, ids=images.ids)


def bits(game: Pretext) -> list:
    """All that a finished game leaves, to compare."""
    result = game.result()
    return [weights_hash(game.network), weights_hash(game.coach), result.history.to_csv(), result.masks.numpy().tobytes()]


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory) -> list:
    game = new_game()
    play(game, tmp_path_factory.mktemp("whole"))
    return bits(game)


# what a pretext sees

@pytest.mark.parametrize("images", ["labelled", "unlabelled"])
def test_validation_and_test_slices_are_never_seen(images):
    settings = {**BASE, "images": images, "n_train": 10}
    found, splits = load_pretext_images(settings), load_splits("phantom", size=64, n_train=10, val_slices=4, n_test=4)
    for part in (splits.val, splits.test):
        assert not set(image_hashes(to_tensors(part, 64)[0])) & set(image_hashes(found.tensor))
        assert not set(part.ids) & set(found.ids)
    assert found.ids[:10] == splits.train.ids and found.labelled == 10
    assert len(found.tensor) == len(set(found.ids)) == (10 if images == "labelled" else 18)
    assert set(image_hashes(found.watched)) <= set(image_hashes(found.tensor[:10]))  # watched: training slices, of both arms the same


def test_held_out_slices_are_refused_by_content_and_by_name():
    splits = load_splits("phantom", size=64, n_train=8, val_slices=4, n_test=2)
    train = to_tensors(splits.train, 64)[0]
    with pytest.raises(LeakageError, match="val val-002 = renamed"):
        check_unseen(torch.cat([train, to_tensors(splits.val, 64)[0][2:3]]), [*splits.train.ids, "renamed"], {"val": splits.val})
    with pytest.raises(LeakageError, match="test test-000"):
        check_unseen(train, ["test-000", *splits.train.ids[1:]], {"test": splits.test})
    check_unseen(train, splits.train.ids, {"val": splits.val, "test": splits.test, "none": splits.test.subset([])})


def test_a_test_slice_in_the_pool_stops_the_run(monkeypatch):
    test = load_splits("phantom", size=64, n_train=8, val_slices=4).test

    def leaking(n, size, seed):
        return to_tensors(test.subset([3]), size)[0], ["pool-000"]

    monkeypatch.setattr(pretext_runs, "phantom_pool", leaking)
    with pytest.raises(LeakageError, match="test test-003 = pool-000"):
        load_pretext_images({**BASE, "images": "unlabelled"})


def test_real_slices_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataMissingError, match="covidsev data get"):
        load_pretext_images({**BASE, "data": "covid-semiseg", "data_root": str(tmp_path)})


def test_the_pool_of_the_real_data_is_disjoint_from_validation_and_test(data_root):
    settings = {**BASE, "data": "covid-semiseg", "data_root": str(data_root), "n_train": None, "images": "unlabelled", "n_unlabelled": 20}
    found = load_pretext_images(settings)
    assert (found.labelled, len(found.tensor), found.kind) == (46, 66, "real")
    card = pretext_runs.data_card(found).set_index("images")
    assert card.loc["unlabelled, as stored", "dark"] > 0.4 and card.loc["unlabelled, as used", "dark"] < 0.1
    labelled, used = card.loc["labelled, outlines not read"], card.loc["unlabelled, as used"]
    assert abs(labelled["median"] - used["median"]) < abs(labelled["median"] - card.loc["unlabelled, as stored", "median"])


# the loop: exact resume, signals, lock

class StopsAt(Pretext):
    """Sends a signal to its own process before the batch number `at`."""

    at, number = -1, signal.SIGTERM

    def learn(self, x, phase):
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), self.number)
        return super().learn(x, phase)


@pytest.mark.parametrize("at, number, code", [(1, signal.SIGTERM, 143), (4, signal.SIGINT, 130)])
def test_a_signal_saves_in_the_middle_and_the_resumed_run_has_the_same_bits(tmp_path, expected, at, number, code):
    game = new_game(kind=StopsAt)
    game.at, game.number = at, number
    with pytest.raises(TrainingInterrupted) as stopped:
        play(game, tmp_path)
    assert stopped.value.code == code
    state = load_checkpoint(tmp_path / "last.pt")
    assert 2 * state["epoch"] + state["batch"] == at  # two batches an epoch: the present one was finished
    again = new_game()
    play(again, tmp_path, resume="must")
    assert bits(again) == expected


def _play_until_killed(folder: Path, at: int) -> None:
    with tiny_backbone():
        game = new_game(kind=StopsAt)
        game.at, game.number = at, signal.SIGKILL
        play(game, folder)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, expected):
    child = multiprocessing.get_context("fork").Process(target=_play_until_killed, args=(tmp_path, 5))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    game = new_game()
    play(game, tmp_path)
    assert bits(game) == expected


def test_a_damaged_last_falls_back_to_prev_with_the_same_bits(tmp_path, expected):
    game = new_game(kind=StopsAt)
    game.at = 5
    with pytest.raises(TrainingInterrupted):
        play(game, tmp_path)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    again = new_game()
    with pytest.warns(UserWarning, match="prev.pt"):
        play(again, tmp_path)
    assert bits(again) == expected


def test_resume_as_asked(tmp_path, expected):
    game = new_game()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        play(game, tmp_path, resume="must")
    play(game, tmp_path)
    finished = new_game()
    finished.learn = None  # a finished run is read: nobody learns
    play(finished, tmp_path, resume="must")
    fresh = new_game()
    play(fresh, tmp_path, resume=False)  # the checkpoint there is passed over
    assert bits(game) == bits(finished) == bits(fresh) == expected


@pytest.mark.parametrize("changed, line", [({"learning_rate": 0.5}, "learning_rate: 0.002 -> 0.5"), ({"n_train": 10}, "images: "),
                                           ({"seed": 1}, "setting seed: 0 -> 1"), ({"masks": "random"}, "setting masks: coach -> random")])
def test_another_run_is_not_gone_on_with(tmp_path, changed, line):
    game = new_game()
    play(game, tmp_path)
    settings = {**BASE, **changed}
    other = start_game(settings, build_players(settings), training_images(settings["n_train"]))
    before = weights_hash(other.network)
    with pytest.raises(ConfigError, match=line):
        pretrain(other, tmp_path, game_identity(settings, other))
    assert weights_hash(other.network) == before


def test_where_files_lie_and_how_often_they_are_written_is_no_matter():
    game = new_game()
    assert game_identity(BASE, game) == game_identity({**BASE, "save_every": 9, "output": "/elsewhere", "data_root": "/other"}, game)


def test_one_process_at_a_time(tmp_path):
    game = new_game()
    with run_lock(tmp_path), pytest.raises(RunLockedError):
        play(game, tmp_path)


def test_nan_stops_at_its_batch_names_the_slices_and_keeps_the_last_good_checkpoint(tmp_path):
    game = new_game()
    learn = game.learn

    def spoilt(x, phase):
        return learn(x * torch.nan if (game.epoch, game.batch) == (1, 1) else x, phase)

    game.learn = spoilt
    with pytest.raises(NonFiniteError, match=r"epoch 1 \(coach\), batch 1, slices train-\d"):
        play(game, tmp_path)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(value).all() for value in state["network"].values())


# the whole run

def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("history.csv", "metrics.csv", "transfer.csv", "run.json")}


def test_two_runs_leave_equal_files_and_say_nothing_of_places(base, tmp_path):
    pretext_run(base)
    again = {**base, "output": str(tmp_path / "second"), "checkpoints": str(tmp_path / "other")}
    pretext_run(again)
    first, second = files(Path(base["output"])), files(Path(again["output"]))
    assert first == second and str(tmp_path).encode() not in b"".join(first.values())
    one, two = (load_checkpoint(Path(s["checkpoints"]) / "start.pt") for s in (base, again))
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    record = json.loads(first["run.json"])
    assert record["parameters"]["masks"] == "coach" and "output" not in record["parameters"]
    assert record["data"]["n"] == 8 and len(record["data"]["sha256"]) == 64


def target(settings) -> torch.nn.Module:
    if settings["model"] == "multi":
        return MultiClassUNet("small")
    return build_network(settings["model"], settings["backbone"], "scratch")


HANDED_OVER = {
    "infnet": ({}, ["decoder.head", "attention_5.head", "attention_4.head", "attention_3.head", "edge_attention.head"]),
    "as_published": ({"variant": "as_published"}, ["decoder.head", "attention_5.head", "attention_4.head", "attention_3.head",
                                                   "edge_attention.head"]),
    "unet": ({"model": "unet", "backbone": "small", "masks": "random"}, ["head"]),
    "segnet": ({"model": "segnet", "backbone": "small", "masks": "blocks", "block_side": 8}, ["head"]),
    "rotation": ({"task": "rotation", "masks": "none", "augment": "none"},
                 ["rfb_3", "rfb_4", "rfb_5", "decoder", "edge_attention", "attention_5", "attention_4", "attention_3"]),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_the_start_file_holds_all_but_the_fresh_layers(base, name):
    changed, fresh = HANDED_OVER[name]
    settings = {**base, **changed, "warmup_epochs": 1, "rounds": 0}
    pretext_run(settings)
    state, network = load_checkpoint(Path(settings["checkpoints"]) / "start.pt"), target(settings)
    assert state["kind"] == "pretext" and sorted(state["layers_fresh"]) == sorted(fresh)
    under = tuple(f"{layer}." for layer in fresh)
    assert set(state["weights"]) == {key for key in network.state_dict() if not key.startswith(under)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = runs.start_from(network, Path(settings["checkpoints"]) / "start.pt")
    after = network.state_dict()
    assert all(torch.equal(after[key], state["weights"][key]) for key in report.loaded)
    assert all(torch.equal(after[key], before[key]) for key in report.fresh)
    learnt = [key for key, value in state["weights"].items() if key.endswith("conv.weight") and not torch.equal(value, before[key])]
    assert learnt  # it is not the fresh network of that seed


def test_the_multiclass_pretext_reads_the_priors_of_their_run(base, tmp_path):
    root = tmp_path / "checkpoints" / "smoke"
    settings = {**base, "model": "multi", "priors": "priors/infnet-seed0", "results": str(tmp_path / "results" / "smoke"), "warmup_epochs": 1,
                "rounds": 0, "checkpoints": str(root / "pretext" / "multi_coach-seed0" / "0123456789ab")}
    with pytest.raises(ConfigError, match="covidsev reproduce --profile smoke"):
        load_pretext_images(settings)
    record = Path(settings["results"]) / "priors" / "infnet-seed0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"key": "abcdefabcdefabcdef"}))
    splits = load_splits("phantom", size=64, n_train=8, val_slices=4)
    folder = root / "priors" / "infnet-seed0" / "abcdefabcdef"
    folder.mkdir(parents=True)
    maps = {f"train/{name}": np.uint8(255 * (labels > 0)) for name, labels in zip(splits.train.ids, splits.train.labels)}
    np.savez(folder / "priors.npz", **maps)
    images = load_pretext_images(settings)
    assert images.tensor.shape == (8, 2, 64, 64)
    assert torch.equal(images.tensor[:, 1], torch.from_numpy(np.stack(list(maps.values()))))  # at its own size: as it was
    pretext_run(settings)
    assert load_checkpoint(Path(settings["checkpoints"]) / "start.pt")["layers_fresh"] == ["head"]
    maps.pop("train/train-003")
    np.savez(folder / "priors.npz", **maps)
    with pytest.raises(ConfigError, match="train-003"):
        load_pretext_images(settings)


def test_who_plays():
    assert type(build_players({**BASE, "model": "unet", "backbone": "small"}).pretext) is InpaintingNet
    assert type(build_players({**BASE, "model": "multi"}).pretext) is InpaintingNet
    rotation = build_players({**BASE, "task": "rotation", "masks": "none"})
    assert type(rotation.pretext) is RotationNet and rotation.coach is None
    assert build_players({**BASE, "coach_variational": True}).coach.code is not None


@pytest.mark.parametrize("changed, message", [
    ({"model": "infnett"}, "did you mean 'infnet'"), ({"task": "rotations"}, "did you mean 'rotation'"),
    ({"model": "unet", "backbone": "small", "variant": "as_published"}, "inpainting variant of unet"),
    ({"model": "unet", "backbone": "small", "task": "rotation", "masks": "none"}, "rotation trains the backbone"),
    ({"model": "multi", "images": "unlabelled"}, "the pool has no priors"), ({"model": "multi"}, "priors"),
    ({"images": "unlabeled"}, "did you mean 'unlabelled'"), ({"task": "rotation"}, "rotation erases nothing"), ({"masks": "none"}, "needs masks"),
    ({"batch_size": 9}, "set batch_size to 8 or less"), ({"images_per_epoch": 9}, "set images_per_epoch to 8 or less"),
    ({"size": 60}, "multiple"), ({"keep": 1.5}, "keep is out of range"), ({"device": "tpu"}, "device")])
def test_settings_that_cannot_work_stop_before_the_first_step(base, changed, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        pretext_run({**base, **changed})
    assert not list(Path(base["checkpoints"]).glob("*.pt")) and not Path(base["output"]).exists()


# the verdict

def test_the_claim_needs_every_turn_to_be_harder(base):
    run = pretrain_network({**base, "warmup_epochs": 2, "rounds": 2}, training_images(8))
    history = run.result.history
    for last, verdict in ((1.4, "PASS"), (0.9, "FAIL")):
        history["rec_random"], history["rec_coach"] = 1.0, [1.0, 1.05, 1.3, 1.2, last, 1.1]
        metrics = pretext_runs.pretext_metrics(run)
        assert harder_than_random(metrics).startswith(verdict)
        value = metrics.set_index("metric")["value"]
        assert value["ratio_untrained"] == 1.05 and value["ratio_after_turns_lowest"] == min(1.3, last) and value["ratio_last"] == 1.1
    history["rec_coach"] = [1.0, 1.5, 1.3, 1.2, 1.4, 1.1]  # the untrained coach was harder still
    assert harder_than_random(pretext_runs.pretext_metrics(run)).startswith("FAIL")


def test_without_a_coach_there_is_no_claim(base):
    settings = {**base, "masks": "random"}
    run = pretrain_network(settings, training_images(8))
    metrics = pretext_runs.pretext_metrics(run)
    assert harder_than_random(metrics) == "NOT TESTED: no coach in this run"
    assert metrics.value.notna().all() and "rec_coach" not in set(metrics.metric)
