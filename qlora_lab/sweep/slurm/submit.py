"""Submitting the runs of a study, so that a launcher that dies at any point loses nothing and doubles nothing.

Before sbatch is called, the chunk and its intent are on disk, and the job carries the chunk's nonce as its comment. Who
comes next looks for intents without an outcome, and asks SLURM whether there is a job with that comment. The launcher's
lock, which all plans of a study share, is kept open by sbatch itself: a launcher that is killed is not replaced before
its last sbatch has ended, but where locks do not cross machines.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from qlora_lab.config.schema import LauncherConfig, SlurmConfig
from qlora_lab.errors import LaunchError
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.lease import Claim, Lease
from qlora_lab.sweep.breaker import Breaker, breaker_folder
from qlora_lab.sweep.chunk import POOL, Chunk, new_nonce, resource_class
from qlora_lab.sweep.journal import INTENT, REFUSED, SUBMITTED, Journal
from qlora_lab.sweep.plan_file import code_sha256
from qlora_lab.sweep.scheduler import Job
from qlora_lab.sweep.settle import memory_factor
from qlora_lab.sweep.slurm.arrays import Batch, Group, batches_of, groups_of, shares_of
from qlora_lab.sweep.slurm.commands import ForgottenError, LimitError, UnreachableError
from qlora_lab.sweep.slurm.due import due
from qlora_lab.sweep.slurm.inventory import most_memory_gb
from qlora_lab.sweep.slurm.nodes import bad_nodes
from qlora_lab.sweep.slurm.outcome import Outcome
from qlora_lab.sweep.slurm.reconcile import executed_runs, queued_by_other_plans, queued_runs, reconcile
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from qlora_lab.sweep.slurm.script import batch_script, nonce_of
from qlora_lab.sweep.slurm.unbegun import record_unbegun
from qlora_lab.sweep.states import read_records

BACK_OFF_S = (2.0, 5.0, 10.0, 20.0, 40.0)  # between tries to reach a controller that does not answer
TIMES_FORGOTTEN = 3  # a job that SLURM has just taken, in one launch
LOCK_POLL_S = 0.5


class Submission:
    """Everything submitted for one plan.

    Args:
        folder: of chunks, journal and logs; made where it is missing.
        study: names the jobs.
        commit: of the code that planned the runs.
        log: prints a line.
        plan_file: where the configurations of runs are that have no folder yet.
        lock_folder: whose lock a launch takes, one for all plans that may share runs; None: `folder`.
    """

    def __init__(
        self,
        folder: Path,
        study: str,
        scheduler: SlurmScheduler,
        launcher: LauncherConfig,
        commit: str | None = None,
        log: Callable[[str], None] = print,
        plan_file: Path | None = None,
        lock_folder: Path | None = None,
    ) -> None:
        self._folder = folder.resolve()
        self._lock_folder = (lock_folder or folder).resolve()
        self._study = study
        self._scheduler = scheduler
        self._launcher = launcher
        self._commit = commit
        self._log = log
        self._plan_file = plan_file
        self._journal = Journal(self._folder)

    def launch(
        self, runs: Sequence[RunFolder], everything: Sequence[RunFolder] = (), *, beyond_rules: bool = False
    ) -> Outcome:
        """Submit those of the runs that are in no queue and may go on.

        Args:
            runs: to be executed; failed ones too, where they are to be tried again.
            everything: all runs of the plan, whose past tells bad nodes from bad runs.
            beyond_rules: whether failed runs are tried again that are out of tries.

        Raises:
            LaunchError: SLURM refuses, or does not answer; the same command goes on from there.
        """
        with self._lock() as lease:
            for _ in range(TIMES_FORGOTTEN):
                try:
                    return self._launch(runs, everything, lease, beyond_rules)
                except ForgottenError as error:
                    self._log(str(error))
            return self._launch(runs, everything, lease, beyond_rules)

    def _launch(
        self, runs: Sequence[RunFolder], everything: Sequence[RunFolder], lease: Lease, beyond_rules: bool
    ) -> Outcome:
        queue = reconcile(self._journal, self._scheduler)
        others = queued_by_other_plans(self._folder, runs[0].path.resolve().parent, queue) if runs else {}
        taken = (
            queued_runs(self._folder, self._journal, queue) | executed_runs(runs, queue) | set().union(*others.values())
        )
        outcome = Outcome(queued=[run.run_id for run in runs if run.run_id in taken])
        own = {run.run_id for run in everything or runs}
        outcome.elsewhere = {plan: len(queued - own) for plan, queued in others.items() if queued - own}
        free = [run for run in runs if run.run_id not in taken]
        to_do, outcome.given_up = due(free, self._scheduler, beyond_rules=beyond_rules, log=self._log)
        if to_do:
            outcome.excluded = bad_nodes((run.status() for run in everything or runs), datetime.now(UTC))
            self._submit(to_do, queue, outcome, lease)
        return outcome

    @property
    def max_failures(self) -> int:
        """Failures alike that are enough."""
        return self._launcher.max_failures

    def record_unbegun(self, runs: Sequence[RunFolder]) -> list[str]:
        """Record jobs that ended before their runs began, and return a sentence for each."""
        runs_dir = runs[0].path.parent
        records = read_records(runs_dir, [run.run_id for run in runs])
        queue = self._scheduler.query()
        return record_unbegun(self._folder, runs_dir, records, queue, self._scheduler, self._plan_file)

    def jobs(self) -> list[Job]:
        """Return the jobs of this plan that run, or wait for their turn."""
        own = self._journal.entries()
        return [job for job in self._scheduler.query() if job.goes_on and nonce_of(job.comment) in own]

    def _submit(self, runs: list[RunFolder], queue: list[Job], outcome: Outcome, lease: Lease) -> None:
        launcher, limits = self._launcher, self._scheduler.limits
        groups = self._groups(runs)
        batches = batches_of(
            groups,
            max_array=limits.max_array,
            free=self._scheduler.free(queue, launcher.slurm.qos),
            pool=launcher.pool or launcher.runs_per_gpu > 1,
            per_gpu=launcher.runs_per_gpu,
            parallel=launcher.max_parallel,
        )
        generation = new_nonce()
        canaries: dict[int, str] = {}
        shares = self._shares(batches, queue)
        for batch, share in zip(batches, shares, strict=True):
            job = self._batch(batch, groups, runs, outcome, lease, generation, canaries.get(batch.group), share)
            if batch.canary:
                canaries[batch.group] = job
        done = set(outcome.submitted)
        outcome.left = [run.run_id for run in runs if run.run_id not in done]

    def _shares(self, batches: Sequence[Batch], queue: Sequence[Job]) -> list[int | None]:
        """Return how many tasks of each batch may run at once, beside earlier ones of this plan; None: any number."""
        if self._launcher.max_parallel is None:
            return [None] * len(batches)
        own = self._journal.entries()
        queued: Counter[str] = Counter()
        for job in queue:
            nonce = nonce_of(job.comment)
            if job.goes_on and nonce in own:
                queued[nonce] += len(job.ids)
        at_once = {nonce: own[nonce].get("parallel") or tasks for nonce, tasks in queued.items()}
        left = self._launcher.max_parallel - sum(min(at_once[nonce], tasks) for nonce, tasks in queued.items())
        arrays = iter(shares_of([batch.tasks for batch in batches if not batch.canary], max(1, left)))
        return [1 if batch.canary else next(arrays) for batch in batches]

    def _groups(self, runs: list[RunFolder]) -> list[Group]:
        """Group runs by what they ask for: more memory, where an attempt outgrew it."""
        groups = groups_of([self._resources(run) for run in runs])
        return [replace(group, proven=self._is_proven(group)) for group in groups]

    def _is_proven(self, group: Group) -> bool:
        """Say whether a run that asked for the same has finished after an earlier launch."""
        wanted = resource_class(group.resources)
        generations = {e["generation"] for e in self._journal.entries().values() if e["resource_class"] == wanted}
        return any(Breaker(breaker_folder(self._folder, generation, wanted), 1).works for generation in generations)

    def _resources(self, run: RunFolder) -> SlurmConfig:
        """Return what a run asks for: after it outgrew its memory more, up to what a node has."""
        slurm = self._launcher.slurm
        wanted = math.ceil(slurm.memory_gb * memory_factor(run.status()))
        if wanted > slurm.memory_gb:
            wanted = min(wanted, max(most_memory_gb(self._scheduler.nodes, slurm) or wanted, slurm.memory_gb))
        return replace(slurm, memory_gb=wanted)

    def _batch(
        self,
        batch: Batch,
        groups: list[Group],
        runs: list[RunFolder],
        outcome: Outcome,
        lease: Lease,
        generation: str,
        canary: str | None,
        share: int | None,
    ) -> str:
        """Submit one batch, with fewer tasks where the site does not take as many; return the job's id."""
        chosen = [runs[position] for position in batch.runs]
        tasks, mode = batch.tasks, batch.mode
        while True:
            chunk = Chunk(
                folder=self._folder,
                runs_dir=chosen[0].path.resolve().parent,
                nonce=new_nonce(),
                mode=mode,
                run_ids=[run.run_id for run in chosen],
                attempts=[run.attempts() for run in chosen],
                tasks=tasks,
                per_gpu=self._launcher.runs_per_gpu if mode == POOL else 1,
                limit_s=groups[batch.group].resources.time_limit_min * 60.0,
                resources=groups[batch.group].resources,
                generation=generation,
                max_failures=self._launcher.max_failures,
                commit=self._commit,
                code_sha256=code_sha256(),
                plan_file=str(self._plan_file.resolve()) if self._plan_file is not None else None,
                canary=batch.canary,
            )
            script = batch_script(chunk, self._study, parallel=share, after=canary, exclude=outcome.excluded)
            try:
                job = self._sbatch(chunk, script, lease, share)
            except LimitError:
                if tasks == 1:
                    raise
                mode, tasks = POOL, max(1, min(tasks, len(chosen)) // 2)
                continue
            outcome.jobs.append(job)
            outcome.submitted += chunk.run_ids
            return job

    def _sbatch(self, chunk: Chunk, script: str, lease: Lease, share: int | None) -> str:
        """Write chunk and intent, then submit, trying again while the controller cannot be reached."""
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        chunk.write()
        lease.check()
        self._journal.append(
            INTENT,
            chunk.nonce,
            mode=chunk.mode,
            runs=len(chunk.run_ids),
            generation=chunk.generation,
            resource_class=chunk.resource_class,
            parallel=share,
        )
        for wait_s in (*BACK_OFF_S, None):
            try:
                job = self._scheduler.submit(script, keep_open=[lease.fileno()])
                break
            except UnreachableError as error:
                if wait_s is None:
                    raise
                self._log(f"{error}; trying again in {wait_s:.0f} s")
                time.sleep(wait_s)
                adopted = self._adopted(chunk.nonce)
                if adopted is not None:
                    job = adopted
                    break
            except LaunchError as error:
                self._journal.append(REFUSED, chunk.nonce, reason=str(error))
                raise
        self._journal.append(SUBMITTED, chunk.nonce, job=job)
        return job

    def _adopted(self, nonce: str) -> str | None:
        """Return the job that SLURM took although sbatch heard no answer."""
        try:
            queue = self._scheduler.query()
        except UnreachableError:
            return None
        return min((job.job for job in queue if nonce_of(job.comment) == nonce), key=int, default=None)

    @contextmanager
    def _lock(self) -> Iterator[Lease]:
        """Be the only one who submits for this plan, or one that shares its lock, on any machine."""
        self._folder.mkdir(parents=True, exist_ok=True)
        claim = Claim(self._lock_folder, patient=True)
        lease = claim.attempt()
        if lease is None:
            self._log("another command is submitting runs of this study; waiting for it")
        while lease is None:
            time.sleep(LOCK_POLL_S)
            lease = claim.attempt()
        try:
            yield lease
        finally:
            lease.release()
