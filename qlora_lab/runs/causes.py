"""Why an attempt at a run ended without a result, and what that is worth: another attempt, or none."""

import errno
from dataclasses import dataclass

PREEMPTION = "preemption"  # the scheduler wanted the GPU for somebody else
TIME_LIMIT = "time_limit"
NODE = "node"  # the machine died or was taken out of service
STORE = "store"  # the node does not see the folder of the runs, or the Python that executes them
INFRASTRUCTURE = "infrastructure"  # killed, or never started, by something that is not the run
HOST_MEMORY = "host_memory"
GPU_MEMORY = "gpu_memory"
NAN = "nan"
DISK = "disk"  # full, or over quota
CODE = "code"
CHANGED = "changed"  # the code is not what the run was planned with
STOPPED = "stopped"  # somebody pressed Ctrl-C or cancelled the job


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Rule:
    """What the next command does with a run that ended for a cause.

    Attributes:
        attempts: that may end for this cause in a row before the run is out of tries; then only `retry` tries it again.
        with_progress: attempts that got further than the one before do not count.
        memory_factor: how much more host memory the next attempt asks for.
    """

    attempts: int
    with_progress: bool = False
    memory_factor: float = 1.0


RULES = {
    PREEMPTION: Rule(attempts=100),
    TIME_LIMIT: Rule(attempts=3, with_progress=True),
    NODE: Rule(attempts=10),
    STORE: Rule(attempts=1),
    INFRASTRUCTURE: Rule(attempts=3),
    HOST_MEMORY: Rule(attempts=2, memory_factor=1.5),
    DISK: Rule(attempts=2),
    GPU_MEMORY: Rule(attempts=1),
    NAN: Rule(attempts=1),
    CODE: Rule(attempts=1),
    CHANGED: Rule(attempts=10),  # each was refused, and the next command plans with the code that there is
    STOPPED: Rule(attempts=100),
}


def cause_of(error: BaseException) -> str:
    """Return the cause that an exception stands for.

    torch's exceptions go by name: whoever asks may be too light to import it.
    """
    chain: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or inner.__context__
    for cause in chain:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if "OutOfMemoryError" in names:
            return GPU_MEMORY
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(cause):
            return HOST_MEMORY
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return DISK
        if isinstance(cause, OSError) and cause.errno in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT):
            return INFRASTRUCTURE
        if "TrainingError" in names and "not finite" in str(cause):
            return NAN
    if isinstance(error, KeyboardInterrupt | SystemExit) or type(error).__name__ == "TrainingInterrupted":
        return STOPPED
    return CODE
