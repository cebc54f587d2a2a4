"""Why attempts ended that recorded nothing, by the books, and which runs get another."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.runs import lease
from qlora_lab.runs.causes import CODE, HOST_MEMORY, INFRASTRUCTURE, NODE, STOPPED, STORE, TIME_LIMIT
from qlora_lab.runs.folder import FAILED, INTERRUPTED, RunFolder
from qlora_lab.runs.lease import Lease
from qlora_lab.sweep.scheduler import Ending
from qlora_lab.sweep.slurm import due
from qlora_lab.sweep.slurm.endings import cause_of_ending
from qlora_lab.sweep.slurm.inventory import nodes_in
from tests.sweep.remembering_scheduler import Scheduler, option, submission


def begin(run: RunFolder, job: str) -> None:
    """Begin an attempt in a job, which records nothing else."""
    run.begin()
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps(status | {"job": job}))


@pytest.fixture
def scheduler(runs: list[RunFolder]) -> Scheduler:
    """One that keeps books; the last word of the first run is that job 41_0 executes it."""
    begin(runs[0], "41_0")
    keeper = Scheduler()
    keeper.keeps_books = True
    return keeper


@pytest.mark.parametrize(
    ("ending", "cause", "memory"),
    [
        (Ending("NODE_FAIL"), NODE, "64G"),
        (Ending("OUT_OF_MEMORY"), HOST_MEMORY, "96G"),
        (Ending("FAILED", signal=9), INFRASTRUCTURE, "64G"),
        (Ending("CANCELLED"), STOPPED, "64G"),
        (None, INFRASTRUCTURE, "64G"),
    ],
)
def test_a_run_whose_process_died_is_settled_and_submitted_again(
    tmp_path: Path, runs: list[RunFolder], scheduler: Scheduler, ending: Ending | None, cause: str, memory: str
) -> None:
    scheduler.keeps_books = ending is not None
    scheduler.books = {"41_0": ending} if ending is not None else {}
    assert submission(tmp_path, scheduler).launch(runs[:1]).submitted == [runs[0].run_id]
    settled = runs[0].status()
    assert settled is not None and (settled["state"], settled["cause"]) == (INTERRUPTED, cause)
    assert option(scheduler.scripts[0], "mem") == memory


@pytest.mark.parametrize(("partition", "memory"), [("gpu", "80G"), ("cpu", "96G"), (None, "80G")])
def test_more_memory_is_asked_for_up_to_what_a_node_has(
    tmp_path: Path, runs: list[RunFolder], partition: str | None, memory: str
) -> None:
    """Of nodes with a GPU; of the partition `cpu` none is known that has one."""
    runs[0].begin()
    runs[0].end(INTERRUPTED, 1.0, cause=HOST_MEMORY)
    scheduler = Scheduler()
    scheduler.nodes = nodes_in(
        "NodeName=gpu01 CPUTot=64 Gres=gpu:4 RealMemory=82000 Partitions=gpu\n"
        "NodeName=cpu01 CPUTot=64 RealMemory=512000 Partitions=cpu\n"
    )
    slurm = SlurmConfig(memory_gb=64, partition=partition)
    submission(tmp_path, scheduler, slurm=slurm).launch(runs[:1])
    assert option(scheduler.scripts[0], "mem") == memory


def test_a_run_that_used_up_its_attempts_is_failed(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    for _ in range(3):
        runs[0].begin()
    outcome = submission(tmp_path, scheduler).launch(runs[:1])
    assert outcome.given_up == [runs[0].run_id] and not scheduler.scripts
    assert runs[0].state() == FAILED
    assert submission(tmp_path, scheduler).launch(runs[:1]).given_up, "each time"
    assert submission(tmp_path, scheduler).launch(runs[:1], beyond_rules=True).submitted, "unless it is asked for"


def test_a_run_that_recorded_too_many_interruptions_itself_is_failed(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    for run in runs[:2]:
        for _ in range(4):
            run.begin()
            run.end(INTERRUPTED, 1.0, cause=TIME_LIMIT)
    assert submission(tmp_path, scheduler).launch(runs[:1], beyond_rules=True).submitted == [runs[0].run_id]
    assert submission(tmp_path, scheduler).launch(runs[1:2]).given_up == [runs[1].run_id]
    assert [(run.state(), (run.status() or {})["cause"]) for run in runs[:2]] == [
        (INTERRUPTED, TIME_LIMIT),
        (FAILED, TIME_LIMIT),
    ]


@pytest.mark.parametrize("keeps_books", [True, False])
def test_late_books_are_waited_for(
    tmp_path: Path, runs: list[RunFolder], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, keeps_books: bool
) -> None:
    """A run that was killed outgrew its memory, which is in the books a moment later; its job was requeued before."""
    now = datetime.now(UTC)
    scheduler.keeps_books = keeps_books
    scheduler.books = {"41_0": Ending("REQUEUED", ended_at=now - timedelta(minutes=3))}
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            scheduler.books = {"41_0": Ending("OUT_OF_MEMORY", ended_at=now + timedelta(minutes=1))}

    monkeypatch.setattr(due.time, "sleep", wait)
    assert submission(tmp_path, scheduler).launch(runs[:1]).submitted
    cause = (runs[0].status() or {})["cause"]
    assert (cause, len(waited)) == ((HOST_MEMORY, 3) if keeps_books else (INFRASTRUCTURE, 0))


def test_who_begins_a_run_while_the_books_are_waited_for_keeps_it(
    tmp_path: Path, runs: list[RunFolder], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of another plan, on a node whose locks are not seen from here."""
    leases: list[Lease] = []
    monkeypatch.setattr(lease, "lives_by_lock", lambda path: None)

    def another_begins(seconds: float) -> None:
        if not leases:
            taken = runs[0].claim().attempt()
            assert taken is not None
            leases.append(taken)
            other = RunFolder(runs[0].path, taken)
            other.begin()
            scheduler.books = {"41_0": Ending("NODE_FAIL")}

    monkeypatch.setattr(due.time, "sleep", another_begins)
    assert not submission(tmp_path, scheduler).launch(runs[:1]).submitted
    assert leases[0].is_held() and (runs[0].status() or {})["state"] == "running"
    leases[0].release()


