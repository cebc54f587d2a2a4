"""What became of what was submitted: the journal compared with SLURM's queue, and the runs that its jobs have taken."""

from collections.abc import Sequence
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
        known = jobs.get(nonce, [])
        if entry["event"] == INTENT and known:
            journal.append(SUBMITTED, nonce, job=known[0], adopted=True)
        elif entry["event"] == INTENT:
            journal.append(LOST, nonce)
        if len(known) > 1:  # sbatch was asked again after an answer got lost
            scheduler.cancel(sorted(known)[1:])
    return queue


def queued_runs(folder: Path, journal: Journal, queue: Sequence[Job]) -> set[str]:
    """Return the runs that jobs of this plan wait for or execute.

    Args:
        folder: of the plan's chunks.
    """
    own = journal.entries()
    chunks: dict[str, Chunk] = {}
    found: set[str] = set()
    for job in queue:
        nonce = nonce_of(job.comment)
        if not job.goes_on or nonce is None or nonce not in own:
            continue
        if nonce not in chunks:
            chunks[nonce] = Chunk.read(chunk_file(folder, nonce))
        chunk = chunks[nonce]
        found |= set(chunk.run_ids) if chunk.mode == POOL else {chunk.run_ids[task] for task in job.tasks or (0,)}
    return found


def queued_by_other_plans(folder: Path, runs_dir: Path, queue: Sequence[Job]) -> dict[str, set[str]]:
    """Return the runs that jobs of other plans of the same study wait for or execute, by STUDY/PLAN.

    Args:
        folder: of what is submitted for this plan, runs/studies/STUDY/PLAN/slurm.
        runs_dir: of this plan's runs.
    """
    plan = folder.parent
    chunks = {
        file.stem: file for file in plan.parent.glob(f"*/{folder.name}/chunks/*.json") if plan not in file.parents
    }
    found: dict[str, set[str]] = {}
    for job in queue:
        nonce = nonce_of(job.comment)
        if not job.goes_on or nonce not in chunks:
            continue
        chunk, other = Chunk.read(chunks[nonce]), chunks[nonce].parents[2]
        if chunk.runs_dir == runs_dir:
            runs = chunk.run_ids if chunk.mode == POOL else [chunk.run_ids[task] for task in job.tasks or (0,)]
            found.setdefault(f"{plan.parent.name}/{other.name}", set()).update(runs)
    return found


def executed_runs(runs: Sequence[RunFolder], queue: Sequence[Job]) -> set[str]:
    """Return the runs that a job executes, whichever study submitted it."""
    alive = {job_id for job in queue if job.goes_on for job_id in job.ids}
    statuses = ((run.run_id, run.status() or {}) for run in runs)
    return {run_id for run_id, status in statuses if status.get("state") == RUNNING and status.get("job") in alive}
