"""Two stages from settings to files: priors that leak nothing, classes and conventions, faults, and runs that go on after a kill."""
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covidsev.paper import multiclass_runs
from covidsev.paper import runs
from covidsev.method import training
from covidsev.core import CheckpointError, ConfigError, GeometryError, LeakageError, NonFiniteError
from covidsev.data.datasets import KNOWN_SHARED_GROUPS, SliceSet, Splits, load_splits
from covidsev.paper.experiments import lint_notebook, notebook_parameters
from covidsev.method.infnet import InfNet
from covidsev.method.unets import MultiClassUNet
from covidsev.method.multiclass import Priors, class_dice, dice_table, fold_assignments
from covidsev.paper.multiclass_runs import (LESIONS, SHORT, ClassMaps, PriorRun, SplitPriors, build_multiclass, check_classes,
                                      class_overlaps, evaluate_multiclass, load_priors_of, make_priors, multi_task,
                                      multi_tensors, multiclass_images, multiclass_run, overlap_metrics, read_priors,
                                      save_prior_run, save_priors, toolbox_metrics, train_multiclass, train_priors)
from covidsev.method.training import TrainingInterrupted, save_checkpoint, weights_hash

COMMON = {"profile": "smoke", "seed": 0, "data": "phantom", "size": 32, "n_train": 8, "n_test": 4, "val_slices": 2, "split_seed": 1,
          "epochs": 2, "batch_size": 4, "learning_rate": 4e-3, "optimiser": "adamw", "weight_decay": 1e-2, "schedule": "cosine",
          "scales": [1.0], "clip_norm": 1.0, "augment": "paper", "cutout": 0.5, "cutout_mode": "side", "save_every": 1,
          "device": "cpu", "threads": 1, "data_root": ""}
FIRST = COMMON | {"row": "unet", "model": "unet", "backbone": "small", "init": "scratch", "n_folds": 2}
SECOND = COMMON | {"row": "multi", "form": "small", "prior": "predicted", "priors": "", "start": "", "class_weights": "none",
                   "background_smoothing": 0.0, "focal_gamma": 0.0}


def placed(settings_: dict, folder: Path, **changes) -> dict:
    """The settings with places below `folder`."""
    return settings_ | {"output": str(folder / "output"), "checkpoints": str(folder / "checkpoints"), **changes}


def constant_run(splits: Splits, n_folds: int = 2) -> PriorRun:
    """A first stage that knows nothing: the same map everywhere; right folds."""
    folds = fold_assignments(splits.train.groups, n_folds)
    ids = np.array(splits.train.ids)
    seen = [frozenset(ids[folds != fold].tolist()) for fold in folds]
    maps = {name: [np.full(image.shape, 0.4, np.float32) for image in part.images] for name, part in splits._asdict().items()}
    others = (Priors("predicted", maps[name], [frozenset()] * len(maps[name])) for name in ("val", "test"))
    return PriorRun({}, splits, folds, SplitPriors(Priors("out_of_fold", maps["train"], seen), *others), {})


def stack(truths: list, ids: list[str] | None = None) -> SliceSet:
    """Slices with these labels, each from a scan of its own."""
    labels = [np.asarray(one, np.uint8) for one in truths]
    ids = ids or [str(k) for k in range(len(labels))]
    return SliceSet("stack", "phantom", ids, [np.zeros_like(one) for one in labels], labels, list(ids))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return runs.load_run_data(COMMON)


@pytest.fixture(scope="module")
def first(splits, tmp_path_factory) -> PriorRun:
    run = train_priors(placed(FIRST, tmp_path_factory.mktemp("first")), splits)
    save_prior_run(run)
    return run


@pytest.fixture(scope="module")
def trained(splits, first, tmp_path_factory):
    return train_multiclass(placed(SECOND, tmp_path_factory.mktemp("second")), splits, first.priors)


@pytest.fixture()
def file(splits, tmp_path) -> Path:
    path = tmp_path / "priors.npz"
    save_priors(path, constant_run(splits))
    return path


# the first stage

