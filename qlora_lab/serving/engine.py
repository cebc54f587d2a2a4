"""The thread in which the model works, and how requests reach it."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch

from qlora_lab.serving.scheduler import Job, Piece, Scheduler
from qlora_lab.serving.shared_base import SharedBase


class Engine:
    """Runs a scheduler in a thread of its own.

    Args:
        failed: called in that thread once, when the model or its GPU failed for good; `error` says why. Where a step
            fails otherwise, its jobs end with their `failure`, and the others go on.
    """

    def __init__(self, shared: SharedBase, scheduler: Scheduler, failed: Callable[[], None] = lambda: None) -> None:
        self._shared = shared
        self._scheduler = scheduler
        self._failed = failed
        # Its put can be called in the handler of a signal that interrupts another put.
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._stopping = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_open(self) -> bool:
        """Whether jobs are still taken."""
        return not self._stopping

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._inbox.qsize() + self._scheduler.waiting

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hand a job over; should the engine stop, `deliver` gets an empty last piece."""
        self._inbox.put(job)

    def stop(self) -> None:
        """Let the thread end after its step; the jobs it leaves get an empty last piece, without a reason."""
        self._stopping = True
        self._inbox.put(None)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._shared.opened.computing():
                while not self._stopping:
                    self._take_jobs(wait=not self._scheduler.jobs)
                    self._step()
        except BaseException as error:
            self.error = error
            self._failed()
        self._stopping = True
        self._take_jobs(wait=False)
        for job in self._scheduler.jobs:
            if job.writing.finish_reason is None:
                job.deliver(Piece("", last=True))

    def _step(self) -> None:
        try:
            self._scheduler.work()
        except torch.AcceleratorError:
            raise  # a GPU in this state fails at whatever comes next
        except Exception as error:  # of one batch, such as too little memory; its clients are told, and others wait
            why = _failure(error)
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        count = self._scheduler.give_up(why)
        print(f"a step failed, and {count} answers with it: {why}", file=sys.stderr, flush=True)

    def _take_jobs(self, *, wait: bool) -> None:
        """Move what has come to the scheduler; with `wait`, once there is something."""
        with suppress(Empty):
            while True:
                job = self._inbox.get(block=wait)
                wait = False
                if job is not None:
                    self._scheduler.submit(job)


def _failure(error: Exception) -> str:
    """Say in one line what a step failed of."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:
        return (
            f"the model ran out of memory ({first or type(error).__name__}); ask for less, or again later (a lower "
            "cache_budget_mb of the server lets answers wait instead)"
        )
    return f"the model failed ({type(error).__name__}: {first})"
