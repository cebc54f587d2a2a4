"""SLURM as a `Scheduler`: one squeue for any number of runs, and whatever books there are for finished ones."""

import getpass
from collections.abc import Sequence
from functools import cached_property

from qlora_lab.errors import LaunchError
from qlora_lab.sweep.scheduler import ENDED, PENDING, RUNNING, STUCK, Ending, Job
from qlora_lab.sweep.slurm.books import accounting, completion_log
from qlora_lab.sweep.slurm.commands import UNKNOWN_JOB, UnreachableError, run
from qlora_lab.sweep.slurm.inventory import Node, site_nodes
from qlora_lab.sweep.slurm.limits import SiteLimits, read_limits

FIELDS = "%F|%K|%T|%N|%q|%r|%k"  # array's or job's id, tasks, state, node, QOS, reason, comment
# A word of neither row is one of many for a job that waits, also in versions to come: what may still run must not be
# submitted again.
HAS_NODES = ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING")
GONE_WRONG = ("FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
IS_OVER = ("COMPLETED", "CANCELLED", "PREEMPTED", "REVOKED", *GONE_WRONG)
STATES = dict.fromkeys(HAS_NODES, RUNNING) | dict.fromkeys(IS_OVER, ENDED)
# Why SLURM holds a job that nobody asked it to hold: a node refused it (often because a restarted controller started it
# a second time), or it was requeued too often. Newer versions write underscores for the blanks.
HELD_FOR_GOOD = ("launch failed requeued held", "jobholdmaxrequeue")
IDS_A_COMMAND = 500
NO_ARRAY, NO_REASON = "N/A", "None"


class SlurmScheduler:
    """The cluster that SLURM's commands on this machine talk to."""

    @cached_property
    def limits(self) -> SiteLimits:
        return read_limits()

    @cached_property
    def nodes(self) -> list[Node]:
        return site_nodes()

    @property
    def keeps_books(self) -> bool:
        return self.limits.accounting or self.limits.completion_log is not None

    def submit(self, script: str, *, keep_open: Sequence[int] = ()) -> str:
        """Submit a batch script and return the job's id.

        Raises:
            UnreachableError: the controller does not answer; whether it has taken the job, `query` says.
            LimitError: the user has as many jobs as the site allows.
            LaunchError: the job is refused.
        """
        printed = run("sbatch", "--parsable", stdin=script, keep_open=keep_open)
        return printed.strip().splitlines()[-1].split(";")[0]

    def query(self) -> list[Job]:
        """Return the user's jobs, waiting, running and lately ended.

        Raises:
            UnreachableError: the controller does not answer.
        """
        lines = run("squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", f"--format={FIELDS}")
        return [job_of(line) for line in lines.splitlines() if line]

    def free(self, queue: list[Job], qos: str | None) -> int | None:
        """Return how many more jobs the user, who has those of `queue`, may submit now; None without a limit.

        Raises:
            UnreachableError: the controller does not answer.
        """
        return self.limits.free(queue, qos, _in_memory() if self.limits.max_jobs is not None else 0)

    def endings(self, ids: Sequence[str]) -> dict[str, list[Ending]]:
        """Return each end of jobs and array tasks, as accounting or else the file of completed jobs has it."""
        if not ids:
            return {}
        if self.limits.accounting:
            try:
                return accounting(ids)
            except LaunchError:  # away for a moment; the other book may be there
                pass
        return completion_log(self.limits.completion_log, ids)

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs, whole arrays or single tasks; what is over already is no error.

        Raises:
            UnreachableError: the controller does not answer.
        """
        self._each("scancel", ids)

    def hold(self, ids: Sequence[str]) -> None:
        """Keep waiting jobs from starting."""
        self._each("scontrol", ids, "hold")

    def release(self, ids: Sequence[str]) -> None:
        """Let held jobs start."""
        self._each("scontrol", ids, "release")

    def _each(self, command: str, ids: Sequence[str], *words: str) -> None:
        for start in range(0, len(ids), IDS_A_COMMAND):
            some = ids[start : start + IDS_A_COMMAND]
            try:
                run(command, *words, *([",".join(some)] if words else some))
            except UnreachableError:
                raise
            except LaunchError as error:
                if UNKNOWN_JOB not in str(error).lower() and "already" not in str(error).lower():
                    raise


def _in_memory() -> int:
    """Count the jobs of all users that the controller knows, as far as it shows them to this one."""
    lines = run("squeue", "--noheader", "--all", "--states=all", "--format=%K").split()
    return sum(len(task_numbers(tasks)) if tasks != NO_ARRAY else 1 for tasks in lines)


def job_of(line: str) -> Job:
    """Read a line that squeue writes in the format `FIELDS`."""
    job, tasks, word, node, qos, reason, comment = line.split("|", 6)
    state = STATES.get(word, PENDING)
    if state == PENDING and reason.replace("_", " ").lower() in HELD_FOR_GOOD:
        state = STUCK
    return Job(
        job=job,
        tasks=None if tasks == NO_ARRAY else task_numbers(tasks),
        state=state,
        word=word,
        comment=comment,
        node=node or None,
        reason=reason if reason != NO_REASON else None,
        qos=qos,
    )


def task_numbers(text: str) -> tuple[int, ...]:
    """Return the tasks of an array that SLURM names by ranges.

    Example:
        >>> task_numbers("0-2,7,10-14:2%8")
        (0, 1, 2, 7, 10, 12, 14)
    """
    numbers: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(numbers)
