"""From settings to files for one class and for three: what is learned from, classes and conventions, records, faults."""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from covidsev.core import (CheckpointError, ConfigError, GeometryError, LeakageError,
                           NonFiniteError, has_bfloat16)
from covidsev.data.datasets import SliceSet, Splits, spine_at_left
from covidsev.method import training
from covidsev.method.training import TrainConfig, save_checkpoint
from covidsev.paper import runs
from covidsev.paper.runs import (LESIONS, ClassMaps, build_started, check_classes, class_overlaps,
                                 evaluate, evaluate_multiclass, multiclass_images, out_of_fold,
                                 overlap_metrics, run_tensors, save_run, toolbox_metrics,
                                 train_network, train_run)

COMMON = {"profile": "smoke", "seed": 0, "data": "phantom", "size": 32, "n_train": 8, "n_test": 4, "epochs": 2, "batch_size": 4,
          "learning_rate": 4e-3, "augment": "paper", "cutout": 0.5, "cutout_mode": "side", "precision": "float32", "save_every": 1,
          "start": "", "device": "cpu", "threads": 1, "data_root": ""}
SINGLE = COMMON | {"row": "unet", "model": "unet", "backbone": "small", "init": "scratch"}
MULTI = COMMON | {"row": "multi", "model": "multi", "form": "small"}


class Maps(NamedTuple):
    """Priors of both splits."""

    train: list
    test: list


def placed(settings_: dict, folder: Path, **changes) -> dict:
    """The settings with places below `folder`."""
    return settings_ | {"output": str(folder / "output"), "checkpoints": str(folder / "checkpoints"), **changes}


def stack(truths: list, ids: list[str] | None = None) -> SliceSet:
    """Slices with these labels, each from a scan of its own."""
    labels = [np.asarray(one, np.uint8) for one in truths]
    ids = ids or [str(k) for k in range(len(labels))]
    return SliceSet("stack", "phantom", ids, [np.zeros_like(one) for one in labels], labels, list(ids))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return runs.load_run_data(COMMON)


@pytest.fixture(scope="module")
def priors(splits) -> Maps:
    """Blurred truths."""
    return Maps(*([0.8 * part.infection(k).astype(np.float32) + 0.1 for k in range(len(part))]
                  for part in (splits.train, splits.test)))


@pytest.fixture(scope="module")
def trained(splits, priors, tmp_path_factory):
    return train_network(placed(MULTI, tmp_path_factory.mktemp("multi")), splits, priors)


# what a run learns from, and what its record says

def test_every_label_is_learned_from_and_no_test_slice(splits, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "fit", lambda model, data, config, folder, **more: seen.update(more, data=data)
                        or training.FitResult(None, model, 0, 0))
    train_network(placed(SINGLE, tmp_path), splits)
    assert seen["ids"] == splits.train.ids and len(seen["data"][0]) == 8 and not set(seen["ids"]) & set(splits.test.ids)


def test_subsets_of_the_real_slices_are_drawn_from_the_seed(data_root):
    real = COMMON | {"data": "covid-semiseg", "data_root": str(data_root), "n_test": None}
    chosen = [runs.load_run_data(real | {"n_train": 10, "seed": seed}).train.ids for seed in (0, 1, 0)]
    assert chosen[0] == chosen[2] != chosen[1] and len(chosen[0]) == 10
    whole = runs.load_run_data(real | {"n_train": None, "seed": 3})
    assert (len(whole.train), len(whole.test)) == (50, 48)
    assert runs.assert_no_leak(whole)  # the known scans, named
    with pytest.raises(LeakageError):
        runs.assert_no_leak(whole._replace(test=whole.train.subset([4])))


