"""The job that this process is: whether it is being cancelled, near its time limit or pushed out, and its requeue."""

import re
import time
from collections.abc import Mapping

from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import PREEMPTION, STOPPED, TIME_LIMIT
from qlora_lab.sweep.slurm.commands import run

EARLY_S = 60.0  # how much too early SLURM may warn of the time limit
KILLED_WITHIN_S = 90.0
NO_TIME = "None"


class SlurmTask:
    """Asks SLURM about the job with the id `job`, an array's task as ARRAY_TASK.

    Args:
        warning_s: how long before its time limit the job is told.
        restarts: how often it had been requeued when this process began.
    """

    def __init__(self, job: str, warning_s: float, restarts: int) -> None:
        self._job = job
        self._warning_s = warning_s
        self._restarts = restarts

    def why_stopped(self) -> str:
        """Return the cause of a signal. A job that is cancelled does not run any more by SLURM's word.

        Nor does one that is pushed out without a time of grace: it is in the queue again, or marked as preempted.
        Where SLURM does not answer, nobody will requeue the job either, so it counts as stopped.
        """
        try:
            words = self._words()
        except LaunchError:
            return STOPPED
        if self._is_requeued(words) or _is_preempted(words):
            return PREEMPTION
        if words.get("JobState") != "RUNNING":
            return STOPPED
        left_s = seconds(words.get("TimeLimit", "")) - seconds(words.get("RunTime", ""))
        return TIME_LIMIT if left_s <= self._warning_s + EARLY_S else PREEMPTION

    def requeue(self) -> None:
        """Put the job back into the queue, which ends this process; return where SLURM would not have it.

        Who is cancelled, or requeued already, must not be put back: SLURM would do it even then.
        """
        try:
            words = self._words()
            if self._is_requeued(words) or words.get("JobState") != "RUNNING":
                return
            run("scontrol", "requeue", self._job)
        except LaunchError as error:
            print(f"job {self._job} is not requeued: {error}; the same command submits its run again", flush=True)
            return
        time.sleep(KILLED_WITHIN_S)

    def _is_requeued(self, words: Mapping[str, str]) -> bool:
        """Say whether SLURM has put the job back into the queue since this process began."""
        return int(words.get("Restarts", 0)) > self._restarts

    def _words(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", run("scontrol", "--oneliner", "show", "job", self._job)))


def _is_preempted(words: Mapping[str, str]) -> bool:
    """Say whether SLURM has chosen the job, since it last started, to make room for another."""
    chosen_at = words.get("PreemptTime", NO_TIME)
    return chosen_at != NO_TIME and chosen_at >= words.get("StartTime", "")


def seconds(text: str) -> float:
    """Return a duration as SLURM writes it; infinite where it has none.

    Example:
        >>> seconds("1-02:00:30")
        93630.0
    """
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
