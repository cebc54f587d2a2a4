"""Which runs get another attempt, now that no job has them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_lab.runs.folder import FAILED, FINISHED, RUNNING, RunFolder, held
from qlora_lab.runs.heartbeat import newest
from qlora_lab.sweep.scheduler import Ending, Scheduler
from qlora_lab.sweep.settle import give_up, is_given_up, may_go_on, settle
from qlora_lab.sweep.slurm.endings import cause_of_ending, ending_of, log_tail

BOOKS_S = 30.0  # for SLURM's books, which lag behind its queue, to say how a job ended
POLL_S = 1.0


def due(
    runs: Sequence[RunFolder],
    scheduler: Scheduler,
    *,
    beyond_rules: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[list[RunFolder], list[str]]:
    """Record why runs ended whose jobs are gone, and return those that get another attempt.

    Args:
        runs: in no queue.
        beyond_rules: whether failed runs that are out of tries get one, since `retry` asks for them.
        log: prints a line.

    Returns:
        Those to submit, and the ids of those that are out of tries.
    """
    statuses = {run.run_id: status for run in runs if (status := run.status()) is not None}
    failed = {run_id for run_id, status in statuses.items() if status["state"] == FAILED or is_given_up(status)}
    asked_for = failed if beyond_rules else set()
    _settle_silent([run for run in runs if statuses.get(run.run_id, {}).get("state") == RUNNING], scheduler, log)
    to_do, given_up = [], []
    for run in runs:
        status = run.status()
        state = status["state"] if status is not None else None
        if state == FINISHED or (state == RUNNING and run.is_held()):
            continue
        if run.run_id in asked_for or may_go_on(status):
            to_do.append(run)
        else:
            give_up(run)
            given_up.append(run.run_id)
    return to_do, given_up


def _settle_silent(running: Sequence[RunFolder], scheduler: Scheduler, log: Callable[[str], None]) -> None:
    """Record the end of runs that nobody executes, though the last word of them is that they run."""
    leases = {run: newest(run.path) for run in running}  # whoever begins a run after this look keeps its own
    living = held(running)
    silent = [(run, run.status() or {}) for run in running if run not in living]
    endings = _endings([status for _, status in silent if status.get("job")], scheduler, log)
    for run, status in silent:
        settle(run, cause_of_ending(ending_of(status, endings), log_tail(status.get("log"))), dead=leases[run])


def _endings(
    records: Sequence[Mapping[str, Any]], scheduler: Scheduler, log: Callable[[str], None]
) -> dict[str, list[Ending]]:
    """Return how attempts' jobs ended that are in no queue, waiting a while for the books of a site that keeps some.

    A job that they do not know after `BOOKS_S` is taken to be lost to the infrastructure: books forget, and a run must
    not wait for ever.
    """
    jobs = list(dict.fromkeys(record["job"] for record in records))
    endings = scheduler.endings(jobs) if jobs else {}
    unknown = _unknown(records, endings)
    if unknown and scheduler.keeps_books:
        log(f"waiting up to {BOOKS_S:.0f} s for SLURM's books to say how {len(unknown)} jobs ended")
        deadline = time.monotonic() + BOOKS_S
        while _unknown(records, endings) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            endings = scheduler.endings(jobs)
    return endings


def _unknown(records: Sequence[Mapping[str, Any]], endings: Mapping[str, Sequence[Ending]]) -> set[str]:
    """Return the jobs whose end the books do not have."""
    return {record["job"] for record in records if ending_of(record, endings) is None}
