"""What may run at once, divided anew where later commands queue arrays beside earlier ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.runs.folder import RunFolder
from qlora_lab.sweep.scheduler import ENDED, PENDING, RUNNING, Job
from qlora_lab.sweep.slurm.script import comment_of
from qlora_lab.sweep.slurm.throttle import Throttle, throttles
from tests.sweep.remembering_scheduler import Scheduler, option, submission


def job(nonce: str, tasks: int, state: str = PENDING) -> Job:
    return Job(nonce * 2, tuple(range(tasks)), state, state.upper(), comment_of(nonce))


def entry(parallel: int | None, mode: str = "array") -> dict[str, object]:
    return {"event": "submitted", "job": "1", "mode": mode, "parallel": parallel}


@pytest.mark.parametrize(
    ("queue", "entries", "changes"),
    [
        # beside a full array, later ones get what their size is worth, and it makes room first
        ([job("1", 500), job("2", 300)], {"1": entry(64), "2": entry(1)}, [("1", 40), ("2", 24)]),
        # the tasks of an array stand in several lines; those that are over do not count
        (
            [job("1", 90, ENDED), job("1", 4, RUNNING), job("1", 6), job("2", 300)],
            {"1": entry(64), "2": entry(1)},
            [("1", 3), ("2", 61)],
        ),
        ([job("2", 300)], {"1": entry(64), "2": entry(1)}, [("2", 64)]),
        # small differences are no reason
        ([job("1", 731), job("2", 742), job("3", 40)], {"1": entry(31), "2": entry(30), "3": entry(3)}, []),
        # fewer tasks than may run at once, and single ones
        ([job("1", 20), job("2", 30), job("3", 1)], {"1": entry(64), "2": entry(44), "3": entry(1)}, []),
        # pools keep theirs
        ([job("1", 60), job("2", 300)], {"1": entry(60, "pool"), "2": entry(1)}, [("2", 4)]),
        # no throttle at all is one as well
        ([job("1", 500), job("2", 300)], {"1": entry(None), "2": entry(1)}, [("1", 40), ("2", 24)]),
        # jobs of others, and what SLURM has not taken
        ([job("1", 500), job("2", 300)], {"2": {"event": "intent", "mode": "array", "parallel": 1}}, []),
    ],
)
def test_arrays_share_by_what_each_has_left(
    queue: list[Job], entries: dict[str, dict[str, object]], changes: list[tuple[str, int]]
) -> None:
    assert throttles(queue, entries, 64) == [Throttle(nonce, nonce * 2, share) for nonce, share in changes]


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    return [RunFolder(tmp_path / "runs" / f"{number:012x}") for number in range(9)]


def test_what_is_queued_beside_a_full_array_makes_it_give_way(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    submission(tmp_path, scheduler, max_parallel=4).launch(runs[:5])
    assert option(scheduler.scripts[1], "array") == "0-3" and not scheduler.throttled
    submission(tmp_path, scheduler, max_parallel=4).launch(runs)
    assert option(scheduler.scripts[3], "array") == "0-2%1", "beside a canary and an array of four"
    assert scheduler.throttled == [("2", 2), ("4", 2)]
    submission(tmp_path, scheduler, max_parallel=4).launch(runs)
    assert len(scheduler.throttled) == 2 and len(scheduler.scripts) == 4, "what was done is noted"


def test_where_slurm_does_not_divide_anew_a_later_command_does(tmp_path: Path, runs: list[RunFolder]) -> None:
    scheduler = Scheduler()
    submission(tmp_path, scheduler, max_parallel=4).launch(runs[:5])
    scheduler.refuses_to_throttle = True
    outcome = submission(tmp_path, scheduler, max_parallel=4).launch(runs)
    assert len(outcome.submitted) == 4 and outcome.jobs == ["3", "4"]
    scheduler.refuses_to_throttle = False
    scheduler.queue = [replace(each, state=ENDED) if each.job != "4" else each for each in scheduler.queue]
    submission(tmp_path, scheduler, max_parallel=4).launch(runs[6:])
    assert scheduler.throttled == [("4", 4)] and len(scheduler.scripts) == 4
