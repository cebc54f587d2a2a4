"""Jobs that ended before their run began are recorded, told and tried again by cause."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_lab.runs.causes import (
    CODE,
    HOST_MEMORY,
    INFRASTRUCTURE,
    NODE,
    PREEMPTION,
    STORE,
    TIME_LIMIT,
)
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RunFolder
from qlora_lab.sweep.chunk import Chunk
from qlora_lab.sweep.scheduler import PENDING, RUNNING, Ending, Job
from qlora_lab.sweep.slurm.limits import SiteLimits
from qlora_lab.sweep.slurm.nodes import bad_nodes
from qlora_lab.sweep.slurm.wait import wait
from tests.sweep.remembering_scheduler import Scheduler, option, submission

NO_LOG = Ending("FAILED", 0, 53, "gpu02")  # what SLURM says where it cannot open a job's log


def test_a_node_that_does_not_see_the_store_is_told_and_the_run_tried_again(
    tmp_path: Path, runs: list[RunFolder]
) -> None:
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    mine.launch(runs)
    assert mine.record_unbegun(runs) == [], "they wait"
    scheduler.end("FAILED")
    scheduler.books = {"1_0": NO_LOG, **{f"2_{task}": Ending("CANCELLED") for task in range(4)}}
    (said,) = mine.record_unbegun(runs)
    assert said.startswith(
        f"run {runs[0].run_id}: job 1_0 ended on gpu02 before the run began, since that node does not"
    )
    assert "paths.runs_dir must be a folder that the nodes share with this machine" in said
    status = runs[0].status() or {}
    assert (status["state"], status["cause"], status["node"], status["attempt"]) == (FAILED, STORE, "gpu02", 1)
    assert [run.state() for run in runs[1:]] == [NEW] * 4
    assert mine.record_unbegun(runs) == [], "once"
    assert mine.launch(runs).given_up == [runs[0].run_id]
    assert mine.launch(runs, beyond_rules=True).submitted == [runs[0].run_id], "the others are queued"


@pytest.mark.parametrize(
    ("ending", "state", "cause"),
    [
        (Ending("FAILED", 5, 0, "gpu02"), FAILED, STORE),  # the worker's own word
        (Ending("FAILED", 127, 0, "gpu02"), FAILED, STORE),  # no such Python
        (Ending("FAILED", 1, 0, "gpu02"), FAILED, CODE),
        (Ending("FAILED", 0, 9, "gpu02"), INTERRUPTED, INFRASTRUCTURE),
        (Ending("FAILED", 3, 0, "gpu02"), NEW, None),  # held back
        (Ending("FAILED", 143, 0, "gpu02"), NEW, None),  # told to stop
        (Ending("OUT_OF_MEMORY", 0, 125, "gpu02"), INTERRUPTED, HOST_MEMORY),
        (Ending("TIMEOUT", 0, 15, "gpu02"), INTERRUPTED, TIME_LIMIT),
        (Ending("TIMEOUT", 143, 0, "gpu02"), INTERRUPTED, TIME_LIMIT),
        (Ending("DEADLINE"), INTERRUPTED, TIME_LIMIT),
        (Ending("BOOT_FAIL", node="gpu02"), INTERRUPTED, NODE),
        (Ending("NODE_FAIL", node="gpu02"), INTERRUPTED, NODE),
        (Ending("PREEMPTED", 0, 15, "gpu02"), INTERRUPTED, PREEMPTION),
        (Ending("REQUEUED", 0, 15, "gpu02"), NEW, None),
        (Ending("COMPLETED"), NEW, None),
        (Ending("CANCELLED", 0, 15, "gpu02"), NEW, None),
        (None, NEW, None),  # the books lag behind
    ],
)
def test_causes_before_a_run_began(
    tmp_path: Path, runs: list[RunFolder], ending: Ending | None, state: str, cause: str | None
) -> None:
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    mine.launch(runs[:1])
    scheduler.end()
    scheduler.books = {"1_0": ending} if ending is not None else {}
    mine.record_unbegun(runs)
    assert (runs[0].state(), (runs[0].status() or {}).get("cause")) == (state, cause)


def test_what_outgrows_its_memory_before_it_begins_gets_more_and_is_given_up_in_the_end(
    tmp_path: Path, runs: list[RunFolder]
) -> None:
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    for tries in (1, 2):
        assert mine.launch(runs[:1]).submitted
        scheduler.end()
        scheduler.books[f"{tries}_0"] = Ending("OUT_OF_MEMORY", 0, 125, "gpu02")
        (said,) = mine.record_unbegun(runs[:1])
    assert "ended on gpu02 before the run began (OUT_OF_MEMORY, exit status 0, signal 125)" in said
    assert [option(script, "mem") for script in scheduler.scripts] == ["64G", "96G"]
    assert runs[0].state() == FAILED and mine.launch(runs[:1]).given_up == [runs[0].run_id]


def test_where_others_have_worked_a_node_is_at_fault_and_left_out(tmp_path: Path, runs: list[RunFolder]) -> None:
    for number, node in enumerate(("gpu01", "gpu03")):
        runs[number].begin(node=node)
        runs[number].end(FINISHED, 1.0)
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    mine.launch(runs[2:])
    scheduler.end()
    scheduler.books = dict.fromkeys(("1_0", "2_0", "2_1"), NO_LOG)
    assert len(mine.record_unbegun(runs)) == 3
    assert {(run.status() or {})["cause"] for run in runs[2:]} == {INFRASTRUCTURE}
    assert {run.state() for run in runs[2:]} == {INTERRUPTED}
    assert bad_nodes((run.status() for run in runs), datetime.now(UTC)) == ["gpu02"]


def test_a_run_that_has_begun_since_is_left_alone(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    mine = submission(tmp_path, scheduler)
    mine.launch(runs[:1])
    scheduler.books = {"1_0": NO_LOG}  # of its first start, before it was requeued
    scheduler.queue = [replace(job, state=RUNNING) for job in scheduler.queue]
    assert mine.record_unbegun(runs) == []
    scheduler.end()
    runs[0].begin()
    assert mine.record_unbegun(runs) == []


def test_waiting_ends_when_nothing_but_failures_comes_back(
    tmp_path: Path, runs: list[RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler()
    submit = scheduler.submit

    def start_and_fail(script: str, **how: object) -> str:
        job = submit(script)
        scheduler.queue = []
        canary = option(script, "array") == "0-0" and "afterok" not in script
        scheduler.books |= {f"{job}_0": NO_LOG if canary else Ending("CANCELLED")}
        return job

    scheduler.submit = start_and_fail  # type: ignore[method-assign, assignment]
    wait(submission(tmp_path, scheduler, max_failures=2), runs)
    assert [run.state() for run in runs] == [FAILED, FAILED, NEW, NEW, NEW]
    assert "2 submissions in a row ended with failures alone; nothing more is submitted" in capsys.readouterr().out


def test_waiting_goes_on_while_jobs_of_others_leave_no_room(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(SiteLimits(max_submit=3))
    scheduler.queue = [Job("77", (0, 1, 2), PENDING, "PENDING", "of somebody else")]
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            scheduler.queue = []
        if scheduler.scripts:  # submitted at last
            scheduler.queue = []
            for run in runs:
                run.begin()
                run.end(FINISHED, 1.0)

    monkeypatch.setattr("qlora_lab.sweep.slurm.wait.time.sleep", sleep)
    wait(submission(tmp_path, scheduler), runs)
    assert [run.state() for run in runs] == [FINISHED] * 5 and len(slept) == 4
    assert capsys.readouterr().out.count("5 runs are above the site's limit; waiting until it has room") == 1


def test_a_study_that_has_changed_leaves_what_is_queued_alone(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    study = tmp_path / "studies" / "ranks"
    submission(study / "before", scheduler).launch(runs[:3])
    outcome = submission(study / "after", scheduler).launch(runs[2:])
    assert outcome.queued == [runs[2].run_id] and outcome.submitted == [run.run_id for run in runs[3:]]
    assert outcome.elsewhere == {"ranks/before": 2}
    assert "2 runs in the queue are of its earlier plan ranks/before alone, and go on" in outcome.lines()[-1]
    other = submission(tmp_path / "studies" / "formats" / "plan", scheduler).launch(runs[:1])
    assert other.submitted and not other.elsewhere, "another study's"
    elsewhere = [RunFolder(tmp_path / "elsewhere" / run.run_id) for run in runs]
    same_name = submission(study / "moved", scheduler).launch(elsewhere[:1])
    assert same_name.submitted and not same_name.elsewhere, "the same ids in another folder of runs"


def test_the_file_of_a_submission_is_read_once_for_all_its_jobs(
    tmp_path: Path, runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """squeue prints a line for each task that runs."""
    scheduler = Scheduler()
    study = tmp_path / "studies" / "ranks"
    submission(study / "before", scheduler, pool=True, max_parallel=3).launch(runs)
    scheduler.queue = [replace(job, tasks=(task,)) for job in scheduler.queue for task in job.tasks or ()]
    files: list[Path] = []
    read = Chunk.read
    monkeypatch.setattr(Chunk, "read", lambda file: files.append(file) or read(file))
    for plan in ("before", "after"):
        assert len(submission(study / plan, scheduler).launch(runs).queued) == len(runs)
        assert len(scheduler.queue) > len(files) == len(set(files)) == 2, "a canary and a pool"
        files.clear()
