"""Which of the entries in SLURM's books is an attempt's: of a job that was requeued there is one for each start."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.sweep.scheduler import Ending
from qlora_lab.sweep.slurm.books import completion_log, endings_in
from qlora_lab.sweep.slurm.endings import ending_of

MIB = 2**20
# sacct of SLURM 22.05: task 0 was requeued, then its node died with it, it was requeued again, and cancelled while it
# waited; task 1 died with the node too, and runs again; task 2 runs, and the end of task 3 is not in the books yet.
SACCT = """\
41_0|REQUEUED|0:0|gpu01||2G|2026-01-01T09:00:00|2026-01-01T09:30:00
41_0.batch|CANCELLED|0:15|gpu01|1900M||2026-01-01T09:00:00|2026-01-01T09:30:00
41_1|NODE_FAIL|0:0|gpu01||2G|2026-01-01T09:00:00|2026-01-01T10:00:00
41_1.batch|CANCELLED|||||2026-01-01T09:00:00|2026-01-01T10:00:00
41_0|NODE_FAIL|0:0|gpu01||2G|2026-01-01T09:31:00|2026-01-01T10:00:00
41_0|CANCELLED by 0|0:15|gpu02||2G|2026-01-01T10:01:00|2026-01-01T11:00:00
41_0.batch|CANCELLED|0:15|gpu02|10M||2026-01-01T10:01:00|2026-01-01T11:00:00
41_0|CANCELLED by 0|0:0|None assigned||2G|None|2026-01-01T11:00:01
41_1|RUNNING|0:0|gpu02||2G|2026-01-01T10:01:00|Unknown
41_1.batch|RUNNING|0:0|gpu02|700M||2026-01-01T10:01:00|Unknown
41_2|RUNNING|0:0|gpu01||2G|2026-01-01T09:00:00|Unknown
41_3|PREEMPTED|0:0|gpu01||2G|2026-01-01T08:00:00|2026-01-01T09:00:00
41_3|PENDING|0:0|None assigned||2G|Unknown|Unknown
42|FAILED|1:0|gpu03||2G|2026-01-01T09:00:00|2026-01-01T11:00:00
"""
IDS = ["41_0", "41_1", "41_2", "41_3"]


def at(hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 1, 1, hour, minute, second, tzinfo=UTC)


def test_each_end_of_a_requeued_job_is_read() -> None:
    limit = 2048 * MIB
    assert endings_in(SACCT, IDS) == {
        "41_0": [
            Ending("REQUEUED", 0, 0, "gpu01", 1900 * MIB, limit, at(9, 30), restart=0),
            Ending("NODE_FAIL", 0, 0, "gpu01", None, limit, at(10), restart=1),
            Ending("CANCELLED", 0, 15, "gpu02", 10 * MIB, limit, at(11), restart=2),
            Ending("CANCELLED", 0, 0, None, None, limit, at(11, 0, 1), restart=None),
        ],
        "41_1": [Ending("NODE_FAIL", 0, 0, "gpu01", None, limit, at(10), restart=0)],
        "41_3": [Ending("PREEMPTED", 0, 0, "gpu01", None, limit, at(9), restart=0)],
    }


@pytest.mark.parametrize(
    ("job", "restart", "word"),
    [
        ("41_0", 0, "REQUEUED"),
        ("41_0", 1, "NODE_FAIL"),
        ("41_0", 2, "CANCELLED"),
        ("41_1", 0, "NODE_FAIL"),
        ("41_1", 1, None),  # it runs
        ("41_2", 0, None),
        ("41_3", 1, None),
        ("43", 0, None),  # of which the books know nothing
    ],
)
def test_an_attempt_ended_as_its_own_start_of_the_job_did(job: str, restart: int, word: str | None) -> None:
    """Though its node's clock is an hour ahead of SLURM's, or a day behind."""
    for began in (at(12), at(9).replace(year=2025)):
        record = {"job": job, "restart": restart, "started_at": began.isoformat()}
        ending = ending_of(record, endings_in(SACCT, IDS))
        assert (ending.word if ending is not None else None) == word


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"started_at": at(8, 30)}, "PREEMPTED"),
        ({"started_at": at(9, 30)}, None),  # the end of an earlier attempt
        ({"started_at": at(9, 0, 40)}, "PREEMPTED"),  # by a node's clock that is ahead
    ],
)
def test_an_attempt_that_does_not_know_its_start_goes_by_the_clock(record: dict[str, Any], word: str | None) -> None:
    record = {"job": "41_3", "started_at": record["started_at"].isoformat()}
    ending = ending_of(record, endings_in(SACCT, IDS))
    assert (ending.word if ending is not None else None) == word


def test_the_file_of_completed_jobs_is_counted_too(tmp_path: Path) -> None:
    """Abridged from SLURM 22.05; a controller that was killed wrote twice of the second start."""
    log = tmp_path / "jobcomp.txt"
    lines = (
        "JobId=2 JobState=PENDING StartTime=T09 EndTime=T10 NodeList=gpu01 ArrayJobId=1 ArrayTaskId=0 ExitCode=0:0",
        "JobId=2 JobState=PENDING StartTime=T11 EndTime=T12 NodeList=gpu01 ArrayJobId=1 ArrayTaskId=0 ExitCode=0:0",
        "JobId=2 JobState=NODE_FAIL StartTime=T11 EndTime=T13 NodeList=gpu01 ArrayJobId=1 ArrayTaskId=0 ExitCode=0:0",
        "JobId=1 JobState=FAILED StartTime=T09 EndTime=T14 NodeList=gpu02 ArrayJobId=1 ArrayTaskId=1 ExitCode=1:0",
        "JobId=2 JobState=CANCELLED StartTime=T15 EndTime=T15 NodeList=(null) ArrayJobId=1 ArrayTaskId=0 ExitCode=0:0",
    )
    log.write_text("\n".join(lines) + "\n")
    requeued = Ending("REQUEUED", node="gpu01", restart=0)
    found = completion_log(str(log), ["1_0", "1_1", "1_2"])
    assert found == {
        "1_0": [requeued, replace(requeued, word="NODE_FAIL", restart=1), Ending("CANCELLED")],
        "1_1": [Ending("FAILED", 1, node="gpu02", restart=0)],
    }
    assert ending_of({"job": "1_0", "restart": 0, "started_at": at(9).isoformat()}, found) == requeued
    assert completion_log(str(tmp_path / "none"), ["1_0"]) == {} == completion_log(None, ["1_0"])
