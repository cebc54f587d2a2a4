"""Where and when an attempt at a run takes place, by the process that executes it."""

import contextlib
import os
import socket
from datetime import UTC, datetime
from pathlib import Path


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def this_process() -> dict[str, str | int | None]:
    """Return what is recorded of the process that executes a run."""
    return {
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME"),
        "job": job_id(),
        "restart": job_restart(),
        "log": log_file(),
        "pid": os.getpid(),
    }


def job_id() -> str | None:
    """Return the id of the SLURM job around this process, of an array's task as ARRAY_TASK; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def job_restart() -> int | None:
    """Return how often SLURM had requeued the job around this process; None outside SLURM."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) if job_id() is not None else None


def log_file() -> str | None:
    """Return the file that this process prints to, where it is one."""
    with contextlib.suppress(OSError):
        file = Path("/proc/self/fd/1").resolve()
        return str(file) if file.is_file() else None
    return None
