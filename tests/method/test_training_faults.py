"""What training does when something goes wrong: damaged files, NaN, a full disk, signals, kills."""
import contextlib
import errno
import os
import pickle
import resource
import signal
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from covidsev import core
from covidsev.core import (CheckpointError, ConfigError, NonFiniteError, RunLockedError, run_lock,
                           sha256_file)
from covidsev.method import training
from covidsev.method.losses import SideOutputs
from covidsev.method.training import (Supervised, TrainConfig, fit, load_checkpoint, load_latest,
                                      rotate_checkpoints, save_checkpoint, weights_hash)

CONFIG = TrainConfig(epochs=6, batch_size=4, learning_rate=1e-2, augment="paper", ema=0.5, save_every=1, precision="float32")


class TinyNet(nn.Module):
    """One convolution, batch normalisation and dropout; `on_forward` lets a test interfere."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout2d(0.2), nn.Conv2d(width, 1, 1)
        self.steps, self.on_forward = 0, lambda step, logits: logits

    def forward(self, images: torch.Tensor) -> SideOutputs:
        logits = self.head(self.drop(torch.relu(self.norm(self.conv(images)))))
        self.steps += self.training
        return SideOutputs(s_3=self.on_forward(self.steps, logits) if self.training else logits)


def tiny(on_forward=None, width: int = 3) -> TinyNet:
    torch.manual_seed(0)
    network = TinyNet(width)
    network.on_forward = on_forward or network.on_forward
    return network


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (count, 1, 32, 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return images, (images > 128).to(torch.uint8)


TRAIN = data(10, 1)  # three batches an epoch


def run(folder, config=CONFIG, on_forward=None, train=TRAIN, **options):
    return fit(tiny(on_forward), train, config, folder, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> str:
    """The hash of the weights after a run that nothing disturbs."""
    return weights_hash(run(tmp_path_factory.mktemp("undisturbed")).model)


def in_child(task) -> int:
    """Runs `task()` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            task()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# a file that wants to run code; damaged files; another network

class Attack:
    def __init__(self, canary) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_checkpoint_is_refused_and_does_not_run(tmp_path, writer):
    canary, path = tmp_path / "canary", tmp_path / "last.pt"
    writer({"format": training.FORMAT, "weights": Attack(canary)}, path)
    (tmp_path / "last.pt.sha256").write_text(f"{sha256_file(path)}  last.pt\n")  # the attacker knows about hashes
    with pytest.raises(CheckpointError, match="not plain tensors"):
        load_checkpoint(path)
    assert not canary.exists()


def flip_a_bit(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


DAMAGES = {"half": lambda content: content[:len(content) // 2], "empty": lambda content: b"", "one bit": flip_a_bit,
           "a web page": lambda content: b"<!DOCTYPE html><html></html>",
           "a pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"}


@pytest.mark.filterwarnings("ignore:checkpoint is damaged")
@pytest.mark.parametrize("name, damage", [*(("last.pt", one) for one in DAMAGES), ("last.pt.sha256", "half")])
def test_a_damaged_last_falls_back_to_prev_and_gives_the_same_bits(tmp_path, name, damage, expected):
    """The file itself, or the one that lists its hash: other bytes, no text at all."""
    run(tmp_path)
    file = tmp_path / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()) if name == "last.pt" else b"\xff\x0001234567")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="resuming from prev.pt, epoch 5"):
        assert weights_hash(run(tmp_path, resume="must").model) == expected


def test_two_damaged_files_are_an_error_and_not_a_fresh_start(tmp_path):
    run(tmp_path)
    for name in ("last.pt", "prev.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no sound checkpoint"):
        run(tmp_path)
    assert len(run(tmp_path, resume=False).history) == CONFIG.epochs  # the remedy that the message names


def test_a_missing_hash_file_and_a_foreign_file_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"epoch": 1})
    (tmp_path / "a.pt.sha256").unlink()
    with pytest.raises(CheckpointError, match="a .sha256 file beside it"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    (tmp_path / "b.pt.sha256").write_text(sha256_file(tmp_path / "b.pt"))
    with pytest.raises(CheckpointError, match="not a checkpoint of this library"):
        load_checkpoint(tmp_path / "b.pt")


def test_weights_of_another_network_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match="conv.weight"):
        fit(tiny(width=5), TRAIN, CONFIG, tmp_path)


