"""Weights that leave the house: they come back bit for bit, everything else is refused, and ONNX answers the same."""
import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from covidsev.method import export
from covidsev.method.unets import build_network
from covidsev.core import CheckpointError, ConfigError, CovidSevError, MissingExtraError, NonFiniteError
from covidsev.method.export import (MODEL_FORMAT, PARITY, ModelInfo, card_path, check_parity, export_run, load_model,
                             onnx_bytes, onnx_info, onnx_logits, output_path, save_model, save_onnx)
from covidsev.method.infnet import count_parameters
from covidsev.method.multiclass import MultiClassUNet
from covidsev.core import read_json, sha256_file, write_json
from covidsev.method.infnet import load_weights
from covidsev.method.training import save_checkpoint, weights_hash

SIZE = 32
NAMES = ("infnet", "unet", "segnet", "multi")


def describe(name: str, **changes) -> ModelInfo:
    """What a file says about a small network of one of the four kinds."""
    kind = ({"task": "multi", "form": "small"} if name == "multi" else
            {"task": "single", "backbone": "small", "threshold": 0.4})
    return ModelInfo(**{**kind, "model": name, "size": SIZE, "data": "phantom", "data_kind": "phantom", **changes})


def network_of(name: str, seed: int = 0) -> torch.nn.Module:
    """A small network whose batch normalisation has seen something, so that a lost buffer would show."""
    torch.manual_seed(seed)
    network = MultiClassUNet("small") if name == "multi" else build_network(name, "small", "scratch")
    network(*inputs(name, 4))
    return network.eval()


def inputs(name: str, n: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.rand(n, 1, SIZE, SIZE, generator=generator) for _ in range(1 + (name == "multi")))


def answer(network: torch.nn.Module, name: str) -> torch.Tensor:
    with torch.inference_mode():
        outputs = network(*inputs(name))
    return outputs.logits if name == "multi" else outputs.s_3


@pytest.fixture(scope="module")
def networks() -> dict[str, torch.nn.Module]:
    return {name: network_of(name) for name in NAMES}


@pytest.fixture(scope="module")
def saved(networks, tmp_path_factory):
    """A weights file of the U-Net, and its bytes."""
    path = save_model(tmp_path_factory.mktemp("saved") / "unet.safetensors", networks["unet"], describe("unet"))
    return path, path.read_bytes()