def test_the_medseg_volumes_join_the_training_slices_and_look_like_them(data_root):
    real = COMMON | {"data": "covid-semiseg", "data_root": str(data_root), "n_train": None, "n_test": None}
    alone, both = runs.load_run_data(real), runs.load_run_data(real | {"more_data": "medseg9"})
    more = both.train.subset(range(50, len(both.train)))
    assert len(both.train) == 462 and both.train.ids[:50] == alone.train.ids and both.test.ids == alone.test.ids
    assert not runs.assert_no_leak(both) or runs.assert_no_leak(both) == runs.assert_no_leak(alone)
    median = [np.median([image.mean() for image in part.images]) for part in (alone.train, more)]
    assert abs(median[0] - median[1]) < 50 and 0 < np.mean([labels.mean() for labels in more.labels]) < 0.2
    left = [spine_at_left(image) for image in more.images]
    assert abs(np.mean(left) - np.mean([spine_at_left(image) for image in alone.train.images])) < 0.2


def test_a_record_states_what_was_used(splits, tmp_path):
    run = train_network(placed(SINGLE, tmp_path, precision="auto"), splits)
    record = json.loads((save_run(run, evaluate(run)) / "run.json").read_text())
    assert {name: record[name] for name in ("n_train", "n_pool", "steps", "draws", "seed", "threads")} == {
        "n_train": 8, "n_pool": 0, "steps": 4, "draws": 16, "seed": 0, "threads": 1}
    assert record["precision"] == ("bfloat16" if has_bfloat16() else "float32") and record["instruction_set"]
    assert record["package"].endswith("__init__.py") and record["parameters"]["precision"] == "auto"
    assert record["data"]["splits"]["train"]["n"] == 8 and "commit" in record


@pytest.mark.parametrize("kind, start, run", [("pretext", "pretext/multi_coach", "pretext/multi_coach-seed7"),
                                              ("full", "pretext/pool%5", "pretext/pool-seed2")])
def test_starting_from_another_run(tmp_path, monkeypatch, kind, start, run):
    torch.manual_seed(5)
    other = build_started(MULTI | {"seed": 9})[0]
    fresh = [] if kind == "full" else ["head"]
    weights = {name: value for name, value in other.state_dict().items() if not name.startswith(tuple(f"{x}." for x in fresh))}
    save_checkpoint(tmp_path / "start.pt", {"layers_fresh": fresh, "weights": weights})
    asked = []
    monkeypatch.setattr(runs, "checkpoint_of", lambda settings_, *names: asked.append(names) or tmp_path / "start.pt")
    begin = placed(MULTI, tmp_path, start=start, seed=7)
    model, report = build_started(begin)
    plain, _ = build_started(begin | {"start": ""})
    assert asked == [(run, "start.pt")] and len(report.loaded) == len(weights)
    own, theirs, scratch = model.state_dict(), other.state_dict(), plain.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in weights)
    assert all(torch.equal(own[name], scratch[name]) for name in own if name not in weights)  # the seed's own last layer
    weights["stages.0.0.weight" if "stages.0.0.weight" in weights else next(iter(weights))].fill_(torch.nan)
    save_checkpoint(tmp_path / "start.pt", {"layers_fresh": fresh, "weights": weights})
    with pytest.raises(NonFiniteError):
        build_started(begin)


# out of fold

def test_each_network_of_a_fold_saw_the_others_and_not_its_scans(splits, tmp_path, monkeypatch):
    given = {}

    def spy(settings_, slices, *, part):
        given[part] = slices
        return training.FitResult(None, build_started(settings_)[0].eval(), 0, 0), None

    monkeypatch.setattr(runs, "fit_slices", spy)
    crossed = out_of_fold(placed(SINGLE, tmp_path), splits.train, 2)
    for fold in (0, 1):
        held_out = {splits.train.groups[k] for k in np.flatnonzero(crossed.folds == fold)}
        seen = set(given[f"fold{fold}"].groups)
        assert seen and not seen & held_out and len(seen | held_out) == len(set(splits.train.groups))
    assert [logits.shape for logits in crossed.logits] == [image.shape for image in splits.train.images]
    with pytest.raises(ConfigError, match="folds"):
        out_of_fold(placed(SINGLE, tmp_path), splits.train, 9)
    copied = splits.train.subset(range(8))
    copied.images = [splits.train.images[0]] * 8
    with pytest.raises(LeakageError):
        out_of_fold(placed(SINGLE, tmp_path), copied, 2)


