"""Tables and figures: the render notebooks on whole, partial and missing results, and what their numbers must obey."""
import ast
import re
from functools import cache, partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from covidsev.core import ConfigError, CovidSevError, read_json, repo_root, write_csv, write_json
from covidsev.data.phantom import demo_slice, to_uint8
from covidsev.method.statistics import NOT_TESTED, SUPPORTED, crossed_bootstrap
from covidsev.paper import experiments, tables

REAL_REGISTRY = experiments.load_registry
FOLDER = repo_root() / "nbs" / "experiments"
RENDER = sorted(path for path in FOLDER.glob("*.ipynb") if path.stem.startswith(("table", "figure")))
SINGLE = ["sinfnet", "sinfnet_aug_0.2", "sinfnet_aug_0.4", "sinfnet_aug_0.5", "sinfnet_self", "sinfnet_self_aug_0.5",
          "unet_aug_0.5", "segnet_aug_0.5", "segnet_self_aug_0.5", "semi_loop_aug_0.5", "sinfnet_n10", "sinfnet_self_n10",
          "sinfnet_n50", "sinfnet_self_n50", "sinfnet_focal", "sinfnet_self_focal", "push_size"]
MULTI = ["multi", "multi_aug_0.5", "multi_self", "multi_self_aug_0.5", "multi_focal", "multi_self_focal", "multi_gt_prior"]
PRETEXT = ["infnet_coach", "infnet_random", "infnet_rotation"]
ROWS = {"train_single": SINGLE, "train_multi": MULTI, "pretext": PRETEXT}
CONTROLS = {"sinfnet_aug_0.5": "sinfnet", "sinfnet_self_aug_0.5": "sinfnet_aug_0.5", "push_size": "unet_aug_0.5", "multi_self": "multi"}
CLAIMS = [{"text": "self-supervision helps (here)", "row": "sinfnet_self", "than": "sinfnet", "metric": "dice", "direction": "higher"},
          {"text": "it helps in multi (here)", "experiment": "train_multi", "row": "multi_self", "than": "multi", "metric": "dice",
           "direction": "higher"}]
IDS = [f"s{k}" for k in range(8)]
TOOLBOX = [*tables.TOOLBOX.values(), "soft_dice", "pooled_dice"]


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
    write_csv(folder / "history.csv", pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [3.0, 2.0, 1.5], "val_loss_mean": [2.0, np.nan, 1.0]}))
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
        row: {"title": f"Row {row}", "parameters": {}, "control": CONTROLS.get(row, "")} for row in rows}) for name, rows in ROWS.items()}
    for name in ("table1_test_loss", "table2_dice", "table4_multiclass"):
        claims = tuple(CLAIMS) if name == "table2_dice" else ()
        whole[name] = experiments.Experiment(name, name, FOLDER / f"{name}.ipynb", "render", claims=claims)
    return experiments.Registry(FOLDER, {"smoke": experiments.Profile("smoke", "made-up numbers", (0, 1, 2))}, whole)


@pytest.fixture(scope="module")
def registry() -> experiments.Registry:
    """The registry of this file in place of the real one, and few draws for a bootstrap, which is not tested here."""
    result = make_registry()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "load_registry", lambda: result)
        patch.setattr(tables, "crossed_bootstrap", partial(crossed_bootstrap, draws=50))
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
       for name in ("table1_test_loss", "table2_dice", "table3_toolbox", "table4_multiclass")},
    "table5_ablation": {*(f"tables/table5_ablation.{end}" for end in ("csv", "md", "tex")), *(f"figures/differences_{name}.{end}" for name in ("single", "multi") for end in ("svg", "png"))},
    "figure_label_efficiency": {"figures/label_efficiency.svg", "figures/label_efficiency.png"},
    "figure_coach": {f"figures/{name}.{end}" for name in ("coach", "coach_masks_infnet_coach") for end in ("svg", "png")},
    "figure_reconstruction": {f"figures/reconstruction_{name}.{end}" for name in ("error", "infnet_coach", "infnet_random")
                              for end in ("svg", "png")},
    "figure_learning_curves": {f"figures/learning_curves{name}.{end}" for name in ("", "_beyond") for end in ("svg", "png")},
    "figure_qualitative": {f"figures/qualitative{name}.{end}" for name in ("", "_multi") for end in ("svg", "png")},
}
WITHOUT_RESULTS = {  # they need no run
    "figure_architectures": {f"architecture_{name}.{end}" for name in ("single", "multi") for end in ("svg", "png")},
    "figure_augmentation": {"augmentation.svg", "augmentation.png"}}


