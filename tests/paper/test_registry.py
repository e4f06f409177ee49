"""What a row is called and what its run would get: each title of the registry against the settings and promises behind it."""
import re

import pytest

from covidsev.method.coach import PretextConfig
from covidsev.method.training import TrainConfig, epoch_batches
from covidsev.paper.experiments import Registry, load_registry, plan_runs, resolve
from covidsev.paper.runs import ALL_OF, config_of

FULL = ALL_OF["covid-semiseg"]
TRAINED = ("train_single", "train_multi", "priors", "pseudo_labels", "pretext")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry()


def rows(registry, profile, *names):
    for name in names:
        for row in registry.profiles[profile].rows.get(name, registry.experiments[name].rows):
            yield name, row, registry.experiments[name].rows[row]["title"], resolve(registry, profile, name, row, 0)


def planned_steps(settings: dict, n: int) -> int:
    """Steps of a supervised run on `n` slices."""
    config = config_of(TrainConfig, settings)
    batches = epoch_batches(n, config.batch_size, config.seed, 0, config.images_per_epoch)
    return config.epochs * len(batches) * len(config.scales)


def pretext_steps(settings: dict) -> tuple[int, int]:
    """Steps of the network and of the coach."""
    config = config_of(PretextConfig, settings)
    batches = (config.images_per_epoch or FULL["n_train"]) // config.batch_size
    turns = config.phases.count("coach")
    return batches * (len(config.phases) - turns), batches * turns


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_a_row_gets_the_slices_that_its_title_says(registry, profile):
    """All 50 labels, unless the title says another number; all 1,600 slices of the pool; a promise for each."""
    for name, row, title, run in rows(registry, profile, *TRAINED):
        settings, few = run.parameters, re.search(r"(\d+) training slices", title)
        n = int(few[1]) if few else None
        assert settings["n_train"] == n and settings["n_test"] is None and settings["data"] == "covid-semiseg", row
        promised = 462 if settings.get("more_data") else n or FULL["n_train"]
        assert run.expects["n_train"] == promised, row
        assert ("MedSeg" in title) == bool(settings.get("more_data")), row
        pooled = settings.get("images") == "unlabelled" or name == "pseudo_labels"
        assert settings.get("n_unlabelled") is None and run.expects.get("n_pool", 0) == pooled * FULL["n_pool"], row
        if name == "pretext":
            assert ("pool" in title) == pooled, row


@pytest.mark.parametrize("profile, short, long", [("cpu", 2_000, 10_000), ("paper", 2_500, 20_000)])
def test_pretexts_are_as_long_as_promised_and_their_coach_keeps_up(registry, profile, short, long):
    for _, row, title, run in rows(registry, profile, "pretext"):
        steps, coach = pretext_steps(run.parameters)
        assert steps == run.expects["steps"] == (long if "long" in title else short), row
        if run.parameters["masks"] == "coach":
            assert coach / steps >= 0.2, row


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_arms_of_a_comparison_take_the_same_steps(registry, profile):
    """But for the pretext's twin with its steps spent on supervised training, which takes exactly as many more."""
    steps = {}
    for name, row, _, run in rows(registry, profile, "train_single", "train_multi"):
        steps[name, row] = planned_steps(run.parameters, run.parameters["n_train"] or FULL["n_train"])
    long = steps.pop(("train_single", "sinfnet_long_aug_0.5"))
    pretext, _ = pretext_steps(resolve(registry, profile, "pretext", "infnet_coach", 0).parameters)
    plain = steps["train_single", "sinfnet_aug_0.5"]
    assert plain + pretext <= long <= 1.02 * (plain + pretext)
    for kind in ("train_single", "train_multi"):
        assert len({count for (name, row), count in steps.items() if name == kind and not row.startswith("push_")}) == 1
    assert len({count for (_, row), count in steps.items() if row.startswith("push_")}) == 1
    assert all(count >= 6 * resolve(registry, profile, *row, 0).parameters["epochs"] for row, count in steps.items())


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_cutout_and_augmentation_are_what_the_title_says(registry, profile):
    for _, row, title, run in rows(registry, profile, "train_single", "train_multi"):
        settings, named = run.parameters, re.search(r"data aug(?: \((\d\.\d)( of the area)?\))?", title)
        if row.startswith("push_") or "training slices" in title:
            continue
        assert settings["augment"] == ("paper" if named else "none"), row
        assert settings["cutout"] == (float(named[1]) if named and named[1] else 0.0), row
        assert settings["cutout_mode"] == ("area" if named and named[2] else "side"), row


def test_every_row_has_a_control_in_which_one_thing_differs(registry):
    """Also every pushed row: larger or longer alone is not the method."""
    base = {"sinfnet", "multi", "infnet_coach", "segnet_coach", "multi_coach", "infnet_coach_plain"}
    for name in ("train_single", "train_multi", "pretext"):
        for row, content in registry.experiments[name].rows.items():
            assert (content.get("control", "") in registry.experiments[name].rows) == (row not in base), row
    for row in ("push_semi_unet", "push_self"):
        mine = registry.experiments["train_single"].rows[row]
        twin = registry.experiments["train_single"].rows[mine["control"]]["parameters"]
        assert {**twin, "start": mine["parameters"]["start"]} == mine["parameters"]


def test_a_row_without_augmentation_starts_from_a_pretext_without(registry):
    for name in ("train_single", "train_multi"):
        for row, content in registry.experiments[name].rows.items():
            start = content["parameters"].get("start", "")
            if start.startswith("pretext/") and "long" not in row:
                pretext = registry.experiments["pretext"].rows[start.removeprefix("pretext/").partition("%")[0]]["parameters"]
                plain = content["parameters"].get("augment", "none") == "none"
                assert (pretext.get("augment", "none") == "none") == plain or pretext.get("task") == "rotation", row


def test_each_prior_is_of_the_same_seed_and_few_label_rows_share_five_pretexts(registry):
    runs = {run.name: run for run in plan_runs(registry, "cpu", ["train_multi", "train_single"])}
    for run in runs.values():
        if run.experiment == "train_multi":
            assert f"priors/infnet-seed{run.seed}" in run.needs
    assert runs["train_single/sinfnet_self_n10-seed17"].needs == ("pretext/infnet_pool-seed2",)
    assert len([run for run in runs.values() if run.row == "sinfnet_n5"]) == 20
    assert len([run for run in runs.values() if run.row == "sinfnet"]) == 10


def test_three_losses_of_the_coach_are_registered(registry):
    named = {content["parameters"].get("coach_loss", "squares") for content in registry.experiments["pretext"].rows.values()}
    assert named == {"squares", "cross_entropy", "through_network"}


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_the_settings_of_the_rows_are_among_those_that_were_tried(registry, profile):
    """`selection` chooses on the training slices; its notebook stops where its choice is not what stands here."""
    tried = resolve(registry, profile, "selection", "infnet", 0).parameters
    stands = registry.profiles[profile].parameters["train_single"]
    for name, values in (("size", "sizes"), ("epochs", "epochs_tried"), ("learning_rate", "rates"), ("ema", "means")):
        assert stands[name] in tried[values], name
    assert {name: tried[name] for name in ("batch_size", "warmup_epochs", "n_train")} == {
        "batch_size": stands["batch_size"], "warmup_epochs": stands["warmup_epochs"], "n_train": None}
