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
]


def sweep(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs_dir, *overrides), capture_output=True, text=True, check=False, timeout=240)


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


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    done = sweep(
        tmp_path,
        "launcher=local",
        "launcher.max_parallel=2",
        "data.rows=16",
        "seed=0",
        "optim.learning_rate=1e30,1e-3",
        "optim.max_grad_norm=1e30",
    )
    assert done.returncode == 1
    assert sorted(states(tmp_path)) == [FAILED, FINISHED]
    assert "1 of 2 runs did not finish" in done.stderr


def test_two_sweeps_at_once_execute_each_run_once(tmp_path: Path) -> None:
    both = [
        subprocess.Popen(command(tmp_path, f"launcher={launcher}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for launcher in ("in_process", "local")
    ]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    assert states(tmp_path) == [FINISHED] * 4
    assert attempts(tmp_path) == [1] * 4


@pytest.mark.parametrize("launcher", ["in_process", "local"])
def test_ctrl_c_in_the_middle_keeps_what_is_finished(tmp_path: Path, launcher: str) -> None:
    overrides = (f"launcher={launcher}", "launcher.max_parallel=1", "trainer.max_steps=30")
    process = subprocess.Popen(
        command(tmp_path, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while FINISHED not in states(tmp_path) if tmp_path.exists() else True:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole process group
    assert process.wait(timeout=60) == 130
    finished = {path.name for path in tmp_path.iterdir() if (path / "result.json").exists()}
    assert 1 <= len(finished) < 4
    done = sweep(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == [FINISHED] * 4
    again = {
        path.name: json.loads((path / "status.json").read_text())["attempt"]
        for path in tmp_path.iterdir()
        if (path / "status.json").exists()
    }
    assert all(again[name] == 1 for name in finished), "finished runs are not repeated"


@pytest.mark.parametrize("launcher", ["in_process", "local"])
def test_sigterm_stops_the_sweep(tmp_path: Path, launcher: str) -> None:
    overrides = (f"launcher={launcher}", "launcher.max_parallel=1", "trainer.max_steps=3000")
    process = subprocess.Popen(command(tmp_path, *overrides), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command goes on" in said and "Traceback" not in said
    assert sorted(states(tmp_path)) == [INTERRUPTED, NEW, NEW, NEW], "no other run starts, and none is left running"
