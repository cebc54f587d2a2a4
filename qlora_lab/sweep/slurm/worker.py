"""python -m qlora_lab.sweep.slurm.worker CHUNK: what a job of a chunk executes.

Exit status: 0 its runs are finished, 1 one failed, 3 held back by the circuit breaker, 4 another process executes the
run or has taken it over, 5 this machine does not see the chunk, 143 told to stop. A canary's dependants are released by
the 0.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qlora_lab.config.exit_status import FAILED as EXIT_FAILED
from qlora_lab.config.exit_status import TERMINATED
from qlora_lab.errors import LaunchError
from qlora_lab.runs.attempt import job_id, job_restart, log_file
from qlora_lab.runs.causes import INFRASTRUCTURE, STOPPED
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED
from qlora_lab.sweep.chunk import POOL, Chunk
from qlora_lab.sweep.pool import HELD_BACK, Worker
from qlora_lab.sweep.settle import may_go_on
from qlora_lab.sweep.slurm.endings import EXIT_HELD_BACK, EXIT_LOST, EXIT_UNSEEN, cause_of_ending, ending_of, log_tail
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from qlora_lab.sweep.slurm.script import warning_s
from qlora_lab.sweep.slurm.task import SlurmTask
from qlora_lab.sweep.stop import SIGNALS, StopRequest

STATUSES = {FINISHED: 0, FAILED: EXIT_FAILED, HELD_BACK: EXIT_HELD_BACK, INTERRUPTED: TERMINATED}
POLL_S = 0.2


def main() -> None:
    chunk = _chunk(Path(sys.argv[1]))
    slot = int(sys.argv[2]) if len(sys.argv) > 2 else None
    number = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    job = job_id()
    limit_min = chunk.resources.time_limit_min if chunk.resources is not None else 0
    task = SlurmTask(job, warning_s(limit_min), job_restart() or 0) if job is not None else None
    if slot is None and chunk.mode == POOL and chunk.per_gpu > 1:
        status = _several(chunk)
    else:
        status = _alone(chunk, number, slot or 0, task)
    if status == TERMINATED and task is not None and slot is None and _goes_on(chunk, number):
        task.requeue()
    if status == 0 and slot is None:
        remove_empty_log(chunk.folder / "logs")
    sys.exit(status)


def _chunk(file: Path) -> Chunk:
    """Read what to execute, which lay on the disk before this job was submitted.

    Raises:
        SystemExit: this machine does not see it.
    """
    if not file.exists():
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        print(f"error: {node} does not see {file}; the folder of the runs must be shared with the nodes", flush=True)
        sys.exit(EXIT_UNSEEN)
    return Chunk.read(file)


def _alone(chunk: Chunk, number: int, slot: int, task: SlurmTask | None) -> int:
    """Execute the runs of this process, and return its exit status."""
    stop = StopRequest()
    stop.install()
    try:
        why_stopped = task.why_stopped if task is not None else lambda: STOPPED
        worker = Worker(chunk, stop_cause=why_stopped, silent_cause=cause_by_the_books)
        state = worker.all(number * chunk.per_gpu + slot) if chunk.mode == POOL else worker.one(number)
    except SystemExit:
        if not stop.requested:
            raise
        state = INTERRUPTED
    stop.ignore()
    return STATUSES.get(state, EXIT_LOST)


def cause_by_the_books(record: dict[str, Any]) -> str:
    """Return why an attempt ended without a word, by its job's last end: that of a node, before SLURM requeued it.

    A node need not reach the books; what they do not say counts against the infrastructure.
    """
    job, log = record.get("job"), log_tail(record.get("log"))
    if job is None:
        return INFRASTRUCTURE
    try:
        return cause_of_ending(ending_of(record, SlurmScheduler().endings([job])), log)
    except LaunchError:
        return cause_of_ending(None, log)


def _several(chunk: Chunk) -> int:
    """Start the processes that share this job's GPU, pass on what they are told, and return the worst exit status."""
    command = [sys.executable, "-m", "qlora_lab.sweep.slurm.worker", str(chunk.file)]
    processes = [subprocess.Popen([*command, str(slot)]) for slot in range(chunk.per_gpu)]

    def pass_on(signum: int, frame: object) -> None:
        for process in processes:
            process.send_signal(signal.SIGUSR2)

    for signum in SIGNALS:
        signal.signal(signum, pass_on)
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    statuses = {process.returncode for process in processes}
    return TERMINATED if TERMINATED in statuses else max(abs(status) for status in statuses)


def _goes_on(chunk: Chunk, number: int) -> bool:
    """Say whether the job is worth requeueing: its run has not used up its attempts."""
    return chunk.mode == POOL or may_go_on(chunk.run(number).status())


def remove_empty_log(logs: Path) -> None:
    """Remove what this process prints to where that is an empty file of `logs`: of thousands, each takes an inode."""
    sys.stdout.flush()
    log = log_file()
    if log is not None and Path(log).parent == logs.resolve() and Path(log).stat().st_size == 0:
        Path(log).unlink()


if __name__ == "__main__":
    main()
