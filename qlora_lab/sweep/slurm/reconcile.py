"""What became of what was submitted: the journal compared with SLURM's queue, and the runs that its jobs have taken."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_lab.runs.folder import RUNNING, RunFolder
from qlora_lab.sweep.chunk import POOL, Chunk, chunk_file
from qlora_lab.sweep.journal import INTENT, LOST, SUBMITTED, Journal
from qlora_lab.sweep.scheduler import STUCK, Job, Scheduler
from qlora_lab.sweep.slurm.script import nonce_of


def reconcile(journal: Journal, scheduler: Scheduler) -> list[Job]:
    """Adopt jobs whose launcher died before it could note them, and note those that SLURM lost.

    Jobs that SLURM will never start are cancelled: who is allowed to submit may not release what SLURM holds.

    Returns:
        The user's jobs.
    """
    queue = scheduler.query()
    jobs: dict[str, list[str]] = {}
    for job in queue:
        nonce = nonce_of(job.comment)
        if nonce is not None and job.job not in jobs.setdefault(nonce, []):
            jobs[nonce].append(job.job)
    entries = journal.entries()
    stuck = [job for job in queue if job.state == STUCK and nonce_of(job.comment) in entries]
    if stuck:
        scheduler.cancel([name for job in stuck for name in job.ids])
    for nonce, entry in entries.items():
        known = sorted(jobs.get(nonce, []), key=lambda job: (job != entry.get("job"), int(job)))
        if entry["event"] == INTENT and known:
            journal.append(SUBMITTED, nonce, job=known[0], adopted=True)
        elif entry["event"] == INTENT:
            journal.append(LOST, nonce)
        if len(known) > 1:  # sbatch was asked again after an answer got lost; others may wait for the one that is noted
            scheduler.cancel(known[1:])
    return queue


def queued_runs(folder: Path, journal: Journal, queue: Sequence[Job]) -> set[str]:
    """Return the runs that jobs of this plan wait for or execute.

    Args:
        folder: of the plan's chunks.
    """
    files = {nonce: chunk_file(folder, nonce) for nonce in journal.entries()}
    return {run_id for job, chunk in _with_chunks(queue, files) for run_id in _runs_of(job, chunk)}


def queued_by_other_plans(folder: Path, runs_dir: Path, queue: Sequence[Job]) -> dict[str, set[str]]:
    """Return the runs that jobs of other plans of the same study wait for or execute, by STUDY/PLAN.

    Args:
        folder: of what is submitted for this plan, runs/studies/STUDY/PLAN/slurm.
        runs_dir: of this plan's runs.
    """
    plan = folder.parent
    files = {file.stem: file for file in plan.parent.glob(f"*/{folder.name}/chunks/*.json") if plan not in file.parents}
    found: dict[str, set[str]] = {}
    for job, chunk in _with_chunks(queue, files):
        if chunk.runs_dir == runs_dir:
            other = files[chunk.nonce].parents[2].name
            found.setdefault(f"{plan.parent.name}/{other}", set()).update(_runs_of(job, chunk))
    return found


def _with_chunks(queue: Sequence[Job], files: Mapping[str, Path]) -> Iterator[tuple[Job, Chunk]]:
    """Yield those of the jobs that go on and are of these chunks, by nonce; each file is read once for all its jobs."""
    chunks: dict[str, Chunk] = {}
    for job in queue:
        nonce = nonce_of(job.comment)
        if not job.goes_on or nonce is None or nonce not in files:
            continue
        if nonce not in chunks:
            chunks[nonce] = Chunk.read(files[nonce])
        yield job, chunks[nonce]


def _runs_of(job: Job, chunk: Chunk) -> list[str]:
    return chunk.run_ids if chunk.mode == POOL else [chunk.run_ids[task] for task in job.tasks or (0,)]


def executed_runs(runs: Sequence[RunFolder], queue: Sequence[Job]) -> set[str]:
    """Return the runs that a job executes, whichever study submitted it."""
    alive = {job_id for job in queue if job.goes_on for job_id in job.ids}
    statuses = ((run.run_id, run.status() or {}) for run in runs)
    return {run_id for run_id, status in statuses if status.get("state") == RUNNING and status.get("job") in alive}
