"""SLURM as a `Scheduler`: one squeue for any number of runs, and whatever books there are for finished ones."""

import getpass
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from qlora_lab.errors import LaunchError
from qlora_lab.sweep.scheduler import ENDED, PENDING, RUNNING, STUCK, Ending, Job
from qlora_lab.sweep.slurm.commands import UNKNOWN_JOB, UnreachableError, run
from qlora_lab.sweep.slurm.limits import SiteLimits, read_limits

FIELDS = "%F|%K|%T|%N|%q|%r|%k"  # array's or job's id, tasks, state, node, QOS, reason, comment
STATES = {"PENDING": PENDING, "REQUEUED": PENDING, "REQUEUE_HOLD": PENDING, "REQUEUE_FED": PENDING}
STATES |= dict.fromkeys(
    ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"), RUNNING
)
# Why SLURM holds a job that nobody asked it to hold: a node refused it (often because a restarted controller started it
# a second time), or it was requeued too often. Newer versions write underscores for the blanks.
HELD_FOR_GOOD = ("launch failed requeued held", "jobholdmaxrequeue")
IDS_A_COMMAND = 500


class SlurmScheduler:
    """The cluster that SLURM's commands on this machine talk to."""

    @cached_property
    def limits(self) -> SiteLimits:
        return read_limits()

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

    def endings(self, ids: Sequence[str]) -> dict[str, Ending]:
        """Return how jobs and array tasks ended, as accounting or else the file of completed jobs has it."""
        if not ids:
            return {}
        if self.limits.accounting:
            try:
                return _from_accounting(ids)
            except LaunchError:  # away for a moment; the other book may be there
                pass
        return _from_completion_log(self.limits.completion_log, ids)

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


def job_of(line: str) -> Job:
    """Read a line that squeue writes in the format `FIELDS`."""
    job, tasks, word, node, qos, reason, comment = line.split("|", 6)
    state = STATES.get(word, ENDED)
    if state == PENDING and reason.replace("_", " ").lower() in HELD_FOR_GOOD:
        state = STUCK
    return Job(
        job=job,
        tasks=None if tasks == "N/A" else task_numbers(tasks),
        state=state,
        word=word,
        comment=comment,
        node=node or None,
        reason=reason,
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


def _from_accounting(ids: Sequence[str]) -> dict[str, Ending]:
    """Ask sacct; a requeued job has several entries there, of which it shows the last."""
    jobs = sorted({job.partition("_")[0] for job in ids})
    columns = "JobID,State,ExitCode,NodeList,MaxRSS,ReqMem"
    lines = run("sacct", "--noheader", "--parsable2", f"--format={columns}", f"--jobs={','.join(jobs)}")
    wanted = set(ids)
    found: dict[str, Ending] = {}
    peaks: dict[str, int] = {}
    for line in lines.splitlines():
        job, state, code, node, peak, limit = line.split("|")
        whole, _, step = job.partition(".")
        if whole not in wanted:
            continue
        if step:
            peaks[whole] = max(peaks.get(whole, 0), memory_bytes(peak) or 0)
        else:
            exit_code, _, signum = code.partition(":")
            word = state.split(" ")[0]  # CANCELLED by 1000
            found[whole] = Ending(word, int(exit_code), int(signum or 0), node or None, None, memory_bytes(limit))
    return {
        job: Ending(e.word, e.exit_code, e.signal, e.node, peaks.get(job) or None, e.memory_limit_bytes)
        for job, e in found.items()
    }


def _from_completion_log(log: str | None, ids: Sequence[str]) -> dict[str, Ending]:
    """Read jobcomp/filetxt's lines: KEY=VALUE words, the last line of a job counting."""
    wanted, found = set(ids), {}
    try:
        lines = Path(log).read_text(errors="replace").splitlines() if log else []
    except OSError:
        return {}
    for line in lines:
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        array, task = words.get("ArrayJobId") or words.get("ArrayJobID"), words.get("ArrayTaskId")
        job = f"{array}_{task}" if array else words.get("JobId", "")  # an array's last task has the array's own id
        if job in wanted:
            exit_code, _, signum = words.get("ExitCode", "0:0").partition(":")
            word = words.get("JobState", "UNKNOWN")
            found[job] = Ending(word, int(exit_code), int(signum or 0), words.get("NodeList"))
    return found


def memory_bytes(text: str) -> int | None:
    """Return a number of bytes as SLURM writes it; None where it wrote none.

    Example:
        >>> memory_bytes("64G")
        68719476736
    """
    match = re.fullmatch(r"([\d.]+)([KMGT]?)[nc]?", text)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None
