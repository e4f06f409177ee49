"""Tables and figures: the render notebooks on whole, partial and missing results, and what their numbers must obey."""
import ast
import json
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from covidsev.paper import experiments
from covidsev.paper import tables
from covidsev.core import ConfigError, repo_root
from covidsev.method.metrics import bootstrap_ci
from covidsev.data.phantom import demo_slice, to_uint8
from covidsev.core import read_json, write_csv, write_json

REAL_REGISTRY = experiments.load_registry
FOLDER = repo_root() / "nbs" / "experiments"
RENDER = sorted(path for path in FOLDER.glob("*.ipynb") if path.stem.startswith(("table", "figure")))
SINGLE = ["sinfnet", "sinfnet_aug_0.2", "sinfnet_aug_0.4", "sinfnet_aug_0.5", "sinfnet_self", "sinfnet_self_aug_0.5",
          "unet_aug_0.5", "segnet_aug_0.5", "segnet_self_aug_0.5", "semi_loop_aug_0.5", "sinfnet_n10", "sinfnet_self_n10", "sinfnet_n50", "sinfnet_self_n50",
          "sinfnet_focal", "sinfnet_self_focal", "push_size"]
MULTI = ["multi", "multi_aug_0.5", "multi_self", "multi_self_aug_0.5", "multi_focal", "multi_self_focal", "multi_gt_prior"]
PRETEXT = ["infnet_coach", "infnet_random", "infnet_rotation"]
ROWS = {"train_single": SINGLE, "train_multi": MULTI, "pretext": PRETEXT}
CLAIMS = [{"text": "self-supervision helps", "row": "sinfnet_self", "than": "sinfnet", "metric": "dice", "direction": "higher"},
          {"text": "it helps in multi", "experiment": "train_multi", "row": "multi_self", "than": "multi", "metric": "dice",
           "direction": "higher"}]
IDS = [f"s{k}" for k in range(8)]
TOOLBOX = [*tables.TOOLBOX.values(), "soft_dice", "pooled_dice", "dice_at_val_threshold"]


def level(row: str) -> float:
    """Dice of a made-up row: self-supervision is worth .05, cutout c is worth c / 10."""
    cut = re.search(r"aug_(0\.\d)", row)
    return 0.5 + 0.05 * ("_self" in row) + (float(cut[1]) / 10 if cut else 0) - 0.1 * ("n10" in row)


def write_run(results: Path, experiment: str, row: str, seed: int, kind: str) -> None:
    """One run of training in the format of its notebook, with made-up numbers."""
    rng = np.random.default_rng([seed, sum(row.encode())])
    folder, dice = results / experiment / f"{row}-seed{seed}", np.clip(level(row) + rng.normal(0, 0.01, len(IDS)), 0, 1)
    names = {name: dice.mean() for name in TOOLBOX} | {"test_loss_mean": 1 - dice.mean(), "test_loss_sum": 4 - 4 * dice.mean()}
    if experiment == "train_multi":
        names = {"dice": dice.mean(), "test_loss_mean": 1 - dice.mean(), "test_loss_sum": 1 - dice.mean()}
        for name in ("ggo", "consolidation", "lesion"):
            for rule in ("48", "38"):
                names |= {f"{score}{between}_{name}_{rule}": dice.mean() for score in ("dice", *tables.TOOLBOX.values())
                          for between in ("", "_decided")}
    other = {"val": ["dice"], "test_without_shared_scans": [name for name in names if "decided" not in name],
             **({"test_with_ground_truth_prior": ["dice", "dice_ggo_48"]} if experiment == "train_multi" else {})}
    metrics = [{"subset": subset, "metric": name, "value": names[name], "n": len(IDS)}
               for subset, chosen in {"test": list(names), **other}.items() for name in chosen]
    images = pd.DataFrame({"id": IDS, "group": [f"g{k // 2}" for k in range(len(IDS))], "dice": dice, "dice_ggo": dice,
                           "dice_consolidation": dice, "shares_scan": [k == 0 for k in range(len(IDS))]})
    write_csv(folder / "metrics.csv", pd.DataFrame(metrics))
    write_csv(folder / "per_image.csv", images)
    write_csv(folder / "history.csv", pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.5], "val_loss_mean": [2.0, np.nan, 1.0],
                                                    "val_dice": [0.1, np.nan, 0.4]}))
    record = {"parameters": {"profile": "smoke", "row": row, "seed": seed, "augment": row}, "init": "scratch",
              "data": {"kind": kind, "name": "toy", "splits": {"train": {"n": int(row.rpartition("_n")[2]) if "_n" in row else 40}}}}
    write_json(folder / "run.json", record)


