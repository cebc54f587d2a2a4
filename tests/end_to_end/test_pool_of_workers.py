"""launcher=pool: warm workers give what cold processes give, and are replaced when they die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from qlora_lab.runs.folder import FINISHED, INTERRUPTED, RUNNING, RunFolder
from tests.command_line import call

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

PATIENCE_S = 240  # a process that trains takes ten seconds to start, and more on a busy machine


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={runs_dir}", *overrides]


def folders(runs_dir: Path) -> list[RunFolder]:
    return sorted((RunFolder(file.parent) for file in runs_dir.glob("*/config.yaml")), key=lambda run: run.run_id)


def outcome(run: RunFolder) -> tuple[bytes, float]:
    return (run.adapter / "adapter_model.safetensors").read_bytes(), run.result()["metrics"]["eval/loss"]


def test_a_warm_base_changes_no_result(tmp_path: Path) -> None:
    axes = ["optim.learning_rate=1e-3,3e-3", "adapter.rank=4,8", "trainer.max_steps=3"]
    warm_launcher = ["launcher=pool", "launcher.max_parallel=1"]
    process = subprocess.run(
        command(tmp_path / "warm", *axes, *warm_launcher), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    in_process = [*STUDY, f"paths.runs_dir={tmp_path / 'cold'}", *axes, "launcher=in_process"]
    done = call("qlora_lab.sweep.__main__", *in_process, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warm, cold = folders(tmp_path / "warm"), folders(tmp_path / "cold")
    assert len(warm) == 4 and [run.run_id for run in warm] == [run.run_id for run in cold]
    assert [outcome(run) for run in warm] == [outcome(run) for run in cold]
    assert len({(run.status() or {})["pid"] for run in warm}) == 1, "one process did all of them"


def test_a_run_goes_on_in_another_worker(tmp_path: Path) -> None:
    """Told to stop, the worker saves its run, and the next command goes on; killed, it is replaced."""
    given = ["seed=0", "trainer.max_steps=80", "trainer.checkpoint_every_steps=10", "launcher=pool"]
    first = start_and_tell_its_worker(tmp_path, given, signal.SIGUSR2)
    (run,) = folders(tmp_path)
    assert first == 1 and run.state() == INTERRUPTED and run.attempts() == 1
    assert start_and_tell_its_worker(tmp_path, given, signal.SIGKILL) == 0
    assert run.state() == FINISHED and run.attempts() == 3


def start_and_tell_its_worker(runs_dir: Path, given: list[str], signum: signal.Signals) -> int:
    """Start a command, send a signal to its worker when that has saved a checkpoint, and return the exit status."""
    before = set(runs_dir.glob("*/checkpoints/step_*"))
    process = subprocess.Popen(command(runs_dir, *given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not set(runs_dir.glob("*/checkpoints/step_*")) - before:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    (run,) = folders(runs_dir)
    status = run.status()
    assert status is not None and status["state"] == RUNNING
    os.kill(status["pid"], signum)
    process.communicate(timeout=PATIENCE_S)
    return process.returncode
