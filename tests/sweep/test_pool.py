"""Workers that take runs: none is left out, none is done twice, time and the circuit breaker are heeded."""

import errno
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import LeaseLostError
from qlora_lab.runs.causes import CHANGED, HOST_MEMORY, INFRASTRUCTURE, NODE, PREEMPTION, TIME_LIMIT
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RUNNING, RunFolder
from qlora_lab.runs.lease import Claim, Lease
from qlora_lab.sweep import pool
from qlora_lab.sweep.chunk import ARRAY, POOL, Chunk
from qlora_lab.sweep.plan_file import code_sha256, write_plan_file
from qlora_lab.sweep.pool import ELSEWHERE, HELD_BACK, Worker
from qlora_lab.sweep.settle import may_go_on, memory_factor
from tests.helpers import tiny


@pytest.fixture
def chunk(tmp_path: Path) -> Chunk:
    run_ids = [f"{number:012}" for number in range(6)]
    for run_id in run_ids:
        (tmp_path / run_id).mkdir()
    chunk = Chunk(
        folder=tmp_path / "pool",
        runs_dir=tmp_path,
        nonce="ab",
        mode=POOL,
        run_ids=run_ids,
        attempts=[0] * 6,
        tasks=2,
        per_gpu=1,
        limit_s=None,
        resources=None,
        generation="cd",
        max_failures=2,
        commit=None,
    )
    chunk.write()
    assert Chunk.read(chunk.file) == chunk
    return chunk


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for run.execute; a run ends as the first word of its folder's `end` says, else finished."""
    order: list[str] = []

    def execute(path: Path, attempts_before: int, *, lease: Lease, config: Any, **_: Any) -> str:
        folder = RunFolder(path)
        assert config is None or config == folder.config(), "what it is given is what the folder holds"
        order.append(folder.run_id[-1])
        with folder.holding(lease):
            folder.begin()
            end = (path / "end").read_text() if (path / "end").exists() else FINISHED
            folder.end(end, 1.0, ValueError("bad luck") if end == FAILED else None)
        return end

    monkeypatch.setitem(sys.modules, "qlora_lab.run", types.SimpleNamespace(execute=execute))  # type: ignore[arg-type]
    warm = types.SimpleNamespace(WarmBase=lambda: None)
    monkeypatch.setitem(sys.modules, "qlora_lab.models.warm", warm)  # type: ignore[arg-type]
    monkeypatch.setattr(pool, "CLAIM_POLL_S", 0.0)
    return order


def test_each_worker_begins_with_its_share_and_takes_what_is_left(chunk: Chunk, executed: list[str]) -> None:
    assert Worker(chunk).all(1) == FINISHED
    assert executed == list("345012")
    assert Worker(chunk).all(0) == FINISHED and len(executed) == 6


def test_a_run_that_another_process_executes_is_left_to_it(chunk: Chunk, executed: list[str]) -> None:
    other = chunk.run(2)
    claim = other.claim()
    claim._beat_s = 0.001
    lease = claim.attempt()
    assert lease is not None
    with other.holding(lease):
        other.begin()
        assert Worker(chunk).all(0) == FINISHED
        assert Worker(replace(chunk, mode=ARRAY)).one(2) == ELSEWHERE
    assert executed == list("01345")


def test_failures_are_passed_over_and_told(chunk: Chunk, executed: list[str]) -> None:
    (chunk.run(1).path / "end").write_text(FAILED)
    assert Worker(chunk).all(0) == FAILED
    assert executed == list("012345") and Worker(chunk).all(0) == FINISHED, "none is tried again by the same pool"
    assert Worker(replace(chunk, attempts=[1] * 6)).all(0) == FAILED and executed[6:] == ["1"]


def test_the_first_runs_failing_alike_hold_back_the_others(chunk: Chunk, executed: list[str]) -> None:
    for index in range(6):
        (chunk.run(index).path / "end").write_text(FAILED)
    assert Worker(chunk).all(0) == HELD_BACK
    assert executed == list("01") and chunk.run(2).state() == NEW
    assert Worker(chunk).one(2) == HELD_BACK
    assert Worker(replace(chunk, generation="ef")).one(2) == FAILED, "the next command gives them another chance"


def test_no_breaker_after_a_success(chunk: Chunk, executed: list[str]) -> None:
    for index in range(1, 6):
        (chunk.run(index).path / "end").write_text(FAILED)
    assert Worker(chunk).all(0) == FAILED and len(executed) == 6