def test_every_render_notebook_is_tested():
    assert {path.stem for path in RENDER} >= set(EXPECTED) | set(WITHOUT_RESULTS)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_notebook_writes_its_files(name, rendered):
    _, folder = rendered(name)
    assert written(folder) == EXPECTED[name] | {"run.json"}
    record = read_json(folder / "run.json")
    known = experiments.notebook_parameters(FOLDER / f"{name}.ipynb")
    assert set(record["parameters"]) == {key for key in known if key not in experiments.LOCATIONS}
    assert record["data"]["kind"] == "phantom" and record["shows"]


@pytest.mark.parametrize("name", sorted(WITHOUT_RESULTS))
def test_figures_without_results_are_the_same_bytes_twice(name, tmp_path):
    for part in "ab":
        render(name, tmp_path / "none", tmp_path / part)
    assert {path.name for path in (tmp_path / "a/figures").iterdir()} == WITHOUT_RESULTS[name]
    for path in written(tmp_path / "a"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    assert read_json(tmp_path / "a/run.json")["shows"] == []


@pytest.mark.parametrize("name", ["table3_toolbox", "table5_ablation", "figure_reconstruction"])
def test_the_same_results_give_the_same_bytes(name, made, rendered, tmp_path):
    render(name, made, tmp_path)
    for path in written(tmp_path):
        assert (tmp_path / path).read_bytes() == (rendered(name)[1] / path).read_bytes(), path


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_nothing_to_show_is_said(name, registry, tmp_path):
    with pytest.raises(CovidSevError, match="covidsev reproduce"):
        render(name, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"figure_coach", "figure_reconstruction", "table4_multiclass"}))
def test_one_run_is_shown_and_the_rest_is_not_run(name, registry, tmp_path):
    for row in ("sinfnet_aug_0.5", "sinfnet_n10", "sinfnet"):
        write_run(tmp_path / "one", "train_single", row, 0, "phantom")
    render(name, tmp_path / "one", tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.md"):
        assert "not run" in path.read_text(encoding="utf-8")
        assert "nan" not in path.read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", ["table1_test_loss", "table2_dice", "table5_ablation"])
def test_multi_alone_is_shown(name, registry, tmp_path):
    write_run(tmp_path / "one", "train_multi", "multi", 0, "phantom")
    render(name, tmp_path / "one", tmp_path / "out")
    assert {path for path in EXPECTED[name] if path.startswith("tables/")} <= written(tmp_path / "out")


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


def test_the_paper_rows_stand_in_order_with_two_columns_and_their_controls(rendered):
    space, folder = rendered("table2_dice")
    words = space["words"].set_index("row")
    assert list(words.index) == [row.title for row in tables.PAPER_ROWS]
    assert words.loc["SInfNet + data aug (0.2)", "multi"] == "not run" != words.loc["SInfNet + data aug (0.2)", "single"]
    assert words.loc["Self-super", "multi, against its control"].startswith("+0.0")
    numbers = pd.read_csv(folder / "tables/table2_dice.csv")
    here = numbers[numbers.subset == "test"].set_index("row")
    assert here.index.is_unique and set(here.index) >= {*SINGLE, *MULTI} and here.loc["sinfnet_self", "draft2_printed"] == 0.35
    for row, control in CONTROLS.items():
        assert here.loc[row, "dice"] - here.loc[control, "dice"] == pytest.approx(here.loc[row, "difference"]), row


def test_claims_of_a_phantom_are_not_tested_and_of_real_runs_are(rendered, registry, tmp_path):
    for seed in range(3):
        for experiment, row in (("train_single", "sinfnet"), ("train_single", "sinfnet_self"), ("train_multi", "multi"), ("train_multi", "multi_self")):
            write_run(tmp_path / "real", experiment, row, seed, "real")
    assert list(rendered("table2_dice")[0]["judged"].outcome) == [NOT_TESTED] * 2
    judged = render("table2_dice", tmp_path / "real", tmp_path / "out")["judged"]
    assert list(judged.outcome) == [SUPPORTED] * 2 and list(judged.data) == ["real, 3 seeds, n = 8"] * 2


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


def test_both_conventions_of_consolidation(rendered):
    numbers = rendered("table4_multiclass")[0]["numbers"]
    unet = numbers[numbers.row == "Semi-Inf-Net & U-Net"].set_index("class").meanDic
    assert unet["consolidation, every slice"] == pytest.approx(0.362) and unet["consolidation, slices that show it"] == pytest.approx(0.457)


def test_ablation_changes_one_thing_in_both_arms(rendered):
    numbers = rendered("table5_ablation")[0]["numbers"]
    assert set(numbers[(numbers.change == "focal loss") & (numbers.column == "multi")].arm) == {"supervised", "self-supervised"}
    line = numbers[(numbers.row == "multi_self_focal") & (numbers.than == "multi_focal") & (numbers.metric == "dice")].iloc[0]
    assert line.difference == pytest.approx(0.05, abs=0.02) and line.low < line.difference < line.high
    assert (numbers.seeds == 0).any()  # Lookahead was not run here


def test_label_efficiency_pairs_equal_numbers_of_slices(rendered):
    gain = rendered("figure_label_efficiency")[0]["gain"]
    assert list(gain.labelled) == [10, 50] and gain.difference.between(0, 0.1).all()


def run(row: str, values: list[float], experiment: str = "train_single") -> pd.DataFrame:
    return pd.DataFrame({"experiment": experiment, "row": row, "seed": range(len(values)), "subset": "test", "metric": "dice", "value": values, "n": 3})


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-1, 1))
def test_summary_moves_with_the_values_and_holds_the_mean(values, shift):
    one, moved = (tables.summary(run("a", [value + by for value in values]), {"a": "A"}, ["dice"]).iloc[0] for by in (0, shift))
    names = ["dice_low", "dice", "dice_high"]
    assert one.dice_low <= one.dice <= one.dice_high
    assert list(moved[names]) == pytest.approx([one[name] + shift for name in names], abs=1e-9)


