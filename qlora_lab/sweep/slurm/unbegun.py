"""Jobs that ended before their run began, of which no run's own record tells.

A node that cannot open a job's log, lacks its Python, or does not see the folder of the runs ends the job without a
word. Whoever looks next records it as an attempt at the run, so that it is shown, counted, and tried again by cause.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import STORE
from qlora_lab.runs.folder import RunFolder
from qlora_lab.sweep.chunk import ARRAY, Chunk, chunk_file
from qlora_lab.sweep.journal import Journal
from qlora_lab.sweep.run_folders import PlannedFolders
from qlora_lab.sweep.scheduler import Ending, Job, Scheduler
from qlora_lab.sweep.settle import end_for
from qlora_lab.sweep.slurm.endings import NOT_THERE, OWN, REVOKED, cause_of_ending, log_tail

# Somebody cancelled it, it found its run finished, or it is to start again.
NO_ATTEMPT = ("CANCELLED", "COMPLETED", "REQUEUED")


def record_unbegun(
    folder: Path,
    runs_dir: Path,
    records: Mapping[str, Mapping[str, Any]],
    queue: Sequence[Job],
    scheduler: Scheduler,
    plan_file: Path | None = None,
) -> list[str]:
    """Record the end of jobs whose runs never began; what the books do not know yet is left for later.

    Args:
        folder: of everything submitted for a plan.
        records: run id -> what is recorded of it, of the plan's runs.
        queue: the user's jobs.
        plan_file: where the configurations of runs are that have no folder.

    Returns:
        A sentence for each.
    """
    silent = _silent(folder, records, queue)
    endings = scheduler.endings([job for job, _ in silent.values()]) if silent else {}
    has_worked = any(record.get("attempt") and record.get("cause") != STORE for record in records.values())
    planned = PlannedFolders(plan_file, silent) if plan_file is not None else None
    said = []
    for run_id, (job, log) in silent.items():
        ending = endings[job][-1] if job in endings else None
        if ending is None or ending.word in NO_ATTEMPT or (ending.word == "FAILED" and ending.exit_code in OWN):
            continue  # with nothing to record
        run = RunFolder(runs_dir / run_id)
        cause = _cause(ending, log, has_worked=has_worked)
        error = LaunchError(_why(job, log, ending, cause))
        lease = run.claim().attempt()
        if lease is None:
            continue  # it is being executed after all
        with run.holding(lease):
            if run.attempts() == records[run_id].get("attempt", 0):
                if planned is not None:
                    planned.complete(run, lease)
                run.begin(job=job, node=ending.node, log=log)
                end_for(run, cause, error)
                said.append(f"run {run_id}: {error}")
    return said


def _silent(folder: Path, records: Mapping[str, Mapping[str, Any]], queue: Sequence[Job]) -> dict[str, tuple[str, str]]:
    """Return the last job, and its log, of each run that has not begun since it was submitted and waits for no job."""
    alive = {job_id for job in queue if job.goes_on for job_id in job.ids}
    found: dict[str, tuple[str, str]] = {}
    for chunk, job in _submitted(folder):
        for task, (run_id, attempts) in enumerate(zip(chunk.run_ids, chunk.attempts, strict=True)):
            found.pop(run_id, None)
            has_begun = run_id not in records or records[run_id].get("attempt", 0) != attempts
            if not has_begun and f"{job}_{task}" not in alive:
                found[run_id] = f"{job}_{task}", f"{folder}/logs/{chunk.nonce}-{task}.log"
    return found


def _submitted(folder: Path) -> Iterator[tuple[Chunk, str]]:
    """Yield each array that SLURM took, and its job, in the order of their submission; of pools no task has one run."""
    for nonce, entry in Journal(folder).entries().items():
        if "job" in entry and entry["mode"] == ARRAY:
            yield Chunk.read(chunk_file(folder, nonce)), entry["job"]


def _cause(ending: Ending, log: str, *, has_worked: bool) -> str:
    """Return why a job never began its run. SLURM says the same of a log it cannot open and a revoked credential."""
    if ending.signal == REVOKED and not has_worked:
        return STORE
    return cause_of_ending(ending, log_tail(log))


def _why(job: str, log: str, ending: Ending, cause: str) -> str:
    ended = f"job {job} ended on {ending.node or 'a node'} before the run began"
    if cause != STORE:
        return f"{ended} ({ending.word}, exit status {ending.exit_code}, signal {ending.signal}); its log is {log}"
    if ending.exit_code in NOT_THERE:
        return f"{ended}: a program was not there; the nodes need the same Python as this machine; its log is {log}"
    return (
        f"{ended}, since that node does not see its files, such as {log}; paths.runs_dir must be a folder that the "
        "nodes share with this machine"
    )