def test_no_run_is_begun_when_time_is_nearly_up(chunk: Chunk, executed: list[str]) -> None:
    now = [0.0]
    worker = Worker(replace(chunk, limit_s=600.0), clock=lambda: now[0])
    now[0] = 600.0 - pool.LAST_MOMENT_S + 1
    assert worker.all(0) == INTERRUPTED and not executed


def test_a_short_time_limit_is_time_for_a_run(chunk: Chunk, executed: list[str]) -> None:
    """Else a pool would be requeued for ever, and do nothing each time."""
    assert Worker(replace(chunk, limit_s=60.0)).all(0) == FINISHED and len(executed) == 6


def test_a_worker_that_is_told_to_stop_takes_no_further_run(chunk: Chunk, executed: list[str]) -> None:
    (chunk.run(0).path / "end").write_text(INTERRUPTED)
    assert Worker(chunk).all(0) == INTERRUPTED and executed == ["0"]


def test_other_code_than_planned_is_refused(chunk: Chunk, executed: list[str]) -> None:
    assert Worker(replace(chunk, commit="0" * 40, code_sha256=code_sha256())).one(1) == FINISHED, "the same files"
    executed.clear()
    assert Worker(replace(chunk, commit="0" * 40, code_sha256="0" * 64)).one(0) == FAILED
    status = chunk.run(0).status()
    assert not executed and status is not None and status["cause"] == CHANGED
    assert "the code has changed since this run was submitted" in status["error"]["message"]


def test_a_new_runs_folder_is_made_from_the_plans_file(chunk: Chunk, executed: list[str], tmp_path: Path) -> None:
    config = tiny(tmp_path)
    rows = [(run_id, {"seed": str(seed)}, replace(config, seed=seed)) for seed, run_id in enumerate(chunk.run_ids)]
    for run_id in chunk.run_ids:
        (tmp_path / run_id).rmdir()
    planned = replace(chunk, plan_file=str(write_plan_file(tmp_path, "study", rows)))
    planned.run(1).path.mkdir()
    (planned.run(1).path / "config.yaml").write_text("as it was begun")
    assert Worker(planned).all(0) == FINISHED
    assert planned.run(0).config() == config and planned.run(5).config() == rows[5][2]
    assert (planned.run(1).path / "config.yaml").read_text() == "as it was begun"


def test_a_run_whose_plan_is_gone_is_recorded_as_failed(chunk: Chunk, executed: list[str], tmp_path: Path) -> None:
    assert Worker(replace(chunk, plan_file=str(tmp_path / "plan-gone.json"))).one(0) == FAILED
    status = chunk.run(0).status()
    assert not executed and status is not None
    assert "plan-gone.json cannot be read (No such file or directory); plan the study" in status["error"]["message"]


def test_a_run_that_kills_its_workers_is_given_up(chunk: Chunk, executed: list[str]) -> None:
    run = chunk.run(0)
    for _ in range(3):
        run.begin()
    assert Worker(chunk).one(0) == FAILED and not executed
    status = run.status()
    assert status is not None and status["cause"] == INFRASTRUCTURE


def test_a_run_that_is_out_of_tries_does_not_keep_its_pool_from_the_others(chunk: Chunk, executed: list[str]) -> None:
    run = chunk.run(0)
    for _ in range(4):
        run.begin()
        run.end(INTERRUPTED, 1.0, cause=TIME_LIMIT)
    assert not chunk.is_open(0) and chunk.is_open(1)
    assert Worker(chunk).all(0) == FINISHED and sorted(executed) == list("12345")


@pytest.mark.parametrize(("cause", "state"), [(NODE, FINISHED), (INFRASTRUCTURE, FAILED)])
def test_silent_attempts_count_for_what_the_books_say(
    chunk: Chunk, executed: list[str], cause: str, state: str
) -> None:
    """Each time SLURM requeued the job, which has no attempts left where nobody asks why."""
    run = chunk.run(0)
    job = Worker(replace(chunk, mode=ARRAY), silent_cause=lambda record: cause)
    for _ in range(2):
        run.begin()
        run.end(INTERRUPTED, 1.0, cause=cause)
    run.begin()  # and never ends
    assert job.one(0) == state and executed == (["0"] if state == FINISHED else [])
    assert [attempt["cause"] for attempt in (run.status() or {})["history"]] == [cause] * 3