def write_pretext(results: Path, local: Path, row: str, seed: int, kind: str) -> None:
    """One pretext run in the format of its notebook."""
    folder, phases = results / "pretext" / f"{row}-seed{seed}", ["warm-up", "warm-up", "coach", "network"]
    epochs = np.arange(len(phases))
    history = pd.DataFrame({"epoch": epochs, "phase": phases, "loss": 1 / (1 + epochs)})
    if row == "infnet_rotation":
        history["accuracy"] = 0.5
    else:
        coach = 0.3 + 0.01 * epochs if row.endswith("coach") else np.nan
        history = history.assign(erased=0.27, rec_random=0.3, rec_coach=coach, spatial_entropy=0.5, cell_entropy=0.8)
    write_csv(folder / "history.csv", history)
    write_csv(folder / "metrics.csv", pd.DataFrame([{"metric": "ratio_last", "value": 1.1, "n": 2}]))
    write_json(folder / "run.json", {"parameters": {"row": row, "seed": seed}, "init": "scratch", "data": {"kind": kind, "n": 24}})
    watched = np.full((2, 1, 32, 32), 90, np.uint8)
    local.joinpath("pretext").mkdir(parents=True, exist_ok=True)
    pictures = {} if row == "infnet_rotation" else {f"picture_{k}": watched for k in (1, 2, 3)}
    np.savez_compressed(local / "pretext" / f"{row}-seed{seed}.npz", watched=watched, masks=np.ones((4, 2, 1, 2, 2), bool),
                        epochs=epochs, phases=np.array(phases), **pictures)


