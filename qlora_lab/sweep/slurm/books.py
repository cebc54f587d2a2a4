"""How jobs ended, from SLURM's books: accounting, and the file of completed jobs.

Both have an entry for each start of a requeued job. An attempt knows how often its job had been requeued when it began,
so that the entry of that start is found by counting, whatever the clocks of nodes say.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qlora_lab.sweep.scheduler import Ending
from qlora_lab.sweep.slurm.commands import run

NO_TIME = "Unknown"  # of what has not happened
NO_NODE = ("", "None assigned", "(null)")  # of a job that is over, or waits, without having been started
REQUEUED = "PENDING"  # what the file of completed jobs says of one that was put back into the queue


def accounting(ids: Sequence[str]) -> dict[str, list[Ending]]:
    """Ask sacct for each end of jobs and array tasks.

    Raises:
        LaunchError: it refuses, or does not answer.
    """
    jobs = sorted({job.partition("_")[0] for job in ids})
    columns = "JobID,State,ExitCode,NodeList,MaxRSS,ReqMem,Start,End"
    given = ("--noheader", "--parsable2", "--duplicates", f"--format={columns}", f"--jobs={','.join(jobs)}")
    return endings_in(run("sacct", *given, variables={"TZ": "UTC"}), ids)


def endings_in(text: str, ids: Sequence[str]) -> dict[str, list[Ending]]:
    """Read what sacct prints, in UTC: an entry for each start of a job, and after it those of its steps.

    An entry without an end is of a job that runs or waits, or the end has not come to the books yet.
    """
    entries: dict[str, dict[str, Ending]] = {job: {} for job in ids}
    latest: dict[str, str] = {}  # job -> start of the entry that the steps after it belong to
    for line in text.splitlines():
        job, state, code, node, peak, limit, start, end = line.split("|")
        whole, _, step = job.partition(".")
        if whole not in entries:
            continue
        of_job = entries[whole]
        if not step:
            latest[whole] = start
            word = state.split(" ")[0]  # CANCELLED by 1000
            ended_at = datetime.fromisoformat(end).replace(tzinfo=UTC) if end != NO_TIME else None
            of_job[start] = Ending(word, *_status(code), _node(node), None, memory_bytes(limit), ended_at)
        elif whole in latest:
            entry = of_job[latest[whole]]
            most = max(entry.peak_memory_bytes or 0, memory_bytes(peak) or 0) or None
            of_job[latest[whole]] = replace(entry, peak_memory_bytes=most)
    numbered = {job: _numbered(of_job) for job, of_job in entries.items()}
    ended = {job: [each for each in of_job if each.ended_at is not None] for job, of_job in numbered.items()}
    return {job: of_job for job, of_job in ended.items() if of_job}


def completion_log(log: str | None, ids: Sequence[str]) -> dict[str, list[Ending]]:
    """Read jobcomp/filetxt's lines: KEY=VALUE words, for each start of a job.

    A controller that was killed may have written of the same start before: its last line counts.
    """
    entries: dict[str, dict[str, Ending]] = {job: {} for job in ids}
    try:
        lines = Path(log).read_text(errors="replace").splitlines() if log else []
    except OSError:
        return {}
    for line in lines:
        words = dict(re.findall(r"(\w+)=(\S*)", line))
        array, task = words.get("ArrayJobId") or words.get("ArrayJobID"), words.get("ArrayTaskId")
        job = f"{array}_{task}" if array else words.get("JobId", "")  # an array's last task has the array's own id
        if job in entries:
            word = words.get("JobState", "UNKNOWN").replace(REQUEUED, "REQUEUED")
            ending = Ending(word, *_status(words.get("ExitCode", "0:0")), _node(words.get("NodeList", "")))
            entries[job][words.get("StartTime", "")] = ending
    return {job: _numbered(of_job) for job, of_job in entries.items() if of_job}


def _numbered(entries: Mapping[str, Ending]) -> list[Ending]:
    """Number the entries of a job, in their order, but for those of no node: it was not started again."""
    restarts = itertools.count()
    return [replace(each, restart=next(restarts) if each.node is not None else None) for each in entries.values()]


def _node(text: str) -> str | None:
    return None if text in NO_NODE else text


def _status(text: str) -> tuple[int, int]:
    """Read `EXIT_CODE:SIGNAL`."""
    exit_code, _, signum = text.partition(":")
    return int(exit_code), int(signum or 0)


def memory_bytes(text: str) -> int | None:
    """Return a number of bytes as SLURM writes it; None where it wrote none.

    Example:
        >>> memory_bytes("64G")
        68719476736
    """
    match = re.fullmatch(r"([\d.]+)([KMGT]?)[nc]?", text)
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None
