"""Hand the runs of a plan to a launcher: this process, local processes, or SLURM, through submitit.

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
from qlora_lab.config.command import FAILED
from qlora_lab.config.schema import LauncherConfig
from qlora_lab.errors import LaunchError
from qlora_lab.runs import folder as folder_states
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.heap import heap_environment
from qlora_lab.sweep.plan import Plan, parallel_runs
from qlora_lab.sweep.progress import SweepProgress
from qlora_lab.sweep.worker import RunJob

STDERR = 2  # its file descriptor
POLL_S = 0.5
SLURM_POLL_S = 5.0
MAX_RUN_MIN = 60 * 24 * 365  # a local run takes as long as it takes; submitit wants a limit


def launch(plan: Plan, launcher: LauncherConfig) -> None:
    """Execute what the plan has left to do; returns when nothing is left, with failures recorded in the run folders.

    Raises:
        KeyboardInterrupt, SystemExit: on Ctrl-C and SIGTERM, after every run on this machine was told to stop and has
            recorded that it did. Runs on SLURM go on.
    """
    runs = plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed)
    if not runs:
        return
    folders = [run.folder(plan.runs_dir) for run in runs]
    os.environ.update(heap_environment(os.environ))  # of the processes that start now, on other machines too
    LAUNCHERS[launcher.kind](plan, folders, launcher)


def _in_process(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> None:
    before = [folder.attempts() for folder in folders]
    for index, (folder, attempts) in enumerate(zip(folders, before, strict=True), start=1):
        print(f"run {index} of {len(folders)}: {folder.run_id}", flush=True)
        try:
            RunJob()(str(folder.path), attempts)
        except SystemExit as end:
            if end.code != FAILED:  # a failure is recorded in its folder, and the others go on
                raise


def _local(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> None:
    """Keep up to `max_parallel` submitit jobs running; submitit itself would start all of them at once."""
    import submitit

    machine = hardware.detect()
    jobs_folder = plan.folder / "jobs"
    executor = submitit.LocalExecutor(folder=jobs_folder)
    executor.update_parameters(timeout_min=MAX_RUN_MIN)
    slots = list(range(parallel_runs(plan.runs[0].config, machine)))
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
    while any(folder.is_locked() for folder in folders) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _slurm(plan: Plan, folders: list[RunFolder], launcher: LauncherConfig) -> None:
    """Submit one job array and wait for it, watching the run folders rather than SLURM's word."""
    import submitit
    from submitit.core.utils import FailedJobError

    slurm = launcher.slurm
    jobs_folder = plan.folder / "jobs"
    try:
        executor = submitit.SlurmExecutor(folder=jobs_folder, max_num_timeout=1000)
    except RuntimeError as error:
        raise LaunchError(
            "launcher=slurm needs sbatch on this machine; got none; run from a login node, or use launcher=local"
        ) from error
    options = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    executor.update_parameters(
        job_name=f"qlora_lab_{plan.name}",
        time=slurm.time_limit_min,
        cpus_per_task=slurm.cpus_per_run,
        mem=f"{slurm.memory_gb}GB",
        array_parallelism=launcher.max_parallel or len(folders),
        setup=slurm.setup or None,
        additional_parameters=slurm.extra,
        **({"gpus_per_node": slurm.gpus_per_run} if slurm.gpus_per_run else {}),
        **{key: value for key, value in options.items() if value is not None},
    )
    attempts = [folder.attempts() for folder in folders]
    try:
        jobs = executor.map_array(RunJob(), [str(run.path.resolve()) for run in folders], attempts)
    except FailedJobError as error:
        raise LaunchError(f"sbatch refused the runs ({_last_line(error)}); see launcher.slurm") from error
    array = jobs[0].job_id.split("_")[0]
    try:
        print(f"submitted {len(jobs)} runs as job array {array}; logs in {jobs_folder}", flush=True)
        progress = SweepProgress(folders, sys.stdout)
        while not all(map(_is_over, folders, jobs, attempts)):
            progress.show()
            time.sleep(SLURM_POLL_S)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"job array {array} goes on without this command; to stop it too: scancel {array}; "
            "without that, the same command would put its runs into the queue a second time",
            file=sys.stderr,
        )
        raise
    progress.show(final=True)


def _is_over(folder: RunFolder, job: Any, attempts_before: int) -> bool:
    """Say whether a run ended since it was submitted.

    Its folder knows first; SLURM's word, which comes late, counts for jobs that died without one.
    """
    state = folder.state()
    failed_now = state == folder_states.FAILED and folder.attempts() > attempts_before
    return state == folder_states.FINISHED or failed_now or job.done()


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1]


LAUNCHERS: dict[str, Callable[[Plan, list[RunFolder], LauncherConfig], None]] = {
    "in_process": _in_process,
    "local": _local,
    "slurm": _slurm,
}
