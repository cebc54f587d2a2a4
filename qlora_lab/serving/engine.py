"""The thread in which the model works, and how requests reach it."""

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from qlora_lab.serving.scheduler import Job, Piece, Scheduler
from qlora_lab.serving.shared_base import SharedBase


class Engine:
    """Runs a scheduler in a thread of its own.

    Args:
        failed: called in that thread once, after a job or the model failed for good; `error` says why.
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
                    self._scheduler.work()
        except BaseException as error:
            self.error = error
            self._failed()
        self._stopping = True
        self._take_jobs(wait=False)
        for job in self._scheduler.jobs:
            if job.writing.finish_reason is None:
                job.deliver(Piece("", last=True))

    def _take_jobs(self, *, wait: bool) -> None:
        """Move what has come to the scheduler; with `wait`, once there is something."""
        with suppress(Empty):
            while True:
                job = self._inbox.get(block=wait)
                wait = False
                if job is not None:
                    self._scheduler.submit(job)