def write_maps(local: Path, row: str, classes: bool) -> None:
    """The maps of one run, as it leaves them on the machine."""
    demo = demo_slice()
    truth = demo.labels if classes else demo.labels > 0
    arrays = {f"{name}_{k}": value for k in range(len(IDS))
              for name, value in (("image", to_uint8(demo.hu)), ("truth", truth), ("map", truth * (1 if classes else 255)))}
    local.joinpath("maps").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(local / "maps" / f"{row}-seed0.npz", **{name: value.astype(np.uint8) for name, value in arrays.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Made-up results of every row and two seeds, and the local files of the first ones."""
    root = tmp_path_factory.mktemp("made")
    for seed in range(2):
        for experiment in ("train_single", "train_multi"):
            for row in ROWS[experiment]:
                write_run(root, experiment, row, seed, "phantom")
        for row in PRETEXT:
            write_pretext(root, root / "local", row, seed, "phantom")
    write_maps(root / "local", "sinfnet", classes=False)
    write_maps(root / "local", "multi", classes=True)
    return root


def make_registry() -> experiments.Registry:
    """A registry with the rows of this file."""
    whole = {name: experiments.Experiment(name, name, FOLDER / f"{name}.ipynb", "compute", rows={
        row: {"title": f"Row {row}", "parameters": {}} for row in rows}) for name, rows in ROWS.items()}
    for name in ("table1_test_loss", "table2_dice", "table4_multiclass"):
        whole[name] = experiments.Experiment(name, name, FOLDER / f"{name}.ipynb", "render", claims=tuple(CLAIMS))
    return experiments.Registry(FOLDER, {"smoke": experiments.Profile("smoke", "made-up numbers", (0, 1, 2))}, whole)


@pytest.fixture(scope="module")
def registry() -> experiments.Registry:
    """The registry of this file in place of the real one, and few draws for a bootstrap, which is not tested here."""
    result = make_registry()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "load_registry", lambda: result)
        patch.setattr(tables, "bootstrap_ci", partial(bootstrap_ci, draws=50))
        yield result


def render(name: str, results: Path, output: Path, **more) -> dict:
    """Runs the code cells of a render notebook with the places of a test; returns its globals."""
    cells = experiments.code_cells(FOLDER / f"{name}.ipynb")
    known = experiments.plain_literals(cells[0]["source"])
    given = {"results": str(results), "output": str(output), "local": str(results / "local"), **more}
    space = {**known, **{key: value for key, value in given.items() if key in known}}
    for cell in cells[1:]:
        exec(compile(ast.parse(cell["source"]), f"{name}.ipynb", "exec"), space)
    plt.close("all")
    return space


@pytest.fixture(scope="module")
def rendered(made, registry, tmp_path_factory):
    """name -> globals and folder of a notebook on the made-up results, run once for all tests."""
    @cache
    def run(name: str) -> tuple[dict, Path]:
        folder = tmp_path_factory.mktemp(name)
        return render(name, made, folder), folder

    return run


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {
    **{name: {f"tables/{name}.{end}" for end in ("csv", "md", "tex")}
       for name in ("table1_test_loss", "table2_dice", "table3_toolbox", "table4_multiclass", "table5_ablation")},
    "figure_label_efficiency": {"figures/label_efficiency.svg", "figures/label_efficiency.png"},
    "figure_coach": {f"figures/{name}.{end}" for name in ("coach", "coach_masks_infnet_coach") for end in ("svg", "png")},
    "figure_reconstruction": {f"figures/reconstruction_{name}.{end}" for name in ("error", "infnet_coach", "infnet_random")
                              for end in ("svg", "png")},
    "figure_learning_curves": {f"figures/learning_curves{name}.{end}" for name in ("", "_beyond") for end in ("svg", "png")},
    "figure_qualitative": {f"figures/qualitative{name}.{end}" for name in ("", "_multi") for end in ("svg", "png")},
}


WITHOUT_RESULTS = {"figure_architectures", "figure_augmentation"}  # see test_illustrations.py


def test_every_render_notebook_is_tested():
    assert {path.stem for path in RENDER} >= set(EXPECTED) | WITHOUT_RESULTS


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_notebook_writes_its_files(name, rendered):
    _, folder = rendered(name)
    assert written(folder) == EXPECTED[name] | {"run.json"}
    record = read_json(folder / "run.json")
    known = experiments.notebook_parameters(FOLDER / f"{name}.ipynb")
    assert set(record["parameters"]) == {key for key in known if key not in experiments.LOCATIONS}
    assert record["data"]["kind"] == "phantom" and record["shows"]


@pytest.mark.parametrize("name", ["table3_toolbox", "figure_label_efficiency", "figure_reconstruction"])
def test_the_same_results_give_the_same_bytes(name, made, rendered, tmp_path):
    render(name, made, tmp_path)
    for path in written(tmp_path):
        assert (tmp_path / path).read_bytes() == (rendered(name)[1] / path).read_bytes(), path


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_nothing_to_show_is_said(name, registry, tmp_path):
    with pytest.raises(ConfigError, match="covidsev reproduce"):
        render(name, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"figure_coach", "figure_reconstruction", "table4_multiclass"}))
def test_one_run_is_shown_and_the_rest_is_not_run(name, registry, tmp_path):
    for row in ("sinfnet_aug_0.5", "sinfnet_n10"):
        write_run(tmp_path / "one", "train_single", row, 0, "phantom")
    write_run(tmp_path / "one", "train_single", "sinfnet", 0, "phantom")
    render(name, tmp_path / "one", tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.md"):
        assert "not run" in path.read_text(encoding="utf-8")
        assert "nan" not in path.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", ["table1_test_loss", "table5_ablation"])
def test_multi_alone_is_shown(name, registry, tmp_path):
    write_run(tmp_path / "one", "train_multi", "multi", 0, "phantom")
    render(name, tmp_path / "one", tmp_path / "out")
    assert EXPECTED[name] <= written(tmp_path / "out")


@pytest.mark.parametrize("name", ["figure_qualitative", "figure_coach", "figure_reconstruction"])
def test_pictures_of_real_slices_stay_local(name, made, registry, tmp_path):
    """Curves may be published, pictures may not: they go to local/, which git ignores."""
    for seed in range(2):
        write_run(tmp_path / "r", "train_single", "sinfnet", seed, "real")
        write_run(tmp_path / "r", "train_multi", "multi", seed, "real")
        write_pretext(tmp_path / "r", tmp_path / "r/local", "infnet_coach", seed, "real")
    for row, classes in (("sinfnet", False), ("multi", True)):
        write_maps(tmp_path / "r/local", row, classes)
    render(name, tmp_path / "r", tmp_path / "out")
    public = {path for path in written(tmp_path / "out") if path.startswith("figures/")}
    assert public <= {f"figures/{stem}.{end}" for stem in ("coach", "reconstruction_error") for end in ("svg", "png")}
    assert any(path.startswith("local/") for path in written(tmp_path / "out"))


def test_missing_pictures_are_named_and_left_out(registry, tmp_path, capsys):
    write_run(tmp_path / "r", "train_single", "sinfnet", 0, "phantom")
    render("figure_qualitative", tmp_path / "r", tmp_path / "out", local=str(tmp_path))
    assert "no maps on this machine for: sinfnet" in capsys.readouterr().out
    assert written(tmp_path / "out") == {"run.json"}


def test_the_paper_rows_stand_in_order_with_two_columns(rendered):
    space, folder = rendered("table2_dice")
    words = space["words"].set_index("row")
    assert list(words.index) == [row.title for row in tables.PAPER_ROWS]
    assert words.loc["SInfNet + data aug (0.2)", "multi"] == "not run" != words.loc["SInfNet + data aug (0.2)", "single"]
    assert words.loc["Self-super", "multi, difference"].startswith("+0.0")
    numbers = pd.read_csv(folder / "tables/table2_dice.csv")
    here = numbers[numbers.subset == "test"].set_index("row")
    assert here.index.is_unique and set(here.index) >= {*SINGLE, *MULTI}
    assert here.loc["sinfnet_self", "draft2_reread"] == pytest.approx(0.65)
    assert here.loc["multi_self", "dice_mean"] - here.loc["multi", "dice_mean"] == pytest.approx(here.loc["multi_self", "difference"])


def test_claims_of_a_phantom_are_not_tested_and_of_real_runs_are(rendered, registry, tmp_path):
    for seed in range(3):
        for experiment, row in (("train_single", "sinfnet"), ("train_single", "sinfnet_self"), ("train_multi", "multi"), ("train_multi", "multi_self")):
            write_run(tmp_path / "real", experiment, row, seed, "real")
    for outcome, claims in (("NOT TESTED", rendered("table2_dice")[0]["claims"]),
                            ("PASS", render("table2_dice", tmp_path / "real", tmp_path / "out")["claims"])):
        assert list(claims.outcome) == [outcome] * 2
        assert all("n = 8, p (Holm)" in text for text in claims.slices)


def test_real_and_phantom_are_not_mixed(registry, tmp_path):
    write_run(tmp_path / "r", "train_single", "sinfnet", 0, "real")
    write_run(tmp_path / "r", "train_multi", "multi", 0, "phantom")
    with pytest.raises(ConfigError, match="mixed in one table"):
        render("table1_test_loss", tmp_path / "r", tmp_path / "out")


def test_published_rows_stand_below_ours(rendered):
    words = rendered("table3_toolbox")[0]["words"]
    assert list(words["from"]).index("published") == (words["from"] == "ours").sum()
    semi = words.set_index("row").loc["Semi-Inf-Net"]
    assert (semi["meanDic"], semi["Dice @0.5"]) == ("0.739", "0.770")
    assert words.set_index("row").loc["Row push_size", "seeds"] == 2
    assert words.set_index("row").loc["semi_released_aug_0.5", "meanDic"] == "not run"


def test_both_conventions_of_consolidation(rendered):
    numbers = rendered("table4_multiclass")[0]["numbers"]
    unet = numbers[(numbers.row == "Semi-Inf-Net & U-Net") & (numbers["class"] == "consolidation")].set_index("rule").meanDic
    assert unet["48"] == pytest.approx(0.362) and unet["38"] == pytest.approx(0.457)


def test_ablation_changes_one_thing_in_both_arms(rendered):
    pairs = tables.ablations("sinfnet")
    assert {pair.arm for pair in pairs if pair.change == "focal loss"} == {"supervised", "self-supervised"}
    numbers = rendered("table5_ablation")[0]["numbers"]
    line = numbers[(numbers.row == "sinfnet_self_focal") & (numbers.base == "sinfnet_focal")].iloc[0]
    assert line.difference == pytest.approx(0.05, abs=0.02) and line.p_holm >= line.p
    assert (numbers.seeds == 0).any()  # Lookahead was not run here


def test_rows_that_are_compared_are_in_the_registry():
    compared = {row for pair in [*tables.ablations("sinfnet"), *tables.PRETEXTS] for row in (pair.row, pair.base)}
    known = set(REAL_REGISTRY().profiles["cpu"].rows["train_single"])
    assert len(compared) >= 10 and compared <= known


def differing(experiment: str, *rows: str) -> set[str]:
    """The parameters in which two rows differ in profile cpu, but for their names."""
    one, other = (experiments.resolve(REAL_REGISTRY(), "cpu", experiment, row, 0).parameters for row in rows)
    return {name for name in one if one[name] != other[name]} - {"row"}


def test_a_line_on_the_pretext_changes_one_setting():
    """The two rows of a line differ in where they start, and the pretexts they start from in one thing."""
    whole_task = {"rotation, no inpainting": {"task", "masks", "augment"}}  # a task that erases nothing and turns the images itself
    for pair in tables.PRETEXTS:
        assert differing("train_single", pair.row, pair.base) == {"start"}, pair.change
        starts = [experiments.resolve(REAL_REGISTRY(), "cpu", "train_single", row, 0).parameters["start"] for row in (pair.row, pair.base)]
        if all(start.startswith("pretext/") for start in starts):
            found = differing("pretext", *(start.removeprefix("pretext/") for start in starts))
            assert len(found) == 1 or found == whole_task.get(pair.change), pair.change


def test_label_efficiency_pairs_equal_slices_and_seeds(made, registry):
    rows = [row for arm in tables.EFFICIENCY.values() for row in arm]
    points = tables.efficiency_points(tables.read_runs(made, "train_single", rows, range(3)))
    gain = tables.arm_differences(points)
    assert sorted(gain.n.unique()) == [10, 50] and len(gain) == 4
    one = points.set_index(["arm", "n", "seed"]).value
    line = gain.iloc[0]
    assert line.value == pytest.approx(one["with pretext", line.n, line.seed] - one["without pretext", line.n, line.seed])


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-1, 1))
def test_interval_moves_with_the_values_and_holds_the_mean(values, shift):
    mean, low, high = tables.seed_interval(values)
    assert low <= mean <= high
    moved = tables.seed_interval([value + shift for value in values])
    assert moved == pytest.approx((mean + shift, low + shift, high + shift), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6, unique_by=lambda each: each[0]))
def test_matched_is_antisymmetric(values):
    lines = [{"row": row, "seed": seed, "subset": "test", "metric": "dice", "value": value, "n": 3, "experiment": "train_single"}
             for seed, *pair in values for row, value in zip("ab", pair)]
    there, back = (tables.matched(pd.DataFrame(lines), *pair, "dice") for pair in ("ab", "ba"))
    assert there[0] == pytest.approx(-back[0]) and there[3] == back[3] == len(values)
    assert there[1:3] == pytest.approx((-back[2], -back[1]), nan_ok=True)


@given(st.lists(st.floats(0.3, 0.5), min_size=3, max_size=3), st.sampled_from(["higher", "lower"]))
def test_a_claim_and_its_opposite_never_both_hold(values, direction):
    lines = [{"row": row, "seed": seed, "subset": "test", "metric": "dice", "value": value + 0.1 * (row == "b"), "n": 3, "experiment": "e"}
             for seed, value in enumerate(values) for row in "ab"]
    claim = {"text": "t", "row": "b", "than": "a", "metric": "dice", "direction": direction, "experiment": "e"}
    opposite = {**claim, "direction": {"higher": "lower", "lower": "higher"}[direction]}
    outcomes = [tables.judge(each, pd.DataFrame(lines), "real")["outcome"] for each in (claim, opposite)]
    assert sorted(outcomes) == ["FAIL", "PASS"] and (outcomes[0] == "PASS") == (direction == "higher")


def test_a_claim_without_experiment_means_train_single():
    metrics = pd.concat([pd.DataFrame([{"row": row, "seed": seed, "subset": "test", "metric": "dice", "value": value, "n": 1, "experiment": name}
                                       for seed in range(2) for row, value in values.items()])
                         for name, values in (("train_single", {"a": 0.1, "b": 0.2}), ("train_multi", {"a": 0.9, "b": 0.2}))])
    metrics["value"] += 0.001 * metrics["seed"]
    claim = {"text": "t", "row": "b", "than": "a", "metric": "dice", "direction": "higher"}
    assert tables.judge(claim, metrics, "real")["outcome"] == "PASS"
    assert tables.judge({**claim, "experiment": "train_multi"}, metrics, "real")["outcome"] == "FAIL"
    assert tables.judge({**claim, "experiment": "priors"}, metrics, "real")["outcome"] == "NOT TESTED"


def test_two_experiments_with_one_row_name_are_refused(registry, tmp_path):
    clash = replace(registry, experiments={**registry.experiments, "train_multi": registry.experiments["train_single"]})
    write_run(tmp_path, "train_single", "sinfnet", 0, "phantom")
    write_run(tmp_path, "train_multi", "sinfnet", 0, "phantom")
    with pytest.raises(ConfigError, match="same name"):
        tables.read_many(tmp_path, clash, "smoke", ["train_single", "train_multi"])


def test_results_of_the_repository_can_be_read():
    """The committed runs on real slices: every metric that the tables ask for is there."""
    results = repo_root() / "results" / "cpu"
    registry = REAL_REGISTRY()
    runs = tables.read_runs(results, "train_single", registry.titles("train_single"), registry.profiles["cpu"].seeds)
    metrics = tables.collect(runs)
    wanted = {*tables.DICE_METRICS, *tables.LOSS_METRICS, *tables.TOOLBOX.values()}
    assert wanted <= set(metrics[metrics.subset == "test"].metric)
    assert tables.describe(runs, "cpu").startswith("real · cpu · seeds 0-2 · n = 48")


def test_no_render_notebook_trains():
    for path in RENDER:
        source = "\n".join(cell["source"] for cell in experiments.code_cells(path))
        assert not re.search(r"import .*\b(training|runs|semi|\w+_runs)\b|\bfit\(|pretrain\(", source), path.name
        assert len(json.loads(path.read_text(encoding="utf-8"))["cells"]) <= 30, path.name