# what resume means

def test_must_resume_needs_a_checkpoint_and_true_may_start(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(tmp_path, resume="must")
    assert len(run(tmp_path, replace(CONFIG, epochs=1)).history) == 1
    with pytest.raises(ConfigError, match="did you mean 'must'"):
        run(tmp_path, resume="mus")


@pytest.mark.parametrize("options, line", [({"config": replace(CONFIG, learning_rate=5e-3)}, "config.learning_rate: 0.01 -> 0.005"),
                                           ({"config": replace(CONFIG, epochs=9)}, "config.epochs: 6 -> 9"),
                                           ({"config": replace(CONFIG, precision="bfloat16")}, "config.precision: float32 -> bfloat16"),
                                           ({"train": data(10, 3)}, "data: ")])
def test_another_setting_or_other_data_is_refused_by_key(tmp_path, options, line):
    run(tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, **options)
    assert line in str(caught.value) and "cannot resume" in str(caught.value)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_another_number_of_threads_is_refused(tmp_path):
    run(tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ConfigError, match=f"threads: {threads} -> {threads + 1}"):
            run(tmp_path)
    finally:
        torch.set_num_threads(threads)


# NaN, and low precision

class BadGradient(torch.autograd.Function):
    """The value is fine; the gradient is infinite."""

    @staticmethod
    def forward(context, logits):
        return logits.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("spoil", [lambda logits: logits * float("nan"), BadGradient.apply], ids=["loss", "gradient"])
def test_nan_stops_at_its_step_names_it_and_keeps_the_last_good_checkpoint(tmp_path, spoil, expected):
    names = [f"slice-{index}" for index in range(len(TRAIN[0]))]
    with pytest.raises(NonFiniteError) as caught:  # step 8 is the second batch of epoch 3
        run(tmp_path, on_forward=lambda step, logits: spoil(logits) if step == 8 else logits, ids=names)
    batch = training.epoch_batches(10, 4, CONFIG.seed, 2)[1].tolist()
    assert "epoch 3, batch 2" in str(caught.value)
    assert f"slices {', '.join(names[index] for index in batch)}" in str(caught.value)
    state = load_latest(tmp_path)
    assert state["epoch"] == 2 and all(torch.isfinite(value).all() for value in state["weights"].values())
    assert weights_hash(run(tmp_path, resume="must").model) == expected  # without the fault, the run goes on


@pytest.mark.filterwarnings("ignore:.*has no bfloat16 instructions")
def test_low_precision_has_no_scaler_that_could_skip_a_step_unseen(tmp_path):
    """bfloat16 reaches as far as float32, so nothing is scaled; a step that overflows stops the run like any other."""
    seen = []

    def huge(step, logits):
        seen.append(logits.dtype)
        return logits * (1e39 if step == 8 else 1e4)  # 1e4 squared is beyond float16, and fine here

    with pytest.raises(NonFiniteError, match="epoch 3, batch 2"):
        run(tmp_path, replace(CONFIG, precision="bfloat16"), on_forward=huge)
    assert set(seen) == {torch.bfloat16} and len(seen) == 8  # no step was left out, and none came after
    assert load_latest(tmp_path)["epoch"] == 2


# a full disk

def test_a_full_disk_is_an_oserror_and_leaves_the_old_files(tmp_path, monkeypatch, expected):
    run(tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(core.os, "fsync", full)
        with pytest.raises(OSError) as caught:
            save_checkpoint(tmp_path / "last.pt", {"epoch": 99})
    assert caught.value.errno == errno.ENOSPC and "last.pt" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == content
    assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.glob("*.tmp"))
    assert weights_hash(run(tmp_path, resume="must").model) == expected


def test_a_file_size_limit_in_the_middle_of_a_run_can_be_resumed_from(tmp_path, expected):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def limit(step, logits):
            if step == 8:  # in epoch 3; the files of two epochs are there
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            return logits

        try:
            run(tmp_path, on_forward=limit)
        except OSError as error:
            raise SystemExit(57 if error.errno == errno.EFBIG and ".pt" in str(error) else 1) from error

    assert in_child(limited) == 57
    assert not list(tmp_path.glob(".*.tmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # last.pt had become prev.pt when the disk filled
        assert load_latest(tmp_path)["epoch"] == 2
        assert weights_hash(run(tmp_path, resume="must").model) == expected


# killed at any moment

class Killed(BaseException):
    """Stands for a kill between two operations on files."""


class DyingReplace:
    """`os.replace` that dies at its n-th call, before or after doing its work."""

    def __init__(self, number: int, before: bool) -> None:
        self.number, self.before, self.calls, self.real = number, before, 0, os.replace

    def __call__(self, source, target) -> None:
        self.calls += 1
        if self.calls == self.number and self.before:
            raise Killed
        self.real(source, target)
        if self.calls == self.number:
            raise Killed


@pytest.mark.filterwarnings("ignore:resuming from prev.pt", "ignore:checkpoint is damaged")
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_at_any_rename_leaves_a_sound_checkpoint(tmp_path, monkeypatch, before):
    finished = []
    for number in range(1, 13):
        folder, dying = tmp_path / str(number), DyingReplace(number, before)
        folder.mkdir()
        for epoch in (1, 2):
            rotate_checkpoints(folder)
            save_checkpoint(folder / "last.pt", {"epoch": epoch})
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", dying)
            rotate_checkpoints(folder)
            save_checkpoint(folder / "last.pt", {"epoch": 3})
            finished.append(number)
        assert load_latest(folder)["epoch"] in ((3,) if number in finished else (2, 3))
    assert finished and min(finished) >= 6  # five renames and more; the loop has gone past the last


def sends(number: int, *steps: int):
    """Sends a signal to its own process in the given training steps."""

    def on_forward(step, logits):
        if step in steps:
            os.kill(os.getpid(), number)
        return logits

    return on_forward


@pytest.mark.filterwarnings("ignore:resuming from prev.pt")
def test_ten_kills_of_one_run_and_no_orphans(tmp_path, expected):
    """SIGKILL in the second, third, ... step of each try, also while a checkpoint is half written: the run still ends with
    the same bits, and what the kills left lying about is gone."""
    for step in (1, 2, 4, 4, 5, 1, 4, 3, 2, 6):
        assert in_child(lambda: run(tmp_path, on_forward=sends(signal.SIGKILL, step))) == -signal.SIGKILL
        (tmp_path / f".last.pt.{step:012x}.tmp").write_bytes(b"half")
        load_latest(tmp_path)  # never a CheckpointError
    assert weights_hash(run(tmp_path).model) == expected
    assert not list(tmp_path.glob(".*.tmp"))


# signals, locks

@pytest.mark.parametrize("number, status, step", [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 3), (signal.SIGTERM, 143, 5)])
def test_a_signal_finishes_the_batch_saves_and_exits(tmp_path, number, status, step, expected):
    assert in_child(lambda: run(tmp_path, on_forward=sends(number, step))) == status
    state = load_checkpoint(tmp_path / "last.pt")
    assert 3 * state["epoch"] + state["batch"] == step  # exactly the batches done, also inside an epoch
    assert weights_hash(run(tmp_path, resume="must").model) == expected


def test_a_second_signal_quits_at_once(tmp_path):
    def twice(step, logits):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        return logits

    def child():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run(tmp_path, on_forward=twice)

    assert in_child(child) == -signal.SIGTERM
    assert not (tmp_path / "last.pt").exists()


def test_a_second_run_in_the_same_folder_is_locked_out(tmp_path):
    with run_lock(tmp_path), pytest.raises(RunLockedError, match=str(os.getpid())):
        run(tmp_path)
    assert not (tmp_path / "last.pt").exists()


def test_a_finished_run_is_read_and_not_trained(tmp_path, monkeypatch, expected):
    run(tmp_path)
    monkeypatch.setattr(Supervised, "step", None)
    again = run(tmp_path)
    assert weights_hash(again.model) == expected and (again.steps, again.draws) == (18, 60)