def test_each_network_saw_the_other_folds_and_nothing_else(splits, tmp_path, monkeypatch):
    given_ids = {}

    def spy(model, train, val, config, folder, **options):
        given_ids[folder.name] = options["ids"]
        assert val is None and config.monitor == "last"  # nothing that gets a prior chooses an epoch
        return training.FitResult(None, 1, 0.0, 1, False, model.eval())

    monkeypatch.setattr(multiclass_runs, "fit", spy)
    run = train_priors(placed(FIRST, tmp_path), splits)
    assert given_ids.pop("all") == splits.train.ids
    for fold in (0, 1):
        held_out = {splits.train.groups[k] for k in np.flatnonzero(run.folds == fold)}
        seen = {group for name, group in zip(splits.train.ids, splits.train.groups) if name in given_ids[f"fold{fold}"]}
        assert seen and not seen & held_out and len(seen | held_out) == len(set(splits.train.groups))
    assert not {*splits.val.ids, *splits.test.ids} & set().union(*map(set, given_ids.values()))


def test_a_scan_on_both_sides_is_a_leak(splits, tmp_path):
    for name in ("val", "test"):
        part = getattr(splits, name).subset(range(2))
        part.groups = [splits.train.groups[0], part.groups[1]]
        with pytest.raises(LeakageError, match=splits.train.ids[0]):
            runs.assert_no_leak(splits._replace(**{name: part}))
        run = PriorRun({}, splits, None, None, {})
        with pytest.raises(LeakageError, match="share patients"):
            multiclass_runs.predicted_priors(lambda images: [np.zeros(i.shape) for i in images], part, run.splits.train)


def test_more_folds_than_scans(splits, tmp_path):
    with pytest.raises(ConfigError, match="cannot make 5 folds"):
        train_priors(placed(FIRST, tmp_path, n_folds=5), splits)


def test_a_fold_of_one_slice_to_learn_from(splits, tmp_path):
    two = splits._replace(train=splits.train.subset([0, 2]))
    with pytest.raises(ConfigError, match="too few training slices"):
        train_priors(placed(FIRST, tmp_path), two)


def test_stopped_by_a_signal_in_the_second_fold_and_resumed(splits, first, tmp_path, monkeypatch):
    """Row 59: a checkpoint, an error that says so, and the same bits as a run that was never stopped."""
    here, steps, step = placed(FIRST, tmp_path), [], training.train_step

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 4:  # each network has one batch of four slices, two epochs: this is fold 1, epoch 2
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(TrainingInterrupted):
        train_priors(here, splits)
    assert len(steps) == 4 and not (tmp_path / "checkpoints" / "all").exists()
    resumed = train_priors(here, splits)
    assert len(steps) == 4 + 4  # nothing is trained twice: only the two epochs of two batches of the last network
    for expected, found in zip(first.priors, resumed.priors):
        assert all(np.array_equal(a, b) for a, b in zip(expected.maps, found.maps))


def test_killed_and_run_again_the_files_are_the_same(first, tmp_path):
    """Rows 58 and 60: kill -9 while a fold is trained; no half file is left, and the second try ends with the same bytes."""
    here = placed(FIRST, tmp_path)
    code = f"from covidsev.paper.multiclass_runs import make_priors; make_priors({here!r})"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "COVIDSEV_QUIET": "1"})
    begun, deadline = tmp_path / "checkpoints" / "fold1" / "last.pt", time.monotonic() + 60
    while child.poll() is None and not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL and begun.exists()
    assert not list(tmp_path.rglob("priors.npz")) and not list(tmp_path.rglob("*.csv"))
    make_priors(here)
    whole = Path(first.settings["output"]).parent
    for name in ("output/metrics.csv", "output/per_image.csv", "output/history.csv", "output/run.json", "checkpoints/priors.npz"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


# the file of priors

def test_what_is_written_is_read(splits, first, tmp_path):
    path = tmp_path / "priors.npz"
    save_priors(path, first)
    for before, after in zip(first.priors, read_priors(path, splits)):
        assert before.source == after.source and all(np.array_equal(a, b) for a, b in zip(before.maps, after.maps))
    with np.load(path) as arrays:
        assert arrays[f"val/{splits.val.ids[0]}"].dtype == np.uint8
        assert set(arrays.files) == {"about"} | {f"{name}/{one}" for name, part in splits._asdict().items() for one in part.ids}


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:200], lambda data: data[:-40],
                                    lambda data: b"<html>not found</html>", lambda data: b"version https://git-lfs",
                                    lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:]],
                         ids=["empty", "head", "no tail", "html", "pointer", "one bit"])