def with_entry(content: bytes, change) -> bytes:
    """The file with its description changed by `change`, otherwise sound."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    metadata = header["__metadata__"]
    entry = json.loads(metadata["covidsev"])
    change(entry, metadata)
    if "covidsev" in metadata:
        metadata["covidsev"] = json.dumps(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length:]


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_equal(name, networks, tmp_path):
    info = describe(name, window=(-600, 1500), seed=3, slices={"train": 5}, metrics={"test/dice": 1 / 3},
                    metrics_n={"test/dice": 7}, prior="priors/infnet-seed0" if name == "multi" else None)
    path = save_model(tmp_path / "x.safetensors", networks[name], info)
    loaded, said = load_model(path, sha256=sha256_file(path))
    assert said == info and not loaded.training
    assert torch.equal(answer(loaded, name), answer(networks[name], name))
    assert weights_hash(loaded) == weights_hash(networks[name])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.md", "x.safetensors"]


def test_bytes_repeat_in_another_process_that_has_no_onnx_loaded(saved, tmp_path):
    """Hash seeds and memory layout must not reach the file; the extra is loaded when it is needed only."""
    code = ("import sys; from covidsev.method.export import *\n"
            "network, info = load_model(sys.argv[1])\n"
            "import torch; network = network.to(memory_format=torch.channels_last)\n"
            "save_model(sys.argv[2], network, info)\n"
            "print(*sorted({'onnx', 'onnxruntime'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, saved[0], tmp_path / "y.safetensors"], text=True,
                          capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert (tmp_path / "y.safetensors").read_bytes() == saved[1]


def test_loading_changes_no_random_state(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(saved[0])
    assert torch.equal(before, torch.get_rng_state())


class Canary:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch file"])
def test_a_pickle_in_disguise_is_refused_and_does_not_run(zipped, tmp_path):
    path, canary = tmp_path / "weights.safetensors", tmp_path / "canary"
    torch.save({"x": Canary(canary)}, path) if zipped else path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(CheckpointError, match="PyTorch checkpoint" if zipped else "run code"):
        load_model(path)
    assert not canary.exists()


def flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_bit_of_the_weights_is_found(saved, where, tmp_path):
    path, content = tmp_path / "x.safetensors", saved[1]
    first = 8 + struct.unpack("<Q", content[:8])[0]
    path.write_bytes(flip(content, first + int(where * (len(content) - first - 1))))
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize("make, words", [
    (lambda c: c[:len(c) // 2], "not a weights file"), (lambda c: b"", "0 bytes"), (lambda c: c[:7], "7 bytes"),
    (lambda c: b"<!DOCTYPE html><p>404", "web page"), (lambda c: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (lambda c: b"\xff" * 64, "not a weights file"), (lambda c: struct.pack("<Q", 2) + b"[]" + c, "not a weights file"),
    (lambda c: struct.pack("<Q", 40_000) + b"[" * 40_000, "not a weights file"), (lambda c: c + b"more", "not a weights file"),
], ids=["half", "empty", "seven bytes", "web page", "LFS pointer", "huge length", "list", "deep", "appended"])
def test_damaged_files_are_refused(saved, make, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(make(saved[1]))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_missing_file_wrong_hash_and_missing_device(saved, tmp_path):
    with pytest.raises(CheckpointError, match="covidsev export"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="another SHA-256"):
        load_model(saved[0], sha256="ab" * 32)
    assert load_model(saved[0], sha256=sha256_file(saved[0]).upper())[1] == describe("unet")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not there"):
            load_model(saved[0], device="cuda")


@pytest.mark.parametrize("change, words", [
    (lambda e, m: m.pop("covidsev"), "do not say what they are"),
    (lambda e, m: e.pop("info"), "do not say what they are"), (lambda e, m: e.pop("sha256"), "do not say what they are"),
    (lambda e, m: e.update(format="covidsev-model-9"), MODEL_FORMAT), (lambda e, m: e["info"].update(extra=1), "extra"),
    (lambda e, m: e["info"].pop("size"), "size"), (lambda e, m: e["info"].update(threshold=3), "threshold"),
    (lambda e, m: e["info"].update(threshold="high"), "cannot be used"), (lambda e, m: e["info"].update(model="vit"), "vit"),
    (lambda e, m: e["info"].update(backbone="../../x"), "not a weights file"),
    (lambda e, m: e["info"].update(threshold=0.1), "changed after they were written"),
    (lambda e, m: e["info"].update(size=64), "changed after they were written"),
    (lambda e, m: e["info"].update(model="segnet"), "another network"),
    (lambda e, m: e["info"].update(task="multi", model="multi", form="small", backbone=None), "another network"),
])
def test_a_description_that_does_not_fit_is_refused(saved, change, words, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_entry(saved[1], change))
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_the_helper_of_the_test_above_changes_nothing_else(saved, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_entry(saved[1], lambda entry, metadata: None))
    assert load_model(path)[1] == describe("unet")


def test_another_architecture_and_the_prefix_of_parallel_training(networks, tmp_path):
    with pytest.raises(CheckpointError, match="another network"):
        save_model(tmp_path / "x.safetensors", networks["infnet"], describe("unet"))
    with pytest.raises(CheckpointError, match="module"):
        load_weights(networks["unet"], {f"module.{name}": w for name, w in networks["unet"].state_dict().items()})
    with pytest.raises(ConfigError, match="safetensors"):
        save_model(tmp_path / "x.pt", networks["unet"], describe("unet"))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_do_not_leave(tmp_path):
    network = network_of("unet")
    network.head.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="head.bias"):
        save_model(tmp_path / "x.safetensors", network, describe("unet"))
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_must_be_said(saved):
    card = card_path(saved[0]).read_text()
    for words in ("Not a medical device", "Intended use", "no use on real CT", "Limits", "Licence", sha256_file(saved[0]),
                  "above 0.4", "load_model"):
        assert words.lower() in card.lower(), words
    multi = export.model_card(describe("multi", data="covid-semiseg", data_kind="real", prior="priors/a"), "m", "0")
    assert "NON-COMMERCIAL" in multi and "`priors/a`" in multi and ".logits" in multi and "is a guess" in multi


def test_the_code_of_the_card_runs(saved, monkeypatch):
    monkeypatch.chdir(saved[0].parent)
    code = card_path(saved[0]).read_text().partition("```python")[2].partition("```")[0]
    names = {"slices": inputs("unet")[0]}
    exec(code, names)
    assert names["logits"].shape == (3, 1, SIZE, SIZE)


# ------------------------------------------------------------------ from a run


@pytest.fixture
def run(tmp_path, networks):
    """A run folder as the runner publishes it, and its checkpoint where the runner puts it."""
    folder = tmp_path / "results" / "smoke" / "train_single" / "unet-seed0"
    folder.mkdir(parents=True)
    rows = ["subset,metric,value,n", "test,dice,0.25,12", "test,pooled_dice,0.5,12", "val,dice,0.75,6", "test,hd95,1.0,12",
            "test_without_shared_scans,dice,,12"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    parts = {name: {"n": n, "sha256": "0"} for name, n in {"train": 24, "val": 6, "test": 12}.items()}
    write_json(folder / "run.json", {
        "run": "train_single/unet-seed0", "key": "ab" * 32, "val_threshold": 0.35, "training": {"best_epoch": 1},
        "network": {"model": "unet", "backbone": "small", "parameters": count_parameters(networks["unet"])},
        "parameters": {"data": "phantom", "size": SIZE, "seed": 0, "profile": "smoke", "row": "unet"},
        "data": {"kind": "phantom", "splits": parts}, "outputs": {"metrics.csv": sha256_file(folder / "metrics.csv")}})
    checkpoint = tmp_path / "checkpoints" / "smoke" / "train_single" / "unet-seed0" / "abababababab" / "best.pt"
    checkpoint.parent.mkdir(parents=True)
    save_checkpoint(checkpoint, {"weights": networks["unet"].state_dict(), "epoch": 1, "value": 0.1})
    return folder, checkpoint


def change(folder, values):
    write_json(folder / "run.json", {**read_json(folder / "run.json"), **values})


def test_a_run_becomes_a_file_with_its_own_numbers(run, networks, tmp_path):
    path = export_run(run[0], None, tmp_path / "out")
    network, info = load_model(path)
    assert path.name == "smoke-unet-seed0.safetensors"
    assert weights_hash(network) == weights_hash(networks["unet"])
    assert (info.threshold, info.size, info.slices) == (0.35, SIZE, {"train": 24, "val": 6, "test": 12})
    assert info.metrics == {"test/dice": 0.25, "test/pooled_dice": 0.5} and info.metrics_n["test/dice"] == 12
    assert info.source_sha256 == sha256_file(run[1]) and info.run_key == "ab" * 32
    assert "| test | dice | 0.2500 | 12 |" in card_path(path).read_text()
    assert export_run(run[0], run[1], tmp_path / "named.safetensors").read_bytes() == path.read_bytes()


def test_edited_metrics_are_not_exported(run, tmp_path):
    text = (run[0] / "metrics.csv").read_text()
    (run[0] / "metrics.csv").write_text(text.replace("0.25", "0.95"))
    with pytest.raises(CheckpointError, match="not those that the run wrote"):
        export_run(run[0], None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values, error, words", [
    ({"run": "pretext/x-seed0"}, ConfigError, "no network that can be exported"),
    ({"key": "cd" * 32}, ConfigError, "not on this machine"), ({"parameters": {}}, ConfigError, "not complete"),
    ({"network": {"model": "unet", "backbone": "small", "parameters": 5}}, CheckpointError, "another network"),
    ({"network": {"model": "segnet", "backbone": "small"}}, CheckpointError, "another network"),
])
def test_runs_that_do_not_fit_are_refused(run, values, error, words, tmp_path):
    change(run[0], values)
    with pytest.raises(error, match=words):
        export_run(run[0], None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_here_come_back_by_the_command_in_the_error(run, tmp_path):
    change(run[0], {"key": "cd" * 32, "parameters": {"profile": "cpu", "row": "unet", "seed": 2}})
    with pytest.raises(ConfigError, match="reproduce --profile cpu --only train_single --row unet --seed 2 --force"):
        export_run(run[0], None, tmp_path / "out")


def test_no_run_and_a_damaged_checkpoint(run, tmp_path):
    with pytest.raises(ConfigError, match="no run in this folder"):
        export_run(tmp_path, None, tmp_path / "out")
    run[1].write_bytes(run[1].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        export_run(run[0], None, tmp_path / "out")


def test_a_folder_of_covidsev_train(run, tmp_path):
    """It has no run name and no key, and its checkpoints lie below it."""
    record = read_json(run[0] / "run.json")
    write_json(run[0] / "run.json", {name: value for name, value in record.items() if name not in ("run", "key")})
    (run[0] / "checkpoints").mkdir()
    for name in ("best.pt", "best.pt.sha256"):
        run[1].with_name(name).rename(run[0] / "checkpoints" / name)
    assert load_model(export_run(run[0], None, tmp_path / "out"))[1].threshold == 0.35


def test_names_of_files():
    info = describe("unet", profile="cpu", row="unet_aug_0.5", seed=2)
    assert output_path("out", info).name == "cpu-unet_aug_0.5-seed2.safetensors"
    assert output_path("a/b.safetensors", info).as_posix() == "a/b.safetensors"
    assert output_path("out", describe("infnet")).name == "infnet.safetensors"


# ------------------------------------------------------------------ ONNX


@pytest.mark.parametrize("name", NAMES)
def test_onnx_answers_as_the_network_does(name, networks, tmp_path):
    pytest.importorskip("onnxruntime")
    info, path = describe(name), tmp_path / "x.onnx"
    parity = save_onnx(path, networks[name], info)
    assert parity.difference <= PARITY and parity.pixels == 4 * SIZE * SIZE
    assert onnx_info(path) == info
    for n in (1, 5):  # any number of slices, also ones that were not tried when the file was made
        given = [(255 * x).round().to(torch.uint8) for x in inputs(name, n)]
        with torch.inference_mode():
            outputs = networks[name](*(x.float() / 255 for x in given))
        ours = (outputs.logits if name == "multi" else outputs.s_3).numpy()
        theirs = onnx_logits(path, *(x.numpy() for x in given))
        assert theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() <= PARITY * max(1, np.abs(ours).max())


def test_onnx_of_another_network_is_not_written(networks, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    info, other = describe("unet"), network_of("unet", seed=1)
    content = onnx_bytes(other, info)
    with pytest.raises(CovidSevError, match="does not answer"):
        check_parity(content, networks["unet"], info)
    monkeypatch.setattr(export, "onnx_bytes", lambda network, info: content)
    with pytest.raises(CovidSevError, match="does not answer"):
        save_onnx(tmp_path / "x.onnx", networks["unet"], info)
    assert not list(tmp_path.iterdir())


def test_onnx_files_and_inputs_that_do_not_fit(networks, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "x.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not an ONNX model"):
        onnx_logits(path, np.zeros((1, 1, SIZE, SIZE), np.uint8))
    save_onnx(path, networks["multi"], describe("multi"))
    images = np.zeros((2, 1, SIZE, SIZE), np.uint8)
    for given in ((images,), (images, images[:, :, :16]), (images.astype(np.float32), images)):
        with pytest.raises(ConfigError, match="do not fit"):
            onnx_logits(path, *given)


def test_without_the_extra_the_message_says_how_to_get_it(networks, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"covidsev\[export\]"):
        save_onnx(tmp_path / "x.onnx", networks["unet"], describe("unet"))
    assert not list(tmp_path.iterdir())


def test_an_info_cannot_lie_about_its_kind():
    for changes in ({"task": "both"}, {"model": "infnett"}, {"size": 0}, {"size": 3.5}, {"backbone": None}, {"form": "small"},
                    {"window": (1.0,)}, {"window": (0, 0)}, {"threshold": -0.1}, {"threshold": float("nan")}):
        with pytest.raises(ConfigError):
            dataclasses.replace(describe("unet"), **changes)
