"""Which runs get another attempt, now that no job has them."""

from collections.abc import Sequence

from qlora_lab.runs.folder import FAILED, FINISHED, RUNNING, RunFolder, held
from qlora_lab.sweep.scheduler import Scheduler
from qlora_lab.sweep.settle import may_go_on, settle
from qlora_lab.sweep.slurm.endings import cause_of_ending, log_tail


def due(runs: Sequence[RunFolder], scheduler: Scheduler) -> tuple[list[RunFolder], list[str]]:
    """Record why runs ended whose jobs are gone, and return those that get another attempt.

    Args:
        runs: in no queue; failed ones are asked for by name, so that they are tried again.

    Returns:
        Those to submit, and the ids of those whose cause has used up its attempts.
    """
    before = {run.run_id: run.status() or {} for run in runs}
    _settle_silent([run for run in runs if before[run.run_id].get("state") == RUNNING], scheduler)
    to_do, given_up = [], []
    for run in runs:
        status = run.status()
        state = status["state"] if status is not None else None
        if state == FINISHED or (state == RUNNING and run.is_held()):
            continue
        if before[run.run_id].get("state") == FAILED or may_go_on(status):
            to_do.append(run)
        else:
            given_up.append(run.run_id)
    return to_do, given_up


def _settle_silent(running: Sequence[RunFolder], scheduler: Scheduler) -> None:
    """Record the end of runs that nobody executes, though the last word of them is that they run."""
    living = held(running)
    silent = [(run, run.status() or {}) for run in running if run not in living]
    endings = scheduler.endings([status["job"] for _, status in silent if status.get("job")])
    for run, status in silent:
        settle(run, cause_of_ending(endings.get(status.get("job") or ""), log_tail(status.get("log"))))
