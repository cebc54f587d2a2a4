"""One run from the command line: finished, killed and resumed, stopped, refused. In this process: tests/test_run.py."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qlora_lab.config import hardware
from qlora_lab.memory.room import predict
from qlora_lab.ops.registry import KERNELS
from qlora_lab.runs.folder import FINISHED, INTERRUPTED, RunFolder
from tests.command_line import call

TINY = [
    "model=tiny_random",
    "data.rows=32",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.threads=1",
]

PATIENCE_S = 240  # a process that trains takes ten seconds to start, and more on a busy machine


def train(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Do it in this process, which has imported torch already."""
    return call("qlora_lab.train.__main__", *TINY, f"paths.runs_dir={runs_dir}", *overrides, cwd=Path.cwd())


def start(runs_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qlora_lab.train", *TINY, f"paths.runs_dir={runs_dir}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def only_run(runs_dir: Path) -> RunFolder:
    (folder,) = [path for path in runs_dir.iterdir() if (path / "config.yaml").exists()]
    return RunFolder(folder)


def adapter_bytes(folder: RunFolder) -> dict[str, bytes]:
    with safe_open(folder.adapter / "adapter_model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


def wait_until(condition: object, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs_dir = tmp_path_factory.mktemp("uninterrupted")
    process = start(runs_dir, "trainer.max_steps=40", "trainer.checkpoint_every_steps=5", "adapter.dropout=0.1")
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    return only_run(runs_dir)


def test_the_folder_holds_the_whole_run(uninterrupted: RunFolder) -> None:
    assert uninterrupted.state() == FINISHED
    result = uninterrupted.result()
    assert {"eval/loss", "eval/bits_per_byte", "eval/exact_match", "train/tokens"} <= result["metrics"].keys()
    assert result["trainable_parameters"] == 8 * 2 * (
        (64 + 64) + 2 * (64 + 32) + (64 + 64) + 2 * (64 + 128) + (128 + 64)
    )  # rank 8, two layers: q, k and v, o, gate and up, down
    history = [json.loads(line) for line in (uninterrupted.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "train/loss" in line] == list(range(1, 41))
    assert len((uninterrupted.path / "evaluation" / "rows.jsonl").read_text().splitlines()) == 16
    generations = (uninterrupted.path / "generations" / "held_out.jsonl").read_text().splitlines()
    assert generations and {"prompt", "generation", "stop_reason"} <= json.loads(generations[0]).keys()
    environment = uninterrupted.environment()
    assert environment is not None
    assert environment["kernels"] == str(KERNELS)
    assert environment["compute_dtype"] == uninterrupted.config().trainer.compute_dtype


@pytest.mark.skipif(torch.version.cuda is not None, reason="the libraries were measured with torch's CPU build")
def test_the_process_takes_what_was_planned(uninterrupted: RunFolder) -> None:
    """Nearly all of so small a run is Python and its libraries; tests/benchmarks/process_memory.py has larger ones."""
    planned = predict(uninterrupted.config()).peak_bytes
    assert uninterrupted.result()["metrics"]["memory/peak_rss_bytes"] == pytest.approx(planned, rel=0.15)


def test_a_killed_run_resumes_and_ends_with_the_same_bits(uninterrupted: RunFolder, tmp_path: Path) -> None:
    overrides = ("trainer.max_steps=40", "trainer.checkpoint_every_steps=5", "adapter.dropout=0.1")
    process = start(tmp_path, *overrides)
    wait_until(lambda: any(tmp_path.glob("*/checkpoints/step_*/")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = only_run(tmp_path)
    assert folder.run_id == uninterrupted.run_id, "the same configuration has the same id everywhere"
    assert folder.state() == INTERRUPTED
    resumed = train(tmp_path, *overrides)
    assert resumed.returncode == 0, resumed.stderr
    status = folder.status()
    assert folder.state() == FINISHED and status is not None and status["attempt"] == 2
    assert adapter_bytes(folder) == adapter_bytes(uninterrupted)
    assert folder.result()["metrics"]["eval/loss"] == uninterrupted.result()["metrics"]["eval/loss"]


def test_a_finished_run_is_not_repeated(uninterrupted: RunFolder) -> None:
    before = (uninterrupted.path / "status.json").read_bytes()
    again = train(
        uninterrupted.path.parent,
        "trainer.max_steps=40",
        "trainer.checkpoint_every_steps=5",
        "adapter.dropout=0.1",
    )
    assert again.returncode == 0 and "its result stands" in again.stdout
    assert (uninterrupted.path / "status.json").read_bytes() == before


def test_ctrl_c_is_recorded(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer.max_steps=2000", "trainer.checkpoint_every_steps=5")
    wait_until(lambda: any(tmp_path.glob("*/checkpoints/step_*/")))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "the same command goes on" in stderr and "Traceback" not in stderr
    assert only_run(tmp_path).state() == INTERRUPTED


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    process = start(tmp_path, "trainer.max_steps=2000", "trainer.checkpoint_every_steps=1000")
    wait_until(lambda: any(file.stat().st_size for file in tmp_path.glob("*/metrics.jsonl")))  # a step was taken
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    folder = only_run(tmp_path)
    assert folder.state() == INTERRUPTED
    assert any(folder.checkpoints.glob("step_*")), "the last step is saved although no checkpoint was due"


def test_a_gpu_run_is_not_silently_run_on_a_cpu(tmp_path: Path) -> None:
    if hardware.detect().gpus:
        pytest.skip("this machine has a GPU")
    done = train(tmp_path, "trainer.device=cuda")
    assert done.returncode == 2
    assert "trainer.device must be cpu or auto, since this process sees no GPU" in done.stderr
