"""The cause of a run's end, from how SLURM says that its job ended."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from qlora_lab.config.exit_status import TERMINATED
from qlora_lab.runs.causes import CODE, HOST_MEMORY, INFRASTRUCTURE, NODE, PREEMPTION, STOPPED, STORE, TIME_LIMIT
from qlora_lab.sweep.scheduler import Ending

WORDS = {
    "NODE_FAIL": NODE,
    "BOOT_FAIL": NODE,
    "PREEMPTED": PREEMPTION,
    "REQUEUED": PREEMPTION,
    "TIMEOUT": TIME_LIMIT,
    "DEADLINE": TIME_LIMIT,
    "OUT_OF_MEMORY": HOST_MEMORY,
    "CANCELLED": STOPPED,
}
# How a worker ends besides as runs do, by `qlora_lab.sweep.slurm.worker`.
EXIT_HELD_BACK, EXIT_LOST, EXIT_UNSEEN = 3, 4, 5
NOT_THERE = (126, 127)  # what a shell says of a program
OWN = (EXIT_HELD_BACK, EXIT_LOST, TERMINATED)  # ends that a worker chose
KILL_SIGNAL = 9
SHELL_KILLED = 128 + KILL_SIGNAL
REVOKED = 53  # in the place of the signal: the job's files could not be opened, or its credential was revoked
OUTGROWN = re.compile("memory limit|oom.kill|out of memory", re.IGNORECASE)
LOG_TAIL_BYTES = 4096
CLOCKS_APART = timedelta(seconds=60)  # by which a node's clock may be ahead of the controller's
NEARLY = 0.9  # memory is sampled: the last sample before a kill is a little below the limit


def cause_of_ending(ending: Ending | None, log: str = "") -> str:
    """Return why a run ended that wrote nothing itself; a job that no book knows is lost to the infrastructure.

    Without cgroups a job that outgrows its memory is FAILED, killed by a signal, at the height of its limit; without
    accounting only the step's own words say so.

    Args:
        log: the last lines of what the job printed.
    """
    if any(line.startswith("slurmstepd") and OUTGROWN.search(line) for line in log.splitlines()):
        return HOST_MEMORY
    if ending is None:
        return INFRASTRUCTURE
    if ending.word in WORDS:
        return WORDS[ending.word]
    peak, limit = ending.peak_memory_bytes, ending.memory_limit_bytes
    if peak is not None and limit is not None and peak >= NEARLY * limit:
        return HOST_MEMORY
    if KILL_SIGNAL in (ending.signal, ending.exit_code) or ending.exit_code == SHELL_KILLED:
        return INFRASTRUCTURE
    if ending.exit_code in (EXIT_UNSEEN, *NOT_THERE):
        return STORE
    if ending.signal == REVOKED or ending.exit_code in OWN:
        return INFRASTRUCTURE
    return CODE if ending.exit_code else INFRASTRUCTURE


def ending_of(record: Mapping[str, Any], endings: Mapping[str, Sequence[Ending]]) -> Ending | None:
    """Return how the job of an attempt ended; None where that is not known yet.

    A job that SLURM requeued has ended before, and one that still runs may have. Where the attempt did not record which
    start of its job it belongs to, clocks have to do: an end well before it began is an earlier attempt's.

    Args:
        record: of the attempt, as its run's status.json has it.
        endings: those of each job.
    """
    of_job = endings.get(record.get("job") or "", ())
    restart = record.get("restart")
    if restart is not None:
        return next((ending for ending in of_job if ending.restart == restart), None)
    last = of_job[-1] if of_job else None
    if last is None or last.ended_at is None:
        return last
    began = datetime.fromisoformat(record["started_at"])
    return last if last.ended_at + CLOCKS_APART >= began else None


def log_tail(file: str | None) -> str:
    """Return the last lines of a log; nothing where there is none."""
    if file is None:
        return ""
    try:
        return Path(file).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
