"""Getting every comparison judged: from the cache, by asking, or by waiting for another process that asks."""

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from qlora_lab.errors import JudgeError, QloraLabError
from qlora_lab.judging.cache import CLAIMED, TAKEN, Response, ResponseCache
from qlora_lab.judging.cost import most_cost
from qlora_lab.judging.pace import Stopping
from qlora_lab.judging.pairs import Comparison
from qlora_lab.judging.prompts import Message, Reading, messages, read, reminded
from qlora_lab.judging.settings import JudgeConfig

POLL_S = 0.2  # between looks at what other processes have done


class Unanswered(Exception):
    """One request that gets no reply, although others do."""


class Asker(Protocol):
    """Whoever replies: `ask` is called from `workers` threads at a time, with up to `batch` conversations.

    `paid` says whether a request under way is worth waiting for when the command is to end.
    """

    workers: int
    batch: int
    paid: bool

    def ask(self, conversations: Sequence[list[Message]]) -> "list[Response | Unanswered]": ...


@dataclass(frozen=True)
class Request:
    """One request about a comparison: the first one, or the reminder after a reply that could not be read."""

    comparison: Comparison
    messages: list[Message]
    key: str
    root: str  # the key of the comparison's first request
    earlier: Response | None = None  # the reply that could not be read


@dataclass(frozen=True)
class Judged:
    """A comparison and the reply that counts; `reading` is None where neither reply could be read."""

    comparison: Comparison
    response: Response
    reading: Reading
    key: str
    earlier: Response | None


@dataclass
class Outcome:
    """What came of the comparisons; those in neither `judged` nor `unanswered` were not asked."""

    judged: list[Judged] = field(default_factory=list)
    unanswered: list[tuple[Comparison, str]] = field(default_factory=list)
    asked: int = 0  # requests answered in this command
    paid: float = 0.0  # US dollars for them, as far as prices are known
    halted: QloraLabError | None = None  # why the rest was not asked


def request_key(config: JudgeConfig, conversation: list[Message]) -> str:
    """Return the hash of all that decides what a judge replies."""
    return hashlib.sha256(request_text(config, conversation).encode()).hexdigest()


def request_text(config: JudgeConfig, conversation: list[Message]) -> str:
    identity: dict[str, Any] = {**config.asked(), "sampling": config.sampling(), "messages": conversation}
    return json.dumps(identity, sort_keys=True, ensure_ascii=False)


def first_request(config: JudgeConfig, comparison: Comparison, task: str) -> Request:
    asked = messages(comparison, task)
    key = request_key(config, asked)
    return Request(comparison, asked, key, key)


