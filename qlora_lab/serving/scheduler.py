"""Continuous batching: answers join a batch as soon as there is room, and leave it when they are done."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from qlora_lab.serving.batch import Batch
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.serving.writing import Writing, next_tokens


class Piece(NamedTuple):
    """Text that an answer gained, and whether it was the last; `Writing.finish_reason` is None if it was cut off."""

    text: str
    last: bool


@dataclass(eq=False)
class Job:
    """An answer that somebody waits for.

    Attributes:
        prompt: token ids; not empty.
        adapter: its name; None: the base alone.
        deliver: called with each new piece of text, in the thread of the model.
        cancelled: set by anyone; the row then leaves before the next step, and nothing more is delivered.
        failure: why the model could not write it to its end, in one sentence; None: it could, or was stopped.
    """

    prompt: list[int]
    adapter: str | None
    writing: Writing
    deliver: Callable[[Piece], None]
    cancelled: bool = False
    failure: str | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer, should it become as long as it may."""
        return len(self.prompt) + self.writing.max_tokens


class Scheduler:
    """Works on jobs in the order they came, so many at a time; in one thread.

    Args:
        max_rows: most jobs in the batch.
        max_prefill_tokens: most tokens, padding included, of prompts that are read together, since the rows of the
            batch wait meanwhile; a longer prompt is read alone.
        max_cache_tokens: most tokens that the batch may come to remember, padding included; None: no limit.
    """

    def __init__(
        self,
        shared: SharedBase,
        *,
        max_rows: int = 32,
        max_prefill_tokens: int = 4096,
        max_cache_tokens: int | None = None,
    ) -> None:
        self._pool = shared.pool
        self._batch = Batch(shared)
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._joining: list[Job] = []
        self._max_rows = max_rows
        self._max_prefill_tokens = max_prefill_tokens
        self._max_cache_tokens = max_cache_tokens

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def jobs(self) -> list[Job]:
        return [*self._running, *self._joining, *self._waiting]

    def submit(self, job: Job) -> None:
        self._waiting.append(job)

    def work(self) -> bool:
        """Let jobs join, and write one token of each; return whether there is more to do."""
        self._keep_unfinished()
        self._joining = self._next_to_join()
        if self._joining:
            joined = self._joining
            logits = self._batch.join([job.prompt for job in joined], [job.adapter for job in joined])
            self._running, self._joining = [*self._running, *joined], []
            _write(logits, joined)
        elif self._running:
            _write(self._batch.step([job.writing.token_ids[-1] for job in self._running]), self._running)
        return bool(self._running or self._waiting)

    def give_up(self, why: str) -> int:
        """End the jobs of a step that failed; return how many. Rows that were not part of it go on."""
        failed, self._joining = self._joining, []
        if not failed or not self._batch.is_whole:
            failed, self._running = [*failed, *self._running], []
            self._batch.keep([])
        for job in failed:
            job.failure = why
            if job.writing.finish_reason is None:
                job.deliver(Piece("", last=True))
        return len(failed)

    def _keep_unfinished(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        going = [
            row for row, job in enumerate(self._running) if not (job.cancelled or job.writing.finish_reason is not None)
        ]
        if len(going) < len(self._running):
            self._running = [self._running[row] for row in going]
            self._batch.keep(going)

    def _next_to_join(self) -> list[Job]:
        """Take from the queue what there is room for: rows, cache, adapters in their budget, tokens to read at once."""
        joining: list[Job] = []
        adapters, longest = self._batch.adapters, 0
        places = max((job.most_tokens for job in self._running), default=0)
        while self._waiting and len(self._running) + len(joining) < self._max_rows:
            job = self._waiting[0]
            longest = max(longest, len(job.prompt))
            if joining and longest * (len(joining) + 1) > self._max_prefill_tokens:
                break
            places, rows = max(places, job.most_tokens), len(self._running) + len(joining) + 1
            if self._max_cache_tokens is not None and rows > 1 and places * rows > self._max_cache_tokens:
                break
            wanted = adapters if job.adapter is None else adapters | {job.adapter}
            if not self._pool.fit_together(wanted):
                break
            adapters = wanted
            joining.append(self._waiting.popleft())
        return joining


def _write(logits: Tensor, jobs: Sequence[Job]) -> None:
    """Choose a token for each of the jobs and deliver what it adds."""
    for job, token in zip(jobs, next_tokens(logits, [job.writing for job in jobs]), strict=True):
        piece = Piece(job.writing.add(token), job.writing.finish_reason is not None)
        if piece.text or piece.last:
            job.deliver(piece)