def test_a_damaged_file(splits, file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        read_priors(file, splits)


def test_a_file_of_something_else(splits, tmp_path):
    path = tmp_path / "priors.npz"
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        read_priors(path, splits)
    np.savez(path, **{"train/0": np.zeros((32, 32), np.uint8)})
    with pytest.raises(CheckpointError, match="about"):
        read_priors(path, splits)


def test_a_file_that_would_run_code(splits, tmp_path):
    """Row 41: nothing is unpickled."""
    canary, path = tmp_path / "canary", tmp_path / "priors.npz"

    class Trap:
        def __reduce__(self):
            return Path.touch, (canary,)

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError):
        read_priors(path, splits)
    np.savez(path, about=np.array([Trap()], dtype=object))
    canary.unlink(missing_ok=True)  # saving may not call it; reading must not
    with pytest.raises(CheckpointError):
        read_priors(path, splits)
    assert not canary.exists()


def test_priors_of_another_split(splits, file):
    """A second stage that splits in another way would get priors from a network that was trained on its validation slices."""
    other = splits._replace(val=splits.train.subset([0, 1]), train=splits.train.subset(range(2, 8)))
    with pytest.raises(LeakageError, match=f"train/{splits.train.ids[0]}"):
        read_priors(file, other)


def test_priors_from_a_network_that_saw_the_scan(splits, file):
    for name in ("val", "test"):
        part = getattr(splits, name).subset(range(2))
        part.groups = [part.groups[0], splits.train.groups[3]]
        with pytest.raises(LeakageError, match=part.ids[1]):
            read_priors(file, splits._replace(**{name: part}))


def test_priors_in_wrong_folds(splits, tmp_path):
    """Slices of one scan in two folds: each was predicted by a network that saw the other."""
    run = constant_run(splits)
    save_priors(tmp_path / "priors.npz", run._replace(folds=np.arange(len(run.folds)) % 2))
    with pytest.raises(LeakageError, match="saw the slice or its scan"):
        read_priors(tmp_path / "priors.npz", splits)


def test_the_truth_in_a_file_of_priors(splits, tmp_path):
    run = constant_run(splits)
    truth = run.priors.train._replace(maps=[splits.train.infection(k).astype(np.float32) for k in range(len(splits.train))])
    save_priors(tmp_path / "priors.npz", run._replace(priors=run.priors._replace(train=truth)))
    with pytest.raises(LeakageError, match="the priors are the ground truth"):
        read_priors(tmp_path / "priors.npz", splits)


def test_priors_of_another_size_or_image(splits, file, tmp_path):
    run = constant_run(splits)
    half = run.priors.test._replace(maps=[one[::2, ::2] for one in run.priors.test.maps])
    save_priors(tmp_path / "half.npz", run._replace(priors=run.priors._replace(test=half)))
    with pytest.raises(GeometryError, match=r"uint8 \(16, 16\)"):
        read_priors(tmp_path / "half.npz", splits)
    other = splits.val.subset(range(2))
    other.images = [other.images[0], 255 - other.images[1]]
    with pytest.raises(ConfigError, match=f"val/{other.ids[1]} was made for another image"):
        read_priors(file, splits._replace(val=other))


def test_slices_without_a_prior(splits, file):
    more = load_splits("phantom", size=32, n_train=8, n_test=6, val_slices=2, split_seed=1)
    with pytest.raises(ConfigError, match="2 test slices have no prior"):
        read_priors(file, more)


def test_the_real_scans_that_are_known_to_be_shared(data_root, tmp_path):
    """Test slices may share the scans that are listed; validation slices may not."""
    real = load_splits("covid-semiseg", root=data_root, val_slices=10)
    save_priors(tmp_path / "priors.npz", constant_run(real, 5))
    assert [len(each.maps) for each in read_priors(tmp_path / "priors.npz", real)] == [40, 10, 48]
    assert {*real.train.groups} & {*real.test.groups} <= {*KNOWN_SHARED_GROUPS}
    fewer = real._replace(train=real.train.subset(range(20)))
    assert len(read_priors(tmp_path / "priors.npz", fewer).train.maps) == 20
    shared = next(group for group in real.train.groups if group in KNOWN_SHARED_GROUPS)
    mixed = real.val.subset(range(10))
    mixed.groups[0] = shared
    with pytest.raises(LeakageError, match=mixed.ids[0]):
        read_priors(tmp_path / "priors.npz", real._replace(val=mixed))


