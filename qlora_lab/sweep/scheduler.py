"""What the project asks of a scheduler; `qlora_lab.sweep.slurm` asks it of SLURM."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

PENDING, RUNNING, ENDED = "pending", "running", "ended"
STUCK = "stuck"  # it waits, but the scheduler itself has decided never to start it


@dataclass(frozen=True)
class Job:
    """One job, or tasks of one array that stand alike.

    Attributes:
        job: the id that `sbatch` printed.
        tasks: numbers in the array; None for a job that is none.
        state: PENDING, RUNNING, STUCK or ENDED.
        word: the scheduler's own word for the state, such as NODE_FAIL.
        comment: what the job was submitted with.
        node: where it runs or ran.
        reason: why it waits.
        qos: that it counts against.
    """

    job: str
    tasks: tuple[int, ...] | None
    state: str
    word: str
    comment: str
    node: str | None = None
    reason: str | None = None
    qos: str | None = None

    @property
    def ids(self) -> list[str]:
        """Return the id of each task, as the run's record has it."""
        return [self.job] if self.tasks is None else [f"{self.job}_{task}" for task in self.tasks]

    @property
    def is_over(self) -> bool:
        return self.state == ENDED

    @property
    def goes_on(self) -> bool:
        """Whether it runs, or will when its time has come."""
        return self.state in (PENDING, RUNNING)


@dataclass(frozen=True)
class Ending:
    """How one job or array task ended, or one start of it, by the scheduler's books.

    Attributes:
        word: the state it ended in.
        exit_code, signal: of the process; 0 where it had none.
        peak_memory_bytes, memory_limit_bytes: None where nobody counted.
        ended_at: with its time zone; None where the books do not say it so that it can be compared.
        restart: how often the job had been started before; None where it ended without having been started.
    """

    word: str
    exit_code: int = 0
    signal: int = 0
    node: str | None = None
    peak_memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    ended_at: datetime | None = None
    restart: int | None = None


class Scheduler(Protocol):
    """Submits, and is asked once for any number of runs."""

    @property
    def keeps_books(self) -> bool:
        """Whether `endings` learns of every job sooner or later."""
        ...

    def submit(self, script: str, *, keep_open: Sequence[int] = ()) -> str:
        """Submit a batch script and return the job's id.

        Args:
            keep_open: file descriptors that the submitting process keeps: locks that must outlive the launcher.
        """
        ...

    def query(self) -> list[Job]:
        """Return the user's jobs, waiting, running and lately ended."""
        ...

    def endings(self, ids: Sequence[str]) -> dict[str, list[Ending]]:
        """Return the ends of jobs and array tasks, first to last, as far as the books know.

        A job that was requeued has one for each start, and may run again.
        """
        ...

    def cancel(self, ids: Sequence[str]) -> None: ...

    def hold(self, ids: Sequence[str]) -> None: ...

    def release(self, ids: Sequence[str]) -> None: ...
