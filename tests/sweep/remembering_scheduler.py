"""A scheduler that only remembers, so that its answers can be chosen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlora_lab.config.schema import LauncherConfig
from qlora_lab.sweep.scheduler import ENDED, PENDING, Ending, Job
from qlora_lab.sweep.slurm.inventory import Node
from qlora_lab.sweep.slurm.limits import SiteLimits
from qlora_lab.sweep.slurm.submit import Submission


class Scheduler:
    """Remembers what was submitted; `answers` are raised, one a submission, before or after it is remembered."""

    def __init__(self, limits: SiteLimits | None = None) -> None:
        self.limits = limits or SiteLimits()
        self.scripts: list[str] = []
        self.queue: list[Job] = []
        self.books: dict[str, Ending] = {}
        self.answers: list[tuple[Exception, bool]] = []
        self.cancelled: list[str] = []
        self.keeps_books = False
        self.nodes: list[Node] = []

    def submit(self, script: str, *, keep_open: Sequence[int] = ()) -> str:
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None and not answer[1]:
            raise answer[0]
        self.scripts.append(script)
        comment = option(script, "comment").strip("'")
        last = int(option(script, "array").partition("%")[0].partition("-")[2])
        job = Job(str(len(self.scripts)), tuple(range(last + 1)), PENDING, "PENDING", comment)
        self.queue.append(job)
        if answer is not None:
            raise answer[0]
        return job.job

    def query(self) -> list[Job]:
        return self.queue

    def free(self, queue: list[Job], qos: str | None) -> int | None:
        return self.limits.free(queue, qos, in_memory=sum(len(job.ids) for job in self.queue))

    def endings(self, ids: Sequence[str]) -> dict[str, list[Ending]]:
        return {job: [self.books[job]] for job in ids if job in self.books}

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids

    def end(self, word: str = "COMPLETED") -> None:
        self.queue = [replace(job, state=ENDED, word=word) for job in self.queue]


def option(script: str, name: str) -> str:
    (line,) = [line for line in script.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    return line.partition("=")[2]


def submission(tmp_path: Path, scheduler: Scheduler, lock: Path | None = None, **launcher: object) -> Submission:
    config = LauncherConfig(kind="slurm", **launcher)  # type: ignore[arg-type]
    return Submission(
        tmp_path / "slurm",
        "study",
        scheduler,  # type: ignore[arg-type]
        config,
        log=lambda _: None,
        lock_folder=lock,
    )