# what the second stage is given

@pytest.mark.parametrize("changes, error, words", [
    ({"prior": "truth"}, ConfigError, "unknown prior"),
    ({"data": "covid-semiseg"}, ConfigError, "no run is named that made the priors"),
    ({"priors": "priors/infnet-seed0"}, ConfigError, "covidsev reproduce --profile smoke --only priors")])
def test_priors_that_cannot_be_had(splits, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        load_priors_of(placed(SECOND, tmp_path, **changes), splits)


def test_the_named_run_is_read(splits, file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(multiclass_runs, "checkpoint_of", lambda settings_, *names: asked.append(names) or file)
    priors = load_priors_of(placed(SECOND, tmp_path, priors="priors/infnet-seed0", seed=2), splits)
    assert asked == [("priors/infnet-seed0", "priors.npz")] and priors.train.source == "out_of_fold"


@pytest.mark.parametrize("what", ["images", "labels", "maps"])
def test_unequal_sizes_of_image_mask_and_prior(splits, first, what):
    part, priors = splits.val.subset(range(2)), first.priors.val
    if what == "maps":
        priors = priors._replace(maps=[priors.maps[0], priors.maps[1][1:]])
    else:
        setattr(part, what, [getattr(part, what)[0], getattr(part, what)[1][1:]])
    with pytest.raises(GeometryError, match=rf"{part.ids[1]} differ(.|\n)*\(31, 32\)"):
        multi_tensors(part, priors, 32)


def test_image_mask_and_prior_stay_together(splits, first):
    """A prior that is the mask is still the mask, after both were resized."""
    truth = first.priors.test._replace(maps=[labels.astype(np.float32) > 0 for labels in splits.test.labels])
    images, labels, maps = multi_tensors(splits.test, truth, 64)
    assert images.shape == labels.shape == maps.shape == (4, 1, 64, 64) and maps.dtype == torch.uint8
    assert ((labels > 0) == (maps > 127)).float().mean() > 0.97


@pytest.mark.parametrize("keep, words", [([0, 2], "no pixel of ground-glass opacity"), ([0, 1], "no pixel of consolidation"),
                                         ([0], "no pixel of ground-glass opacity, consolidation")])
def test_a_class_that_no_training_slice_shows(splits, first, tmp_path, keep, words):
    train = splits.train.subset(range(8))
    train.labels = [np.where(np.isin(labels, keep), labels, 0).astype(np.uint8) for labels in train.labels]
    with pytest.raises(ConfigError, match=words):
        train_multiclass(placed(SECOND, tmp_path), splits._replace(train=train), first.priors)
    assert not (tmp_path / "checkpoints").exists()  # refused before anything is made


def test_masks_that_know_only_infection(splits):
    blind = splits.train.subset(range(8))
    blind.binary_only = True
    with pytest.raises(ConfigError, match="masks without classes"):
        check_classes(blind)


def test_a_class_may_be_missing_from_validation_and_test(splits, first, tmp_path):
    bare = {name: getattr(splits, name).subset(range(2)) for name in ("val", "test")}
    for part in bare.values():
        part.labels = [np.minimum(labels, 1) for labels in part.labels]
    priors = first.priors._replace(test=Priors("predicted", first.priors.test.maps[:2], first.priors.test.seen[:2]))
    run = train_multiclass(placed(SECOND, tmp_path, epochs=1), splits._replace(**bare), priors)
    table = evaluate_multiclass(run).metrics.set_index(["subset", "metric"])
    assert table.loc[("test", "dice_consolidation_38"), "n"] == 0
    assert table.loc[[("test", "dice_consolidation_38"), ("test", "meanDice_consolidation_38")], "value"].isna().all()
    assert table.loc[("test", "dice_consolidation_48"), "value"] == 0


@pytest.mark.parametrize("kind, power", [("none", None), ("balanced", 1.0), ("sqrt_balanced", 0.5)])
def test_class_weights(splits, kind, power):
    weights = multi_task(SECOND | {"class_weights": kind}, splits.train).options.class_weights
    if power is None:
        assert weights is None
    else:
        counts = np.bincount(np.concatenate([labels.ravel() for labels in splits.train.labels]), minlength=3)
        assert weights == pytest.approx((counts.sum() / (3 * counts)) ** power)
    with pytest.raises(ConfigError, match="did you mean 'balanced'"):
        multi_task(SECOND | {"class_weights": "balance"}, splits.train)


# training

def test_the_ablation_trains_on_the_truth_and_is_chosen_on_predictions(splits, first, tmp_path, monkeypatch):
    seen = {}

    def spy(model, train, val, config, folder, **options):
        seen.update(train=train, val=val)
        return training.FitResult(None, 1, 0.0, 1, False, model)

    monkeypatch.setattr(multiclass_runs, "fit", spy)
    for prior in ("predicted", "ground_truth"):
        train_multiclass(placed(SECOND, tmp_path, prior=prior), splits, first.priors)
        is_truth = torch.equal(seen["train"][2], 255 * (seen["train"][1] > 0).to(torch.uint8))
        assert is_truth == (prior == "ground_truth")
        assert torch.equal(seen["val"][2], multi_tensors(splits.val, first.priors.val, 32)[2])


@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_batches_that_do_not_divide_the_set_or_exceed_it(splits, first, tmp_path, batch_size):
    run = train_multiclass(placed(SECOND, tmp_path, epochs=1, batch_size=batch_size), splits, first.priors)
    assert run.fit.epochs_run == 1 and np.isfinite(run.fit.history["train_loss"]).all()


def test_one_slice_is_not_a_training_set(splits, first, tmp_path):
    index = next(k for k, labels in enumerate(splits.train.labels) if len(np.unique(labels)) == 3)
    one = Priors("out_of_fold", [first.priors.train.maps[index]], [frozenset()])
    with pytest.raises(ConfigError, match="too few training slices"):
        train_multiclass(placed(SECOND, tmp_path), splits._replace(train=splits.train.subset([index])),
                         first.priors._replace(train=one))


def test_a_loss_that_is_not_finite(splits, first, tmp_path):
    """Row 53: epoch, batch and slices are named."""
    with pytest.raises(NonFiniteError, match=r"epoch 1, batch 2, slices train-"):
        train_multiclass(placed(SECOND, tmp_path, learning_rate=1e38, clip_norm=0, optimiser="adam"), splits, first.priors)


def test_resume_with_one_changed_prior_pixel(splits, first, trained):
    """Row 45: the prior is data."""
    maps = [one.copy() for one in first.priors.train.maps]
    maps[3][5, 5] = 1 - maps[3][5, 5]
    changed = first.priors._replace(train=first.priors.train._replace(maps=maps))
    with pytest.raises(ConfigError, match="cannot resume(.|\n)*train data"):
        train_multiclass(trained.settings, splits, changed)
    with pytest.raises(ConfigError, match="loss.background_smoothing: 0.0 -> 0.1"):
        train_multiclass(trained.settings | {"background_smoothing": 0.1}, splits, first.priors)


def test_resume_with_another_form(splits, first, trained):
    """Row 43: the checkpoint of another network is refused by name."""
    with pytest.raises(CheckpointError, match="checkpoint of another network(.|\n)*missing"):
        train_multiclass(trained.settings | {"form": "published"}, splits, first.priors)


def test_stopped_and_resumed_is_the_same_run(splits, first, trained, tmp_path, monkeypatch):
    here, steps, step = placed(SECOND, tmp_path), [], training.train_step

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(training, "train_step", interrupted)
    with pytest.raises(TrainingInterrupted):
        train_multiclass(here, splits, first.priors)
    resumed = train_multiclass(here, splits, first.priors)
    assert len(steps) == 4 and weights_hash(resumed.model) == weights_hash(trained.model)
    assert resumed.fit.history.equals(trained.fit.history)


@pytest.mark.parametrize("kind", ["pretext", "full", "infnet"])
def test_starting_from_another_run(tmp_path, monkeypatch, kind):
    torch.manual_seed(5)
    other = InfNet("small") if kind == "infnet" else MultiClassUNet("small")
    fresh = [] if kind == "full" else ["head"]
    weights = {name: value for name, value in other.state_dict().items() if not name.startswith(tuple(f"{x}." for x in fresh))}
    path = tmp_path / "start.pt"
    save_checkpoint(path, {"kind": kind, "layers_fresh": fresh, "weights": weights})
    asked = []
    monkeypatch.setattr(multiclass_runs, "checkpoint_of", lambda settings_, *names: asked.append(names) or path)
    begin = placed(SECOND, tmp_path, start="pretext/multi_coach", seed=1)
    if kind == "infnet":
        with pytest.raises(CheckpointError):
            build_multiclass(begin)
        return
    model, report = build_multiclass(begin)
    plain, _ = build_multiclass(begin | {"start": ""})
    assert asked == [("pretext/multi_coach-seed1", "start.pt")] and len(report.loaded) == len(weights)
    own, theirs, scratch = model.state_dict(), other.state_dict(), plain.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in weights)
    assert all(torch.equal(own[name], scratch[name]) for name in own if name not in weights)  # the seed's own last layer
    assert sorted(report.fresh) == (["head.bias", "head.weight"] if kind == "pretext" else [])


# scores

def pictures(draw: np.random.Generator, n: int) -> tuple[list, SliceSet]:
    """Random classes and truths, of which some lack a class."""
    truths = [draw.integers(0, draw.integers(1, 4), (5, 6)) for _ in range(n)]
    return [draw.integers(0, draw.integers(1, 4), (5, 6)).astype(np.uint8) for _ in range(n)], stack(truths)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=15)