# three classes: what is given

@pytest.mark.parametrize("what", ["images", "labels", "maps"])
def test_unequal_sizes_of_image_mask_and_prior(splits, priors, what):
    part, maps = splits.train.subset(range(2)), list(priors.train[:2])
    if what == "maps":
        maps[1] = maps[1][1:]
    else:
        setattr(part, what, [getattr(part, what)[0], getattr(part, what)[1][1:]])
    with pytest.raises(GeometryError, match=rf"{part.ids[1]} differ in size(.|\n)*\(31, 32\)"):
        run_tensors(MULTI, part, maps)


def test_image_mask_and_prior_stay_together(splits):
    """A prior that is the mask is still the mask, after both were resized."""
    truth = [splits.test.infection(k).astype(np.float32) for k in range(4)]
    images, labels, maps = run_tensors(MULTI | {"size": 64}, splits.test, truth)
    assert images.shape == labels.shape == maps.shape == (4, 1, 64, 64) and maps.dtype == torch.uint8
    assert ((labels > 0) == (maps > 127)).float().mean() > 0.97


@pytest.mark.parametrize("keep, words", [([0, 2], "no pixel of ground-glass opacity"), ([0, 1], "no pixel of consolidation"),
                                         ([0], "no pixel of ground-glass opacity, consolidation")])
def test_a_class_that_no_training_slice_shows(splits, priors, tmp_path, keep, words):
    train = splits.train.subset(range(8))
    train.labels = [np.where(np.isin(labels, keep), labels, 0).astype(np.uint8) for labels in train.labels]
    with pytest.raises(ConfigError, match=words):
        train_network(placed(MULTI, tmp_path), splits._replace(train=train), priors)
    assert not (tmp_path / "checkpoints").exists()  # refused before anything is made
    train.binary_only = True
    with pytest.raises(ConfigError, match="masks without classes"):
        check_classes(train)


def test_a_class_may_be_missing_from_the_test_slices(splits, priors, tmp_path):
    bare = splits.test.subset(range(2))
    bare.labels = [np.minimum(labels, 1) for labels in bare.labels]
    run = train_network(placed(MULTI, tmp_path, epochs=1), splits._replace(test=bare), Maps(priors.train, priors.test[:2]))
    table = evaluate_multiclass(run).metrics.set_index(["subset", "metric"])
    assert table.loc[("test", "dice_consolidation_38"), "n"] == 0 and np.isnan(table.loc[("test", "dice_consolidation_38"), "value"])
    assert ("test", "meanDice_consolidation_38") not in table.index and table.loc[("test", "dice_consolidation_48"), "value"] == 0


# three classes: training and its faults


def test_a_loss_that_is_not_finite_names_epoch_batch_and_slices(splits, priors, tmp_path):
    with pytest.raises(NonFiniteError, match=r"epoch \d, batch \d, slices train-"):
        train_network(placed(MULTI, tmp_path, learning_rate=1e38, clip_norm=0), splits, priors)


def test_resume_with_one_changed_prior_pixel_or_another_form(splits, priors, trained):
    maps = [one.copy() for one in priors.train]
    maps[3][5, 5] = 1 - maps[3][5, 5]
    with pytest.raises(ConfigError, match="cannot resume(.|\n)*data: "):
        train_network(trained.settings, splits, priors._replace(train=maps))
    with pytest.raises(CheckpointError, match="another network"):
        train_network(trained.settings | {"form": "published"}, splits, priors)


# scores

