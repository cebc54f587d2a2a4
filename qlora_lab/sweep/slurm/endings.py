"""The cause of a run's end, from how SLURM says that its job ended."""

from qlora_lab.runs.causes import CODE, HOST_MEMORY, INFRASTRUCTURE, NODE, PREEMPTION, STOPPED, TIME_LIMIT
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
KILL_SIGNAL = 9
SHELL_KILLED = 128 + KILL_SIGNAL
REVOKED = 53  # in the place of the signal: the job's files could not be opened, or its credential was revoked
NEARLY = 0.9  # memory is sampled: the last sample before a kill is a little below the limit


def cause_of_ending(ending: Ending | None) -> str:
    """Return why a run ended that wrote nothing itself; a job that no book knows is lost to the infrastructure.

    Without cgroups a job that outgrows its memory is FAILED, killed by a signal, at the height of its limit.
    """
    if ending is None:
        return INFRASTRUCTURE
    if ending.word in WORDS:
        return WORDS[ending.word]
    peak, limit = ending.peak_memory_bytes, ending.memory_limit_bytes
    if peak is not None and limit is not None and peak >= NEARLY * limit:
        return HOST_MEMORY
    if KILL_SIGNAL in (ending.signal, ending.exit_code) or ending.exit_code == SHELL_KILLED:
        return INFRASTRUCTURE
    if ending.signal == REVOKED:
        return INFRASTRUCTURE
    return CODE if ending.exit_code else INFRASTRUCTURE