def test_overlaps_agree_with_the_table_and_keep_their_order(seed, n):
    found, slices = pictures(np.random.default_rng(seed), n)
    ours = overlap_metrics(class_overlaps(found, slices)).set_index("metric")
    table = dice_table(class_dice(found, slices.labels)).set_index("class")
    names = {"lesion": "lesion mean", "ggo": "ground-glass opacity", "consolidation": "consolidation", "background": "background"}
    for short, name in names.items():
        for rule, column, count in (("48", "all_slices", "n_all"), ("38", "non_empty", "n_non_empty")):
            row = ours.loc[f"dice_{short}_{rule}"]
            assert row["value"] == pytest.approx(table.loc[name, column], nan_ok=True) and row["n"] == table.loc[name, count]
        for score in ("iou", "sensitivity", "precision"):
            assert 0 <= ours.loc[f"{score}_{short}_48", "value"] <= 1
        assert ours.loc[f"iou_{short}_48", "value"] <= ours.loc[f"dice_{short}_48", "value"] + 1e-12
        pooled = ours.loc[f"pooled_dice_{short}", "value"]
        assert pooled / (2 - pooled) == pytest.approx(ours.loc[f"pooled_iou_{short}", "value"]) or short == "lesion"


@given(st.integers(0, 10_000))
@settings(max_examples=6)
def test_scores_do_not_depend_on_the_order_of_slices(seed):
    found, slices = pictures(np.random.default_rng(seed), 4)
    order = [2, 0, 3, 1]
    there = overlap_metrics(class_overlaps(found, slices)).set_index("metric")["value"]
    back = overlap_metrics(class_overlaps([found[k] for k in order], slices.subset(order))).set_index("metric")["value"]
    np.testing.assert_allclose(there, back[there.index])