def pictures(draw: np.random.Generator, n: int) -> tuple[list, SliceSet]:
    """Random classes and truths, of which some lack a class."""
    truths = [draw.integers(0, draw.integers(1, 4), (5, 6)) for _ in range(n)]
    return [draw.integers(0, draw.integers(1, 4), (5, 6)).astype(np.uint8) for _ in range(n)], stack(truths)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=15)
def test_overlaps_agree_with_counting_and_know_no_order(seed, n):
    found, slices = pictures(np.random.default_rng(seed), n)
    ours = overlap_metrics(class_overlaps(found, slices)).set_index("metric")
    for number, short in enumerate(("background", "ggo", "consolidation")):
        pairs = [(one == number, truth == number) for one, truth in zip(found, slices.labels)]
        dice = [2 * (p & t).sum() / max((p.sum() + t.sum()), 1) for p, t in pairs]
        shown = [value for value, (_, t) in zip(dice, pairs) if t.any()]
        assert ours.loc[f"dice_{short}_48", "value"] == pytest.approx(np.mean(dice))
        assert ours.loc[f"dice_{short}_38", "value"] == pytest.approx(np.mean(shown) if shown else np.nan, nan_ok=True)
        assert (ours.loc[f"dice_{short}_48", "n"], ours.loc[f"dice_{short}_38", "n"]) == (n, len(shown))
        assert ours.loc[f"iou_{short}_48", "value"] <= ours.loc[f"dice_{short}_48", "value"] + 1e-12
        pooled = ours.loc[f"pooled_dice_{short}", "value"]
        assert pooled / (2 - pooled) == pytest.approx(ours.loc[f"pooled_iou_{short}", "value"])
    order = np.random.default_rng(seed).permutation(n)
    back = overlap_metrics(class_overlaps([found[k] for k in order], slices.subset(order))).set_index("metric")["value"]
    np.testing.assert_allclose(ours["value"], back[ours.index])


def test_a_network_that_says_background_everywhere():
    slices = stack([[[1, 0, 2]], [[1, 0, 0]]])
    table = overlap_metrics(class_overlaps([np.zeros((1, 3), np.uint8)] * 2, slices)).set_index("metric")["value"]
    for name in ("ggo", "consolidation", "lesion"):
        assert table.filter(like=f"_{name}").eq(0).all()  # zero, not missing: there was something to find
    assert table["dice_background_48"] == pytest.approx((2 / 4 + 4 / 5) / 2) and table["sensitivity_background_48"] == 1


def test_an_invented_class_costs_in_the_mean_of_a_slice_but_not_in_the_38():
    slices, blank = stack([[[1, 1, 0, 0]]]), [np.zeros((1, 4), np.float32)]
    right, invented = np.array([[1, 1, 0, 0]], np.uint8), np.array([[1, 1, 2, 0]], np.uint8)
    rows = [multiclass_images([one], slices, blank).iloc[0] for one in (right, invented)]
    assert rows[0]["dice"] == 1 and np.isnan(rows[0]["dice_consolidation"])
    assert rows[1]["dice"] == 0.5 and rows[1]["dice_consolidation"] == 0 and rows[1]["n_pred_consolidation"] == 1
    values = [overlap_metrics(class_overlaps([one], slices)).set_index("metric")["value"] for one in (right, invented)]
    assert all(np.isnan(one["dice_consolidation_38"]) and one["dice_consolidation_48"] == 0 for one in values)