def test_books_that_forgot_are_not_waited_for_for_ever(
    tmp_path: Path, runs: list[RunFolder], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(due, "BOOKS_S", 0.05)
    monkeypatch.setattr(due, "POLL_S", 0.01)
    assert submission(tmp_path, scheduler).launch(runs[:1]).submitted
    assert (runs[0].status() or {})["cause"] == INFRASTRUCTURE


def test_causes_of_endings() -> None:
    gib = 2**30
    outgrown = Ending("FAILED", exit_code=1, peak_memory_bytes=gib - 1000, memory_limit_bytes=gib)
    assert cause_of_ending(outgrown) == HOST_MEMORY
    assert cause_of_ending(Ending("FAILED", exit_code=1, peak_memory_bytes=gib // 2, memory_limit_bytes=gib)) == CODE
    assert cause_of_ending(Ending("TIMEOUT", signal=1)) == TIME_LIMIT
    assert cause_of_ending(Ending("FAILED", signal=53)) == INFRASTRUCTURE
    assert {cause_of_ending(Ending("FAILED", exit_code=code)) for code in (3, 4, 143)} == {INFRASTRUCTURE}
    assert {cause_of_ending(Ending("FAILED", exit_code=code)) for code in (5, 126, 127)} == {STORE}
    assert cause_of_ending(Ending("FAILED", exit_code=1)) == CODE
    log = "step 3\nslurmstepd-gpu01: error: Exceeded job memory limit\n"
    assert cause_of_ending(Ending("FAILED", signal=9), log) == HOST_MEMORY
    assert cause_of_ending(Ending("FAILED", signal=9), "no memory limit\n") == INFRASTRUCTURE