def test_a_network_that_says_background_everywhere():
    slices = stack([[[1, 0, 2]], [[1, 0, 0]]])
    table = overlap_metrics(class_overlaps([np.zeros((1, 3), np.uint8)] * 2, slices)).set_index("metric")["value"]
    for name in ("ggo", "consolidation", "lesion"):
        assert table.filter(like=f"_{name}").eq(0).all()  # zero, not missing: there was something to find
    assert table["dice_background_48"] == pytest.approx((2 / 4 + 4 / 5) / 2) and table["sensitivity_background_48"] == 1


def test_an_invented_class_costs_in_the_mean_of_a_slice_but_not_in_the_38():
    slices, blank = stack([[[1, 1, 0, 0]]]), Priors("predicted", [np.zeros((1, 4), np.float32)], [frozenset()])
    right, invented = np.array([[1, 1, 0, 0]], np.uint8), np.array([[1, 1, 2, 0]], np.uint8)
    rows = [multiclass_images([one], slices, blank).iloc[0] for one in (right, invented)]
    assert rows[0]["dice"] == 1 and np.isnan(rows[0]["dice_consolidation"])
    assert rows[1]["dice"] == 0.5 and rows[1]["dice_consolidation"] == 0 and rows[1]["n_pred_consolidation"] == 1
    values = [overlap_metrics(class_overlaps([one], slices)).set_index("metric")["value"] for one in (right, invented)]
    assert all(np.isnan(one["dice_consolidation_38"]) and one["dice_consolidation_48"] == 0 for one in values)


