"""Why a job is told to stop, from what SLURM says of it at that moment."""

import pytest

from qlora_lab.runs.causes import PREEMPTION, STOPPED, TIME_LIMIT
from qlora_lab.sweep.slurm import task
from qlora_lab.sweep.slurm.task import SlurmTask

NONE = {"PreemptTime": "None", "Restarts": "0", "TimeLimit": "04:00:00", "RunTime": "00:10:00"}
NONE |= {"StartTime": "2026-01-02T12:00:00"}


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `scontrol show job` says; commands that change something are noted as `told`."""
    said = {"JobState": "RUNNING", **NONE}

    def run(command: str, *arguments: str) -> str:
        if "show" not in arguments:
            said["told"] = " ".join(arguments)
        return " ".join(f"{key}={value}" for key, value in said.items())

    monkeypatch.setattr(task, "run", run)
    monkeypatch.setattr(task, "KILLED_WITHIN_S", 0.0)
    return said


@pytest.mark.parametrize(
    ("changes", "restarts", "cause"),
    [
        ({}, 0, PREEMPTION),  # a signal while it runs, well before its end
        ({"RunTime": "03:59:00"}, 0, TIME_LIMIT),
        ({"JobState": "COMPLETING"}, 0, STOPPED),
        ({"JobState": "COMPLETING", "Restarts": "2"}, 2, STOPPED),
        # pushed out without a time of grace: put back into the queue, or cancelled
        ({"JobState": "COMPLETING", "Restarts": "1"}, 0, PREEMPTION),
        ({"JobState": "COMPLETING", "PreemptTime": "2026-01-02T12:10:00"}, 0, PREEMPTION),
        # pushed out once before, and cancelled now
        ({"JobState": "COMPLETING", "Restarts": "1", "PreemptTime": "2026-01-02T11:00:00"}, 1, STOPPED),
    ],
)
def test_causes_of_a_signal(words: dict[str, str], changes: dict[str, str], restarts: int, cause: str) -> None:
    words |= changes
    assert SlurmTask("41_3", 120.0, restarts).why_stopped() == cause


def test_only_a_job_that_runs_as_it_did_when_this_process_began_is_put_back(words: dict[str, str]) -> None:
    mine = SlurmTask("41_3", 120.0, restarts=0)
    words["JobState"] = "COMPLETING"
    mine.requeue()
    words |= {"JobState": "RUNNING", "Restarts": "1"}  # on another node, since this one was given up
    mine.requeue()
    assert "told" not in words
    words["Restarts"] = "0"
    mine.requeue()
    assert words["told"] == "requeue 41_3"