def test_the_row_of_a_slice():
    slices = stack([[[0, 0, 0, 0]], [[1, 2, 0, 0]]], ["empty", "both"])
    priors = [np.zeros((1, 4), np.float32), np.array([[0.9, 0.5, 0.4, 0.0]], np.float32)]
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
    classes = [np.where(two > 0, 2, one).astype(np.uint8) for one, two in zip(planes[1], planes[2])]
    maps = ClassMaps(classes, [np.stack([one * 0, one, two]).astype(np.float32) for one, two in zip(planes[1], planes[2])])
    table = toolbox_metrics(maps, test).set_index("metric")["value"]
    printed = {"meanDice": (.624, .362), "meanSen": (.618, .403), "meanSpe": (.966, .766), "MAE": (.067, .039)}
    for metric, (ggo, consolidation) in printed.items():
        assert round(table[f"{metric}_decided_ggo_48"], 3) == ggo
        assert round(table[f"{metric}_decided_consolidation_48"], 3) == consolidation
    assert round(table["Sm_decided_ggo_48"], 3) == .706
    assert table["meanDice_decided_consolidation_38"] == pytest.approx(.457, abs=5e-4)


def test_subsets_and_their_numbers(trained, monkeypatch):
    monkeypatch.setattr(runs, "known_shared", lambda splits_: [True, False, False, False])
    scores = evaluate_multiclass(trained)
    table = scores.metrics.set_index(["subset", "metric"])
    assert table.loc[("test", "dice_ggo_48"), "n"] == 4 and table.loc[("test_without_shared_scans", "dice_ggo_48"), "n"] == 3
    rest = scores.per_image[~scores.per_image["shares_scan"]]
    assert table.loc[("test_without_shared_scans", "dice"), "value"] == pytest.approx(rest["dice"].mean(), nan_ok=True)
    assert table.loc[("test_with_ground_truth_prior", "dice_prior"), "value"] == 1
    focal = trained._replace(settings=trained.settings | {"focal_gamma": 2.0})  # a focal loss is smaller by definition: no result
    losses = [evaluate_multiclass(run).metrics.query("metric == 'test_loss_mean'")["value"].tolist() for run in (trained, focal)]
    assert losses[0] == losses[1]
    monkeypatch.setattr(runs, "known_shared", lambda splits_: [True] * 4)
    assert set(evaluate_multiclass(trained).metrics["subset"]) == {"test", "test_with_ground_truth_prior"}


def test_a_temperature_sharpens_the_maps_and_moves_no_pixel_across_the_threshold(splits, tmp_path):
    run = train_network(placed(SINGLE, tmp_path), splits)
    plain, sharp = (evaluate(run, t).metrics.query("subset == 'test'").set_index("metric")["value"] for t in (None, 0.25))
    assert sharp["dice"] == plain["dice"] and sharp["meanDice"] == plain["meanDice"] and sharp["temperature"] == 0.25
    assert sharp["meanDice_tempered"] != plain["meanDice"] and "meanDice_tempered" not in plain


# whole runs

def test_two_runs_in_two_places_write_the_same_bytes(tmp_path, monkeypatch):
    """Other folders, another working directory; nothing says where they lie."""
    made = []
    for name in ("a", "b c"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        train_run(placed(SINGLE, tmp_path / name))
        made.append({path.name: path.read_bytes() for path in (tmp_path / name / "output").rglob("*.*")})
    assert set(made[0]) == {"metrics.csv", "per_image.csv", "history.csv", "run.json", "unet-seed0.npz"}
    assert made[0] == made[1]
    assert not [name for name, data in made[0].items() if str(tmp_path).encode() in data]


@pytest.mark.parametrize("name", ["train_single", "train_multi", "priors", "pretext", "pseudo_labels"])
def test_the_notebooks_have_neutral_defaults(repository, name):
    """What decides on an amount is not in a notebook: None is everything there is."""
    from covidsev.paper.experiments import lint_notebook, notebook_parameters
    notebook = repository / "nbs" / "experiments" / f"{name}.ipynb"
    assert not lint_notebook(notebook)
    defaults = notebook_parameters(notebook)
    runs.config_of(TrainConfig, defaults)
    assert defaults["data"] == "phantom" and defaults["device"] == "cpu" and defaults["output"] == defaults["checkpoints"] == ""
    assert {defaults.get(each) for each in ("n_train", "n_test", "n_unlabelled")} == {None}
