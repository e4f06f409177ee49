"""What `gpu_check.sh` runs: the library on this device, part by part; a part that fails says so, and the next one goes on."""
import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
try:
    import nibabel  # noqa: F401
except ImportError:  # no scan is read here, but the library imports it at its top
    sys.modules |= {name: MagicMock() for name in ("nibabel", "nibabel.arrayproxy", "nibabel.orientations",
                                                   "nibabel.spatialimages")}

import torch

from covidsev.core import data_root, environment, git_commit, resolve_device, resolve_precision, write_json
from covidsev.method.inference import iterate_logits
from covidsev.paper import runs, starts
from covidsev.paper.experiments import load_registry, notebook_parameters, plan_runs

SMALL = {"size": 64, "backbone": "small", "coach_backbone": "small", "batch_size": 2, "images_per_epoch": 8,
         "n_train": 4, "n_test": 2, "n_unlabelled": 8, "warmup_epochs": 1, "data": "phantom"}


def executed(name, **given):
    """What a notebook defines: its cells, one after the other, without a kernel."""
    notebook, module = ROOT / "nbs" / "experiments" / f"{name}.ipynb", ModuleType(f"notebook_{name}")
    sys.modules[module.__name__], scope = module, vars(module)  # where its other processes look for what it defines
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(notebook), "exec"), scope)
            scope.update(given if "parameters" in cell["metadata"].get("tags", []) else {})
    return scope


def settings_of(experiment, row, options, **more):
    """The settings of a row of profile `paper`, its results in a folder that goes away."""
    run = next(run for run in plan_runs(load_registry(), "paper", [experiment], [row]) if run.row == row)
    place = options.place / f"{experiment}-{time.monotonic_ns()}"
    settings = {**notebook_parameters(run.notebook), **run.parameters, "device": options.device,
                "output": f"{place}/output", "checkpoints": f"{place}/checkpoints",
                "data_root": str(data_root() or ""), **more}
    settings |= {} if data_root() else {"data": "phantom", "n_train": 50, "n_test": 48}
    return settings | ({name: value for name, value in SMALL.items() if name in settings} if options.small else {})


def memory_mib():
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def steps(options, scope):
    """Our training step, evaluation and scores against the published ones: ratios, megabytes, differences."""
    case = [64, 2, "small"] if options.small else [352, 8, "res2net50"]
    scope |= executed("benchmark", what="steps", cases=[case], repeats=1 if options.small else 5,
                      device=options.device, output=str(options.place))
    return scope["steps"].to_dict("records")


def precision(options, scope):
    """How far logits and the losses of five steps are from float32 on the CPU; TF32 must stay off by itself."""
    case, device = scope["cases"][0], resolve_device(options.device)
    model, images = scope["warmed_network"](case, "cpu"), scope["slices_of"](case)[0]
    flags = {"convolutions": torch.backends.cudnn, "products": torch.backends.cuda.matmul}
    found, logits = {"tf32": {name: each.allow_tf32 for name, each in flags.items()}}, {}
    ways = {"cpu": ("cpu", "float32", None), "float32": (device, "float32", None), "as set": (device, "auto", None),
            "tf32": (device, "float32", True), "no tf32": (device, "float32", False)}
    for name, (place, how, tf32) in ways.items():
        for key, each in flags.items():
            each.allow_tf32 = found["tf32"][key] if tf32 is None else tf32
        logits[name] = torch.cat([one.cpu() for one in iterate_logits(model, images, device=place, precision=how)])
    for key, each in flags.items():
        each.allow_tf32 = found["tf32"][key]
    scale = logits["cpu"].abs().max()
    found["logits"] = {name: float((one - logits["cpu"]).abs().max() / scale) for name, one in logits.items()}
    lines = {how: scope["our_step"](case, device, how) for how in ("float32", resolve_precision("auto", device))}
    return found | {"losses": {how: [step() for _ in range(5)] for how, step in lines.items()}}


def headline(options, scope):
    """One row of Table II from random weights to its score; as many epochs as there is time for."""
    found = {}
    for epochs in (2, None):
        settings = settings_of("train_single", "sinfnet_aug_0.5", options)
        planned, each = settings["epochs"], found["seconds"] / 2 if found else 0
        settings["epochs"] = epochs or int(min(planned, max(4, options.seconds / each)))
        settings["warmup_epochs"] = min(settings["warmup_epochs"], settings["epochs"] // 4)
        begin = time.perf_counter()
        scores = runs.train_run(settings).metrics
        found = {"seconds": time.perf_counter() - begin, "data": settings["data"], "epochs": settings["epochs"],
                 "epochs_planned": planned, "memory_mib": memory_mib()}
        found["scores"] = scores[scores.subset == "test"].set_index("metric")["value"].dropna().to_dict()
        if options.small:
            break
    return found


def pretext(options, scope):
    """The first minutes of the longest pretext, on the pool: steps in a second, and whether its loss falls."""
    settings = settings_of("pretext", "infnet_pool", options)
    images, players = starts.load_pretext_images(settings), starts.build_players(settings)
    game, losses, begin = starts.start_game(settings, players, images), [], time.perf_counter()
    while not game.done and time.perf_counter() - begin < options.seconds:
        game.step()
        losses += [game.seen[-1][0] if game.seen else game.rows[-1]["loss"]]
    end, part = time.perf_counter() - begin, max(1, len(losses) // 10)
    return {"steps": len(losses), "steps_planned": game.epochs * game.batches, "seconds": end,
            "loss_first": sum(losses[:part]) / part, "loss_last": sum(losses[-part:]) / part,
            "history": game.rows, "images": len(images.tensor), "memory_mib": memory_mib()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true", help="tiny networks and sizes")
    parser.add_argument("--seconds", type=float, default=120, help="for the row, and for the pretext")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu_check")
    options, scope, report = parser.parse_args(), {}, {"commit": git_commit()}
    options.seconds = min(options.seconds, 5) if options.small else options.seconds
    aside = tempfile.TemporaryDirectory(prefix="covidsev-gpu-")
    options.place = Path(aside.name)
    for part in (steps, precision, headline, pretext):  # the first one forks, so it comes before any use of a GPU
        begin = time.perf_counter()
        try:
            report[part.__name__] = part(options, scope)
        except Exception as error:
            traceback.print_exception(error)
            report[part.__name__] = {"failed": f"{type(error).__name__}: {error}"}
        report.setdefault("took", {})[part.__name__] = round(time.perf_counter() - begin, 1)
        name = scope.get("label", "unknown") + ("-small" if options.small else "")
        write_json(options.out / f"{name}.json", report | {"environment": environment()})
        print(f"{part.__name__}: {report['took'][part.__name__]} s", flush=True)
    aside.cleanup()
    return any("failed" in part for part in report.values() if isinstance(part, dict))


if __name__ == "__main__":
    sys.exit(main())
