"""Hand the runs of a plan to a launcher: this process, local processes through submitit, local workers, or SLURM.

A job is a function by name and the path of a run folder; everything else it needs lies in that folder.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lab.config import hardware
from qlora_lab.config.exit_status import FAILED
from qlora_lab.config.schema import LauncherConfig
from qlora_lab.runs.folder import RunFolder, held
from qlora_lab.runs.heap import heap_environment
from qlora_lab.sweep.chunk import POOL, Chunk, new_nonce
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.local_pool import LocalPool
from qlora_lab.sweep.needs import side_by_side
from qlora_lab.sweep.plan import Plan
from qlora_lab.sweep.plan_file import code_commit
from qlora_lab.sweep.progress import SweepProgress

STDERR = 2  # its file descriptor
POLL_S = 0.5
MAX_RUN_MIN = 60 * 24 * 365  # a local run takes as long as it takes; submitit wants a limit


def launch(plan: Plan, launcher: LauncherConfig) -> bool:
    """Execute what the plan has left to do, with failures recorded in the run folders.

    Returns:
        Whether nothing is left to do; False where the runs go on in a queue without this process.

    Raises:
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after every run on this machine was told to stop and has
            recorded that it did. Runs on SLURM go on.
    """
    runs = plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed)
    if not runs:
        return True
    folders = [run.folder(plan.runs_dir) for run in runs]
    os.environ.update(heap_environment(os.environ))  # of the processes that start now, on other machines too
    return LAUNCHERS[launcher.kind](plan, folders, launcher)


def _in_process(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> bool:
    from qlora_lab.sweep.worker import RunJob

    before = [folder.attempts() for folder in folders]
    for index, (folder, attempts) in enumerate(zip(folders, before, strict=True), start=1):
        print(f"run {index} of {len(folders)}: {folder.run_id}", flush=True)
        try:
            RunJob()(str(folder.path), attempts)
        except SystemExit as end:
            if end.code != FAILED:  # a failure is recorded in its folder, and the others go on
                raise
    return True


def _local(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> bool:
    """Keep up to `max_parallel` submitit jobs running; submitit itself would start all of them at once."""
    import submitit

    from qlora_lab.sweep.worker import RunJob

    machine = hardware.detect()
    jobs_folder = plan.folder / "jobs"
    executor = submitit.LocalExecutor(folder=jobs_folder)
    executor.update_parameters(timeout_min=MAX_RUN_MIN)
    slots = list(range(_at_once(plan, folders, machine)))
    waiting = [(folder, folder.attempts()) for folder in folders]
    active: dict[str, tuple[int, Any]] = {}  # slot and submitit job of each run that is going on
    progress = SweepProgress(folders, sys.stdout)
    try:
        while waiting or active:
            while waiting and slots:
                (folder, attempts), slot = waiting.pop(0), slots.pop(0)
                with _stderr_into(jobs_folder / "submitit.err"):
                    job = executor.submit(RunJob(_gpu_of(slot, machine.gpu_ids)), str(folder.path), attempts)
                active[folder.run_id] = slot, job
            for run_id in [run_id for run_id, (_, job) in active.items() if job.done(force_check=True)]:
                slots.append(active.pop(run_id)[0])
            progress.show()
            time.sleep(POLL_S)
    except BaseException:  # Ctrl-C, SIGTERM, a full disk: no run goes on that nobody watches
        _stop([job for _, job in active.values()], [folder for folder in folders if folder.run_id in active])
        raise
    progress.show(final=True)
    return True


def _at_once(plan: Plan, folders: list[RunFolder], machine: hardware.Hardware) -> int:
    """Return how many runs are executed side by side, and say so where memory allows fewer than there could be."""
    to_do = {folder.run_id for folder in folders}
    count, why = side_by_side([(run.config, run.need) for run in plan.runs if run.run_id in to_do], machine)
    if why is not None:
        print(why, flush=True)
    return count


def _gpu_of(slot: int, gpu_ids: tuple[str, ...]) -> str | None:
    """Give a run one GPU of its own; with more runs than GPUs they share."""
    return gpu_ids[slot % len(gpu_ids)] if gpu_ids else None


@contextmanager
def _stderr_into(file: Path) -> Iterator[None]:
    """Let processes that start now write their errors to a file.

    submitit watches each job with a process of its own, which ends in a traceback when it is told to stop.
    """
    own = os.dup(STDERR)
    try:
        with file.open("a") as log:
            os.dup2(log.fileno(), STDERR)
        yield
    finally:
        os.dup2(own, STDERR)
        os.close(own)


def _stop(jobs: Any, folders: list[RunFolder], grace_s: float = 20.0) -> None:
    """Interrupt running jobs and wait until each has let go of its folder."""
    print("stopping the running runs ...", file=sys.stderr, flush=True)
    for job in jobs:
        job.cancel(check=False)
    deadline = time.monotonic() + grace_s
    while held(folders) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _slurm(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> bool:
    """Submit what is in no queue, and return at once; with launcher.wait, when all runs have ended."""
    from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
    from qlora_lab.sweep.slurm.submit import Submission
    from qlora_lab.sweep.slurm.wait import wait

    everything = [run.folder(plan.runs_dir) for run in plan.runs if not run.is_refused]
    scheduler = SlurmScheduler()
    submission = Submission(
        plan.folder / "slurm",
        plan.name,
        scheduler,
        launcher,
        code_commit(),
        plan_file=plan.file,
        lock_folder=plan.folder.parent,
    )
    unbegun = submission.record_unbegun(everything)
    print("".join(f"{line}\n" for line in listed(unbegun)), end="", flush=True)
    if unbegun:  # some count as failed now, and may not be wanted again
        folders = [run.folder(plan.runs_dir) for run in plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed)]
    outcome = submission.launch(folders, everything, beyond_rules=plan.beyond_rules)
    print("\n".join(outcome.lines()), flush=True)
    if not launcher.wait:
        print("the runs go on without this command; the same command shows how they stand", flush=True)
        return False
    try:
        wait(submission, everything)
    except (KeyboardInterrupt, SystemExit):
        print("the runs go on without this command; the same command, or launcher.wait=true, goes on", file=sys.stderr)
        raise
    return True


def _pool(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> bool:
    """Keep as many workers as GPUs, which take runs until none is left; one that dies is replaced."""
    machine = hardware.detect()
    workers = _at_once(plan, folders, machine)
    chunk = Chunk(
        folder=(plan.folder / "pool").resolve(),
        runs_dir=plan.runs_dir.resolve(),
        nonce=new_nonce(),
        mode=POOL,
        run_ids=[folder.run_id for folder in folders],
        attempts=[folder.attempts() for folder in folders],
        tasks=min(workers, len(folders)),
        per_gpu=1,
        limit_s=None,
        resources=None,
        generation=new_nonce(),
        max_failures=launcher.max_failures,
        commit=None,  # the workers start now
        plan_file=str(plan.file.resolve()) if plan.file is not None else None,
    )
    chunk.write()
    LocalPool(chunk, [_gpu_of(slot, machine.gpu_ids) for slot in range(chunk.tasks)]).run(
        SweepProgress(folders, sys.stdout)
    )
    return True


LAUNCHERS: dict[str, Callable[[Plan, list[RunFolder], LauncherConfig], bool]] = {
    "in_process": _in_process,
    "local": _local,
    "pool": _pool,
    "slurm": _slurm,
}
