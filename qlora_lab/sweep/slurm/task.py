"""The job that this process is: whether it is being cancelled, near its time limit or pushed out, and its requeue."""

import re
import time

from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import PREEMPTION, STOPPED, TIME_LIMIT
from qlora_lab.sweep.slurm.commands import run

EARLY_S = 60.0  # how much too early SLURM may warn of the time limit
KILLED_WITHIN_S = 90.0


class SlurmTask:
    """Asks SLURM about the job with the id `job`, an array's task as ARRAY_TASK.

    Args:
        warning_s: how long before its time limit the job is told.
    """

    def __init__(self, job: str, warning_s: float) -> None:
        self._job = job
        self._warning_s = warning_s

    def why_stopped(self) -> str:
        """Return the cause of a signal. A job that is cancelled does not run any more by SLURM's word.

        Where SLURM does not answer, nobody will requeue the job either, so it counts as stopped.
        """
        try:
            words = self._words()
        except LaunchError:
            return STOPPED
        if words.get("JobState") != "RUNNING":
            return STOPPED
        left_s = seconds(words.get("TimeLimit", "")) - seconds(words.get("RunTime", ""))
        return TIME_LIMIT if left_s <= self._warning_s + EARLY_S else PREEMPTION

    def requeue(self) -> None:
        """Put the job back into the queue, which ends this process; return where SLURM would not have it.

        Who is cancelled, or requeued already, must not be put back: SLURM would do it even then.
        """
        try:
            if self._words().get("JobState") != "RUNNING":
                return
            run("scontrol", "requeue", self._job)
        except LaunchError as error:
            print(f"job {self._job} is not requeued: {error}; the same command submits its run again", flush=True)
            return
        time.sleep(KILLED_WITHIN_S)

    def _words(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", run("scontrol", "--oneliner", "show", "job", self._job)))


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
