"""launcher=pool: warm workers give what cold processes give, and are replaced when they die."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lab.runs.folder import FINISHED, RUNNING, RunFolder

STUDY = [
    "model=tiny_random",
    "data.rows=16",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.threads=1",
    "quant=nf4",
    "adapter.dropout=0.1",
]


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={runs_dir}", *overrides]


def folders(runs_dir: Path) -> list[RunFolder]:
    return sorted((RunFolder(file.parent) for file in runs_dir.glob("*/config.yaml")), key=lambda run: run.run_id)


def outcome(run: RunFolder) -> tuple[bytes, float]:
    return (run.adapter / "adapter_model.safetensors").read_bytes(), run.result()["metrics"]["eval/loss"]


def test_a_warm_base_changes_no_result(tmp_path: Path) -> None:
    axes = ["optim.learning_rate=1e-3,3e-3", "adapter.rank=4,8", "trainer.max_steps=3"]
    for name, launcher in {"warm": ["launcher=pool", "launcher.max_parallel=1"], "cold": ["launcher=local"]}.items():
        done = subprocess.run(command(tmp_path / name, *axes, *launcher), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    warm, cold = folders(tmp_path / "warm"), folders(tmp_path / "cold")
    assert len(warm) == 4 and [run.run_id for run in warm] == [run.run_id for run in cold]
    assert [outcome(run) for run in warm] == [outcome(run) for run in cold]
    assert len({(run.status() or {})["pid"] for run in warm}) == 1, "one process did all of them"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGUSR2])
def test_a_run_goes_on_in_another_worker(tmp_path: Path, signum: signal.Signals) -> None:
    """Killed, the worker is replaced; told to stop, it saves its run, and the next command goes on."""
    given = ["seed=0", "trainer.max_steps=60", "trainer.checkpoint_every_steps=5", "launcher=pool"]
    process = subprocess.Popen(command(tmp_path, *given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not any(tmp_path.glob("*/checkpoints/step_*/")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    (run,) = folders(tmp_path)
    status = json.loads((run.path / "status.json").read_text())
    assert status["state"] == RUNNING
    subprocess.run(["kill", f"-{signum.value}", str(status["pid"])], check=True)
    process.communicate(timeout=120)
    if signum == signal.SIGUSR2:
        assert run.state() != FINISHED and process.returncode == 1
        subprocess.run(command(tmp_path, *given), check=True, capture_output=True)
    assert run.state() == FINISHED and run.attempts() == 2