def test_the_row_of_a_slice():
    slices = stack([[[0, 0, 0, 0]], [[1, 2, 0, 0]]], ["empty", "both"])
    priors = Priors("predicted", [np.zeros((1, 4), np.float32), np.array([[0.9, 0.5, 0.4, 0.0]], np.float32)], [frozenset()] * 2)
    table = multiclass_images([np.zeros((1, 4), np.uint8), np.array([[2, 1, 0, 0]], np.uint8)], slices, priors).set_index("id")
    assert table.loc["empty", ["dice", "dice_ggo", "dice_consolidation", "dice_infection", "dice_prior"]].isna().all()
    both = table.loc["both"]
    assert (both["dice"], both["dice_infection"], both["dice_prior"], both["dice_background"]) == (0, 1, 1, 1)
    assert (both["n_truth_ggo"], both["n_pred_ggo"], both["n_truth_consolidation"], both["n_pred_consolidation"]) == (1, 1, 1, 1)


def test_the_toolbox_of_a_perfect_decision():
    """Zero where the class is not there, even for a perfect network: the published convention, and its ceiling."""
    draw = np.random.default_rng(0)
    slices = stack([draw.integers(0, top, (16, 16)) for top in (3, 3, 2, 2)])
    planes = [np.stack([labels == k for k in range(3)]).astype(np.float32) for labels in slices.labels]
    table = toolbox_metrics(ClassMaps(slices.labels, planes), slices).set_index("metric")
    assert table.loc["maxDice_consolidation_48", "value"] == pytest.approx(0.5) and table.loc["maxDice_consolidation_38", "value"] == 1
    assert (table.loc["maxDice_consolidation_38", "n"], table.loc["maxDice_ggo_38", "n"]) == (2, 4)
    for name in LESIONS:  # a map that is its own decision: one number
        same = table.filter(like=f"_{name}_", axis=0)["value"]
        pairs = [(key, key.replace(f"_{name}", f"_decided_{name}")) for key in same.index if "decided" not in key]
        assert len(pairs) > 20 and all(same[a] == pytest.approx(same[b]) for a, b in pairs)


def test_the_published_maps_give_the_published_table(data_root, published_root):
    """The decisions of Semi-Inf-Net & U-Net: the toolbox columns that this module writes are the printed ones."""
    from covidsev.data.datasets import load_covid_semiseg
    from covidsev.data.pictures import read_map
    test = load_covid_semiseg(data_root, "test")
    folder = published_root / "Results" / "Multi-class lung infection segmentation"
    names = {1: "Ground-glass opacities", 2: "Consolidation"}
    planes = {number: [read_map(folder / name / "Semi-Inf-Net_UNet" / f"{one}.png") for one in test.ids] for number, name in names.items()}
    assert all(set(np.unique(plane)) <= {0, 1} for each in planes.values() for plane in each)  # they are 1-bit decisions
    classes = [np.where(two > 0, 2, one).astype(np.uint8) for one, two in zip(planes[1], planes[2])]
    maps = ClassMaps(classes, [np.stack([one * 0, one, two]).astype(np.float32) for one, two in zip(planes[1], planes[2])])
    table = toolbox_metrics(maps, test).set_index("metric")["value"]
    printed = {"meanDice": (.624, .362), "meanSen": (.618, .403), "meanSpe": (.966, .766), "Sm": (.706, .813 - .130), "MAE": (.067, .039)}
    for metric, (ggo, consolidation) in printed.items():
        assert round(table[f"{metric}_decided_ggo_48"], 3) == ggo
        assert metric == "Sm" or round(table[f"{metric}_decided_consolidation_48"], 3) == consolidation
    assert table["meanDice_decided_consolidation_38"] == pytest.approx(.457, abs=5e-4)


