"""Checkpoints: whole, restored to the bit, and never lost to a full disk or a damaged file."""

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qlora_lab.config.schema import OptimConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.train.checkpoint import Counters, TrainingState, load_newest, save_checkpoint
from qlora_lab.train.optimizer import build_optimizer
from qlora_lab.train.rng import capture_rng, restore_rng, seed_everything
from tests.small_disk import small_disk


def new_state(step: int = 0, size: int = 4, dtype: torch.dtype = torch.float32) -> TrainingState:
    torch.manual_seed(1)
    matrix = torch.randn(size, size).to(dtype)
    parameters = {"a.weight": nn.Parameter(matrix), "b.bias": nn.Parameter(torch.randn(size))}
    return TrainingState(parameters, build_optimizer(OptimConfig(weight_decay=0.1), parameters), Counters(step))


def train(state: TrainingState, steps: int) -> None:
    """Take steps whose gradients come from the global generator."""
    for _ in range(steps):
        for parameter in state.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        state.counters.step += 1


def save(folder: Path, state: TrainingState, keep: int = 2) -> Path:
    return save_checkpoint(folder, state, capture_rng(), keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    seed_everything(5)
    state = new_state(dtype=dtype)
    train(state, 3)
    state.counters.tokens, state.counters.target_tokens, state.counters.time_s = 70, 20, 1.5
    save(tmp_path, state)
    train(state, 2)
    drawn = (torch.rand(3), random.random(), np.random.rand(), random.gauss(0, 1))

    seed_everything(99)
    resumed = new_state(dtype=dtype)
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None
    resumed.restore(checkpoint)
    restore_rng(checkpoint.rng)
    assert resumed.counters == Counters(step=3, tokens=70, target_tokens=20, time_s=1.5)
    train(resumed, 2)
    for name, parameter in state.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
        for key, value in state.optimizer_tensors()[name].items():
            assert torch.equal(resumed.optimizer_tensors()[name][key], value), (name, key)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), np.random.rand(), random.gauss(0, 1)) == drawn[1:]


def test_the_last_n_are_kept_and_leftovers_of_a_killed_process_removed(tmp_path: Path) -> None:
    state = new_state()
    (tmp_path / ".writing-step_000001-dead").mkdir(parents=True)
    for _ in range(4):
        train(state, 1)
        save(tmp_path, state, keep=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    state = new_state()
    train(state, 1)
    assert {path.suffix for path in save(tmp_path, state).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "file", ["parameters.safetensors", "optimizer.safetensors", "rng.safetensors", "counters.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = new_state()
    train(state, 1)
    save(tmp_path, state)
    train(state, 1)
    path = save(tmp_path, state) / file
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 1
    assert len(caplog.messages) == 1
    assert f"checkpoint of step 2 is damaged ({file}" in caplog.text and "\n" not in caplog.messages[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    state = new_state()
    train(state, 1)
    save(tmp_path, state)
    train(state, 1)
    (save(tmp_path, state) / "parameters.safetensors").write_bytes(b"")
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None
    state.restore(checkpoint)
    train(state, 1)
    save(tmp_path, state, keep=1)
    assert names(tmp_path) == ["step_000002"]
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 2


def test_a_damaged_newer_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    state = new_state()
    train(state, 5)
    (save(tmp_path, state) / "manifest.json").unlink()
    state.counters.step = 2
    save(tmp_path, state, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_no_whole_checkpoint_is_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_newest(tmp_path / "absent") is None
    state = new_state()
    train(state, 1)
    (save(tmp_path, state) / "manifest.json").write_text("{")
    assert load_newest(tmp_path) is None
    assert caplog.messages[0].endswith("training starts from the beginning")


@pytest.mark.parametrize("failing_call", [0, 1, 4])
def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    state = new_state()
    train(state, 1)
    save(tmp_path, state)
    train(state, 1)
    calls = iter(range(100))

    def full_disk(descriptor: int) -> None:
        if next(calls) == failing_call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qlora_lab.train.tensor_file.os.fsync", full_disk)
    with pytest.raises(RunFolderError, match=r"step 2 .*No space left on device.* \(step 1\); free some space"):
        save(tmp_path, state)
    assert names(tmp_path) == ["step_000001"]
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 1


def test_a_disk_that_is_really_full_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    state = new_state(size=100)  # 120 kB a checkpoint and 15 kB of random states
    with small_disk(tmp_path / "disk", 256) as disk:
        train(state, 1)
        save(disk, state)
        train(state, 1)
        with pytest.raises(RunFolderError, match="No space left on device"):
            save(disk, state)
        assert names(disk) == ["step_000001"]
        checkpoint = load_newest(disk)
    assert checkpoint is not None and checkpoint.counters.step == 1


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    state = new_state()
    train(state, 1)
    save(tmp_path, state)
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None
    with pytest.raises(RunFolderError, match=r"a.weight is \(4, 4\) torch.float32 there and \(5, 5\)"):
        new_state(size=5).restore(checkpoint)
    other = new_state()
    other.parameters = {"a.weight": other.parameters["a.weight"]}
    with pytest.raises(RunFolderError, match=r"b.bias is only in the checkpoint"):
        other.restore(checkpoint)
