"""Jobs that ended before their run began are recorded, told and tried again by cause."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.runs.causes import CODE, INFRASTRUCTURE, STORE
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RunFolder
from qlora_lab.sweep.scheduler import RUNNING, Ending
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
    assert mine.launch(runs).submitted == [run.run_id for run in runs]


@pytest.mark.parametrize(
    ("ending", "state", "cause"),
    [
        (Ending("FAILED", 5, 0, "gpu02"), FAILED, STORE),  # the worker's own word
        (Ending("FAILED", 127, 0, "gpu02"), FAILED, STORE),  # no such Python
        (Ending("FAILED", 1, 0, "gpu02"), FAILED, CODE),
        (Ending("FAILED", 0, 9, "gpu02"), INTERRUPTED, INFRASTRUCTURE),
        (Ending("FAILED", 3, 0, "gpu02"), NEW, None),  # held back
        (Ending("FAILED", 143, 0, "gpu02"), NEW, None),  # told to stop
        (Ending("COMPLETED"), NEW, None),
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
    assert bad_nodes(run.status() for run in runs) == ["gpu02"]


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