def test_subsets_and_their_numbers(trained, splits, monkeypatch):
    monkeypatch.setattr(multiclass_runs, "known_shared", lambda splits_: [True, False, False, False])
    scores = evaluate_multiclass(trained)
    table = scores.metrics.set_index(["subset", "metric"])
    assert table.loc[("test", "dice_ggo_48"), "n"] == 4 and table.loc[("test_without_shared_scans", "dice_ggo_48"), "n"] == 3
    assert scores.per_image["shares_scan"].tolist() == [True, False, False, False]
    rest = scores.per_image[~scores.per_image["shares_scan"]]
    assert table.loc[("test_without_shared_scans", "dice"), "value"] == pytest.approx(rest["dice"].mean(), nan_ok=True)
    assert table.loc[("test_with_ground_truth_prior", "dice_prior"), "value"] == 1
    assert not np.isclose(table.loc[("test", "test_loss_mean"), "value"], table.loc[("test_with_ground_truth_prior", "test_loss_mean"), "value"])
    assert scores.metrics["value"].notna().sum() > 0.9 * len(scores.metrics)
    monkeypatch.setattr(multiclass_runs, "known_shared", lambda splits_: [True] * 4)
    assert set(evaluate_multiclass(trained).metrics["subset"]) == {"test", "val", "test_with_ground_truth_prior"}


def test_the_test_loss_is_the_same_for_every_arm(trained):
    """A focal loss is smaller by definition: that is no result."""
    focal = trained._replace(settings=trained.settings | {"focal_gamma": 2.0, "background_smoothing": 0.1, "class_weights": "balanced"})
    losses = [evaluate_multiclass(run).metrics.query("metric == 'test_loss_mean'")["value"].tolist() for run in (trained, focal)]
    assert losses[0] == losses[1]


# whole runs

def test_priors_made_on_the_spot(splits, tmp_path, monkeypatch):
    """By hand, on the phantom: small plain networks in a folder of their own, whatever the second stage is given."""
    asked = {}
    monkeypatch.setattr(multiclass_runs, "train_priors", lambda settings_, splits_: asked.update(settings_) or constant_run(splits_))
    load_priors_of(placed(SECOND, tmp_path, start="pretext/multi_coach", focal_gamma=2.0), splits)
    assert (asked["model"], asked["start"], asked["focal_gamma"], asked["augment"]) == ("infnet", "", 0.0, "none")
    assert Path(asked["checkpoints"]) == tmp_path / "checkpoints" / "priors"


def test_two_runs_in_two_places_write_the_same_bytes(first, tmp_path, monkeypatch):
    """Row 69: other folders, another working directory."""
    made, file = [], Path(first.settings["checkpoints"]) / "priors.npz"
    monkeypatch.setattr(multiclass_runs, "checkpoint_of", lambda *names: file)
    for name in ("a", "b c"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        multiclass_run(placed(SECOND, tmp_path / name, epochs=1, priors="priors/unet-seed0"))
        made.append({path.name: path.read_bytes() for path in (tmp_path / name / "output").rglob("*.*")})
    assert set(made[0]) == {"metrics.csv", "per_image.csv", "history.csv", "run.json", "multi-seed0.npz"}
    assert made[0] == made[1]
    assert not [name for name, data in made[0].items() if str(tmp_path).encode() in data]


@pytest.mark.parametrize("name", ["priors", "train_multi"])
def test_the_notebooks_can_be_run_with_parameters(repository, name):
    notebook = repository / "nbs" / "experiments" / f"{name}.ipynb"
    assert not lint_notebook(notebook)
    defaults = notebook_parameters(notebook)
    runs.train_config(defaults)
    assert defaults["data"] == "phantom" and defaults["device"] == "cpu" and defaults["output"] == defaults["checkpoints"] == ""
    assert SHORT.keys() >= set(LESIONS) and set(FIRST if name == "priors" else SECOND) <= set(defaults) | {"results"}
