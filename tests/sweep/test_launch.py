"""What a job is told, and what becomes of jobs when the command that started them ends."""

import contextlib
import io
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config import hardware
from qlora_lab.config.hardware import Hardware
from qlora_lab.memory.process import SHARED_BYTES
from qlora_lab.memory.room import RESERVED_BYTES, predict
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from qlora_lab.sweep import launch
from qlora_lab.sweep.chunk import Chunk
from qlora_lab.sweep.plan import Plan, make_plan
from qlora_lab.sweep.prepare import prepare
from qlora_lab.sweep.progress import SweepProgress
from qlora_lab.sweep.worker import RunJob
from tests.helpers import tiny

MACHINE = Hardware("a laptop", frozenset(), cores=8, gpus=())


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    config = tiny(tmp_path, "launcher.max_parallel=2")
    plan = make_plan("study", [({"seed": str(seed)}, replace(config, seed=seed)) for seed in range(3)])
    plan.write()
    return plan


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Stand in for run.execute: the runs' ids and the GPUs they saw; the state they end in is set by their number."""
    seen: list[tuple[str, str | None]] = []
    ends = [FAILED, INTERRUPTED, FINISHED]

    def execute(path: Path, *_: Any) -> str:
        seen.append((path.name, os.environ.get("CUDA_VISIBLE_DEVICES")))
        return ends[len(seen) - 1]

    monkeypatch.setitem(sys.modules, "qlora_lab.run", types.SimpleNamespace(execute=execute))  # type: ignore[arg-type]
    return seen


def test_after_a_failure_the_others_go_on_and_after_a_stop_none_does(
    plan: Plan, executed: list[tuple[str, str | None]]
) -> None:
    with pytest.raises(SystemExit) as end:
        launch.launch(plan, replace(plan.runs[0].config.launcher, kind="in_process"))
    assert end.value.code == 143
    assert [run_id for run_id, _ in executed] == [run.run_id for run in plan.runs[:2]]


def test_a_job_sees_the_gpu_it_is_given(
    executed: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus = ("2", "GPU-8932f937")
    for slot in range(3):
        with contextlib.suppress(SystemExit):
            RunJob(launch._gpu_of(slot, gpus))("run")
    assert [gpu for _, gpu in executed] == ["2", "GPU-8932f937", "2"]
    assert launch._gpu_of(0, ()) is None


def test_no_job_goes_on_unwatched_when_its_sweep_breaks(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import submitit

    cancelled: list[str] = []

    class Job:
        def cancel(self, check: bool) -> None:
            cancelled.append("job")

    class Executor:
        def __init__(self, folder: Path) -> None:
            folder.mkdir(parents=True)
            self.submitted = 0

        def update_parameters(self, **_: Any) -> None:
            pass

        def submit(self, job: RunJob, path: str, attempts_before: int) -> Job:
            self.submitted += 1
            if self.submitted == 2:
                raise OSError("the disk is full")
            return Job()

    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    with pytest.raises(OSError, match="the disk is full"):
        launch.launch(plan, replace(plan.runs[0].config.launcher, kind="local"))
    assert cancelled == ["job"]


def test_a_pool_has_as_many_workers_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path, "trainer.device=cpu", "trainer.compute_dtype=float32", "launcher=pool")
    room_for_two = round(RESERVED_BYTES) + 2 * (predict(prepare(config, MACHINE)).peak_bytes or 0)
    monkeypatch.setattr(hardware, "detect", lambda: replace(MACHINE, memory_bytes=room_for_two - SHARED_BYTES + 1000))
    plan = make_plan("study", [({"seed": str(seed)}, replace(config, seed=seed)) for seed in range(5)])
    workers: list[int] = []

    class Pool:
        def __init__(self, chunk: Chunk, gpus: list[str | None]) -> None:
            workers.append(len(gpus))

        def run(self, progress: SweepProgress) -> None:
            pass

    monkeypatch.setattr(launch, "LocalPool", Pool)
    launch.launch(plan, plan.runs[0].config.launcher)
    assert workers == [2] and {run.config.trainer.threads for run in plan.runs} == {4}
    assert capsys.readouterr().out.startswith("at most 2 of 5 runs at once, since one needs up to ")


@pytest.mark.parametrize(
    ("overrides", "threads"),
    [
        (("launcher=slurm", "launcher.slurm.cpus_per_run=6"), 6),  # a node's, not this machine's
        (("launcher=local", "launcher.max_parallel=3"), 2),
        (("launcher=local",), 1),
        (("launcher=in_process",), 8),
        (("launcher=slurm", "trainer.threads=3"), 3),
        (("launcher=slurm", "launcher.slurm.cpus_per_run=6", "launcher.runs_per_gpu=2"), 3),
        (("launcher=pool", "launcher.max_parallel=2", "launcher.runs_per_gpu=2"), 2),
    ],
)
def test_threads_are_a_runs_share_of_the_cores(tmp_path: Path, overrides: tuple[str, ...], threads: int) -> None:
    machine = Hardware("a login node", frozenset(), cores=8, gpus=())
    assert prepare(tiny(tmp_path, *overrides), machine).trainer.threads == threads


def test_progress_looks_at_finished_runs_once(tmp_path: Path) -> None:
    """It shows them twice a second, and there may be ten thousand."""
    looked: list[str] = []

    class Watched(RunFolder):
        def status(self) -> dict[str, Any] | None:
            looked.append(self.run_id)
            return super().status()

    folders = [Watched(tmp_path / name) for name in ("finished", "new")]
    folders[0].begin()
    folders[0].end(FINISHED, 1.0)
    out = io.StringIO()
    progress = SweepProgress(folders, out)
    looked.clear()
    for _ in range(3):
        progress.show()
    assert looked == ["finished", "new", "new", "new"]
    folders[1].begin()
    folders[1].end(FAILED, 1.0)
    looked.clear()
    progress.show()
    assert looked == ["new"]
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == [
        "1 finished, 1 new",
        "1 finished, 1 failed",
    ]