class Work:
    """Judges comparisons, all state in the cache.

    Args:
        asker: who replies.
        max_cost: US dollars for all of these comparisons, earlier commands and other processes included.
        stop: set when the command is to end, from here too: requests under way are waited for, no others are sent.
        progress: called after each comparison with the outcome so far.
    """

    def __init__(
        self,
        config: JudgeConfig,
        task: str,
        asker: Asker,
        cache: ResponseCache,
        *,
        max_cost: float | None,
        stop: threading.Event,
        progress: Callable[[Outcome], None],
    ) -> None:
        self._config, self._task, self._asker, self._cache = config, task, asker, cache
        self._max_cost, self._stop, self._progress = max_cost, stop, progress
        self._outcome = Outcome()
        self._queue: deque[Request] = deque()
        self._elsewhere: list[Request] = []  # another process is at these
        self._awaits_money = False  # the next request may be too dear, until those under way have cost less
        self._running: dict[Future[list[Response | Unanswered]], list[Request]] = {}

    def judge(self, requests: Iterable[Request]) -> Outcome:
        """Return what came of the comparisons, asking only where nothing is in the cache."""
        wanted = list(requests)
        self._cache.plan(request.root for request in wanted)
        for request in wanted:  # first of all, so that they count whatever becomes of the others
            response = self._cache.get(request.key)
            if response is None:
                self._queue.append(request)
            else:
                self._settle(request, response)
        pool = ThreadPoolExecutor(self._asker.workers)
        try:
            while True:
                self._send(pool)
                if self._running and (self._asker.paid or not self._is_ending()):
                    finished, _ = wait(self._running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self._receive(future, self._running.pop(future))
                elif self._is_ending() or not (self._queue or self._elsewhere):
                    return self._outcome
                elif not self._queue:
                    self._stop.wait(POLL_S)
                if not self._queue:  # look again at what others were at
                    self._queue.extend(self._elsewhere)
                    self._elsewhere.clear()
        except BaseException:
            self._stop.set()  # threads that wait for their turn need not
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_ending(self) -> bool:
        return self._stop.is_set() or self._outcome.halted is not None

    def _send(self, pool: ThreadPoolExecutor) -> None:
        """Hand requests to free threads, until none is free or nothing is left."""
        self._awaits_money = False
        while self._may_send() and len(self._running) < self._asker.workers:
            batch: list[Request] = []
            while self._may_send() and len(batch) < self._asker.batch:
                request = self._queue.popleft()
                if self._is_ours_to_ask(request):
                    batch.append(request)
            if batch:
                asked = [request.messages for request in batch]
                self._running[pool.submit(self._asker.ask, asked)] = batch

    def _may_send(self) -> bool:
        return bool(self._queue) and not self._is_ending() and not self._awaits_money

    def _is_ours_to_ask(self, request: Request) -> bool:
        """Claim a request, unless it is answered, being answered, or too dear."""
        response = self._cache.get(request.key)
        if response is not None:
            self._settle(request, response)
            return False
        most = most_cost(self._config.price, request.messages, self._config.max_tokens) or 0.0
        try:
            claim = self._cache.claim(request.key, request.root, most, self._max_cost)
        except sqlite3.OperationalError as error:
            self._halt(JudgeError(f"{self._cache.file} cannot be written ({error}); nothing more is asked; make space"))
            return False
        if claim == TAKEN:
            self._elsewhere.append(request)
        elif claim != CLAIMED and self._running:
            self._queue.appendleft(request)
            self._awaits_money = True
        elif claim != CLAIMED:
            self._halt(
                JudgeError(
                    f"max_cost of ${self._max_cost:g} would be exceeded: ${self._cache.spent():.4f} are spent on these "
                    f"comparisons, and the next request may cost ${most:.4f}; give a higher --max-cost to go on"
                )
            )
        return claim == CLAIMED

    def _receive(self, future: "Future[list[Response | Unanswered]]", batch: list[Request]) -> None:
        """Store what a thread brings, or note why it brings nothing."""
        responses: list[Response | Unanswered] = []
        try:
            responses = future.result()
        except Stopping:
            pass
        except QloraLabError as error:
            self._halt(error)
        for request, response in zip(batch, responses, strict=False):
            if isinstance(response, Response):
                self._keep(request, response)
            else:
                self._outcome.unanswered.append((request.comparison, str(response)))
        for request in batch:
            with contextlib.suppress(sqlite3.OperationalError):  # a full disk; it is free when this process is gone
                self._cache.release(request.key)

    def _keep(self, request: Request, response: Response) -> None:
        self._outcome.asked += 1
        self._outcome.paid += response.cost or 0.0
        try:
            self._cache.put(request.key, request.root, request_text(self._config, request.messages), response)
        except JudgeError as error:
            self._halt(error)
        self._settle(request, response)

    def _settle(self, request: Request, response: Response) -> None:
        """Read a reply; where that fails the first time, ask once more for the verdict alone."""
        reading = read(response.text, self._task)
        if reading is None and request.earlier is None:
            again = reminded(request.messages, response.text, self._task)
            follow_up = Request(request.comparison, again, request_key(self._config, again), request.root, response)
            self._queue.appendleft(follow_up)
            return
        self._outcome.judged.append(Judged(request.comparison, response, reading, request.key, request.earlier))
        self._progress(self._outcome)

    def _halt(self, error: QloraLabError) -> None:
        self._outcome.halted = self._outcome.halted or error
        self._stop.set()  # threads that wait for their turn need not