def test_a_run_that_outgrows_its_memory_is_left_to_the_next_command(chunk: Chunk, executed: list[str]) -> None:
    """A worker of the same size would be killed by it too, and no other one of the pool is larger."""
    chunk.run(0).begin()
    sized = replace(chunk, resources=SlurmConfig())
    for _ in range(2):
        assert Worker(sized, silent_cause=lambda record: HOST_MEMORY).all(0) == FINISHED
    assert Worker(replace(sized, mode=ARRAY)).one(0) == ELSEWHERE
    status = chunk.run(0).status() or {}
    assert executed == list("12345") and (status["state"], status["cause"]) == (INTERRUPTED, HOST_MEMORY)
    larger = replace(sized, attempts=[status["attempt"]] * 6)
    assert memory_factor(status) == 1.5 and Worker(larger).all(0) == FINISHED and executed[5:] == ["0"]


@pytest.mark.parametrize(
    ("error", "alone", "among_others", "went_on"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), HELD_BACK, HELD_BACK, ""),
        (LeaseLostError("another one took over"), ELSEWHERE, FINISHED, "12345"),
    ],
    ids=["full disk", "lost lease"],
)
def test_a_worker_survives_what_keeps_it_from_recording_an_end(
    chunk: Chunk,
    executed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    alone: str,
    among_others: str,
    went_on: str,
) -> None:
    real = RunFolder.end

    def end(self: RunFolder, *given: Any, **more: Any) -> None:
        if self.run_id == chunk.run_ids[0]:
            raise error
        real(self, *given, **more)

    monkeypatch.setattr(RunFolder, "end", end)
    assert Worker(replace(chunk, code_sha256="0" * 64)).one(0) == alone and not executed, "it is refused"
    assert (chunk.run(0).status() or {})["state"] == RUNNING, "as of an attempt that ended without a word"
    assert Worker(chunk).all(0) == among_others and executed == list(went_on)
    lease = chunk.run(0).claim().attempt()
    assert lease is not None, "nobody holds the run any longer"
    lease.release()


def test_a_disk_too_full_to_take_a_run_is_no_fault_of_it(
    chunk: Chunk, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Claim) -> Lease | None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Claim, "attempt", full)
    assert Worker(chunk).all(0) == Worker(chunk).one(0) == HELD_BACK and not executed


def test_a_canary_waits_for_who_executes_its_run(
    chunk: Chunk, executed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end says whether the runs that wait for the canary may begin."""
    other = chunk.run(2)
    claim = other.claim()
    claim._beat_s = 0.001
    lease = claim.attempt()
    assert lease is not None
    looks: list[float] = []

    def wait(seconds: float) -> None:
        looks.append(time.monotonic())
        if len(looks) == 20:
            other.begin()
            other.end(FAILED, 1.0, ValueError("bad luck"))
        real_sleep(0.005)

    real_sleep = time.sleep
    monkeypatch.setattr(pool.time, "sleep", wait)
    with other.holding(lease):
        assert Worker(replace(chunk, mode=ARRAY, canary=True)).one(2) == FAILED
    assert not executed and len(looks) == 20


def attempts(*given: tuple[str, int]) -> dict[str, Any]:
    *before, last = [{"state": INTERRUPTED, "cause": cause, "step": step} for cause, step in given]
    return {**last, "history": before}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, True),
        (attempts((PREEMPTION, 0), *[(PREEMPTION, 0)] * 30), True),
        (attempts(*[(TIME_LIMIT, 0)] * 3), False),
        (attempts(*[(TIME_LIMIT, step) for step in range(1, 9)]), True),
        (attempts((TIME_LIMIT, 5), *[(TIME_LIMIT, 5)] * 2), True),
        (attempts((TIME_LIMIT, 5), *[(TIME_LIMIT, 5)] * 3), False),
        (attempts(("host_memory", 0)), True),
        (attempts(*[("host_memory", 0)] * 2), False),
        (attempts(("code", 3)), False),
        (attempts((INFRASTRUCTURE, 0), (PREEMPTION, 0), (INFRASTRUCTURE, 0), (INFRASTRUCTURE, 0)), True),
    ],
)
def test_who_may_go_on(status: dict[str, Any] | None, expected: bool) -> None:
    assert may_go_on(status) is expected


def test_more_memory_for_each_attempt_that_outgrew_its_own() -> None:
    assert memory_factor(None) == 1.0
    assert memory_factor(attempts(("host_memory", 0), (PREEMPTION, 0))) == 1.5