def test_comparison_is_antisymmetric_and_seeds_need_no_pairs(tmp_path):
    runs = {}
    for row, seeds in (("sinfnet", (0, 1, 2)), ("sinfnet_aug_0.5", (5, 6))):
        for seed in seeds:
            write_run(tmp_path, "train_single", row, seed, "real")
            runs[row, seed] = tmp_path / "train_single" / f"{row}-seed{seed}"
    there, back = (tables.compare(runs, *pair, "dice") for pair in (("sinfnet", "sinfnet_aug_0.5"), ("sinfnet_aug_0.5", "sinfnet")))
    assert there.difference == pytest.approx(-back.difference) and there.seeds == back.seeds == 2 and there.n == 8
    assert (there.welch_low, there.welch_high) == pytest.approx((-back.welch_high, -back.welch_low))
    assert there.decides() == (there.low, there.high) and there.high < 0 < back.low


def test_results_of_the_repository_can_be_read():
    """The committed runs on real slices: every metric that the tables ask for is there."""
    runs = tables.read_runs(repo_root() / "results" / "cpu", REAL_REGISTRY(), "train_single")
    metrics = tables.collect(runs)
    assert {"dice", "test_loss_sum", "test_loss_mean", *TOOLBOX} <= set(metrics[metrics.subset == "test"].metric)
    assert tables.describe(runs, "cpu").startswith("real · cpu · seeds 0-")


# ---------------------------------------------------------------- the audit


@pytest.fixture(scope="module")
def audit(tmp_path_factory) -> tuple[dict, Path]:
    """The audit with two seeds and few epochs."""
    folder = tmp_path_factory.mktemp("results") / "audit"
    return render("audit", folder, folder, seeds=[0, 1], patients=2, epochs=8), folder


def test_every_entry_of_the_audit_is_measured_and_no_sentence_has_a_gap(audit):
    space, folder = audit
    effects, numbers = (pd.read_csv(folder / f"{name}.csv") for name in ("effects", "audit"))
    assert set(effects.entry) == set(space["ENTRIES"].entry) and set(effects.data) <= {"printed", "theory", "phantom", "real"}
    assert not effects.effect.str.contains(r"[{}]|\bnan\b").any() and (effects.n > 0).all()
    assert np.isfinite(numbers.value).all() and set(numbers.result) == set(range(len(effects)))
    with pytest.raises(AssertionError):
        space["note"]("no_such_entry", "theory", 1, "", "")


def test_the_audit_table_reads_it_back_with_and_without_runs(audit, registry, tmp_path):
    for seed in range(3):
        for row in ("sinfnet", "sinfnet_aug_0.5"):
            write_run(audit[1].parent, "train_single", row, seed, "real")
    words = render("table_audit", audit[1].parent, tmp_path / "a")["words"]
    assert (words.data == "real").sum() == 4 and any("6 runs" in n for n in words.n)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/audit").symlink_to(audit[1])
    assert len(render("table_audit", tmp_path / "alone", tmp_path / "b")["words"]) == len(words) - 3
    with pytest.raises(CovidSevError, match="covidsev reproduce --only audit"):
        render("table_audit", tmp_path / "none", tmp_path / "c")
