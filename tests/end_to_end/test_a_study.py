"""A study from plan to table, with every launcher that needs no cluster, and what may go wrong on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RunFolder
from tests.command_line import call

STUDY = [
    "+experiment=dataset_quality",
    "model=tiny_random",
    "data.rows=16,32",
    "data=procedural_clean_128",
    "seed=0,1",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.max_steps=4",
    "trainer.threads=1",
]

PATIENCE_S = 300  # a process that trains takes ten seconds to start, and more on a busy machine


def sweep(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Do it in this process, which has imported torch already; what is stopped or runs beside others is started."""
    return call("qlora_lab.sweep.__main__", *STUDY, f"paths.runs_dir={runs_dir}", *overrides, cwd=Path.cwd())


def start(runs_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(runs_dir, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={runs_dir}", *overrides]


def states(runs_dir: Path) -> list[str]:
    return [RunFolder(path).state() for path in sorted(runs_dir.iterdir()) if (path / "config.yaml").exists()]


def attempts(runs_dir: Path) -> list[int]:
    return [json.loads(file.read_text())["attempt"] for file in sorted(runs_dir.glob("*/status.json"))]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    runs_dir = tmp_path_factory.mktemp("study")
    return runs_dir, sweep(runs_dir, "launcher=in_process")


def test_a_study_goes_from_plan_to_answer(answered: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    runs_dir, done = answered
    assert done.returncode == 0, done.stderr
    assert "4 runs: 4 new" in done.stdout
    assert states(runs_dir) == [FINISHED] * 4
    (study,) = (runs_dir / "studies" / "dataset_quality").iterdir()  # one folder a plan
    assert {"plan.json", "table.csv", "report.html"} <= {file.name for file in study.iterdir()}
    assert str(study / "report.html") in done.stdout and str(runs_dir) in done.stdout
    plan = json.loads((study / "plan.json").read_text())
    assert plan["axes"] == ["data", "seed", "data.rows"] and len(plan["runs"]) == 4


def test_a_second_sweep_finds_everything_finished(
    answered: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    runs_dir, _ = answered
    before = attempts(runs_dir)
    again = sweep(runs_dir, "launcher=in_process")
    assert again.returncode == 0
    assert "4 runs: 4 finished" in again.stdout
    assert attempts(runs_dir) == before


def test_a_plan_launches_nothing(tmp_path: Path) -> None:
    done = sweep(tmp_path, "sweep.action=plan")
    assert done.returncode == 0 and "4 runs: 4 new" in done.stdout
    assert not any(tmp_path.iterdir())


def test_excluded_combinations_are_left_out_even_if_they_cannot_work(tmp_path: Path) -> None:
    axes = ("sweep.action=plan", "data.rows=16", "seed=0", "quant=none,nf4", "adapter=none,all_linear")
    refused = sweep(tmp_path, *axes)
    assert refused.returncode == 2 and "quant.format must be 'none' when adapter.kind is 'none'" in refused.stderr
    done = sweep(tmp_path, *axes, "study.exclude=[{quant:nf4,adapter:[none]}]")
    assert done.returncode == 0 and "3 runs: 3 new" in done.stdout, done.stderr
    misspelt = sweep(tmp_path, *axes, "study.exclude=[{qant:nf4}]")
    assert misspelt.returncode == 2 and "study.exclude names 'qant', which is no axis" in misspelt.stderr


def test_two_sweeps_at_once_execute_each_run_once(tmp_path: Path) -> None:
    """Also those that fail, which stop no other."""
    given = ("data.rows=16", "seed=0", "optim.max_grad_norm=1e30", "sweep.retry_failed=false")
    axes = (*given, "optim.learning_rate=1e30,1e-3")
    both = [start(tmp_path, f"launcher={launcher}", *axes) for launcher in ("in_process", "local")]
    said = [process.communicate(timeout=PATIENCE_S)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert sorted(states(tmp_path)) == [FAILED, FINISHED]
    assert attempts(tmp_path) == [1] * 2
    assert all("1 of 2 runs did not finish" in each for each in said)


# The first run is over soon; the second is in the middle of its steps when it is noticed.
STOPPED = ("launcher.max_parallel=1", "data.rows=16", "trainer.max_steps=2,100", "trainer.checkpoint_every_steps=1000")


@pytest.mark.parametrize(
    ("launcher", "signum", "status"),
    [("in_process", signal.SIGTERM, 143), ("local", signal.SIGINT, 130)],
)
def test_a_sweep_that_is_stopped_keeps_what_is_finished_and_goes_on(
    tmp_path: Path, launcher: str, signum: signal.Signals, status: int
) -> None:
    overrides = (f"launcher={launcher}", "seed=0", *STOPPED)
    process = start(tmp_path, *overrides)
    wait_for_steps(tmp_path, process, runs=2)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does: the whole process group
    else:
        process.send_signal(signum)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert "the same command goes on" in said and "Traceback" not in said
    assert sorted(states(tmp_path)) == [FINISHED, INTERRUPTED]
    done = sweep(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == [FINISHED] * 2
    assert sorted(attempts(tmp_path)) == [1, 2], "finished runs are not repeated"


def test_sigterm_leaves_no_job_running_and_starts_none(tmp_path: Path) -> None:
    """Unlike a terminal's Ctrl-C it reaches the launching process alone."""
    process = start(tmp_path, "launcher=local", "launcher.max_parallel=1", "trainer.max_steps=3000")
    wait_for_steps(tmp_path, process, runs=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    assert sorted(states(tmp_path)) == [INTERRUPTED, NEW, NEW, NEW]


def wait_for_steps(runs_dir: Path, process: subprocess.Popen[str], runs: int) -> None:
    """Wait until so many runs have taken a step."""
    deadline = time.monotonic() + PATIENCE_S
    while sum(file.stat().st_size > 0 for file in runs_dir.glob("*/metrics.jsonl")) < runs:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
