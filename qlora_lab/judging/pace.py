"""When the next request may go: requests a minute, pauses after refusals, and an end to waiting, for all threads."""

import random
import threading
import time
from collections.abc import Callable

from qlora_lab.errors import JudgeError

LONGEST_PAUSE_S = 120.0  # without a word from the server


class Stopping(Exception):
    """The command is ending; a request that was not sent yet stays unsent."""


class Pace:
    """Shared by the threads that ask one endpoint.

    Args:
        requests_per_minute: None: no limit of ours.
        backoff_s: the first pause after a refusal; it doubles with each one that follows without a reply between.
        max_wait_s: of refusals without a single reply.
        stop: set when the command is to end.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        requests_per_minute: float | None,
        backoff_s: float,
        max_wait_s: float,
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._backoff_s, self._max_wait_s = backoff_s, max_wait_s
        self._stop, self._clock = stop, clock
        self._lock = threading.Lock()
        self._next = clock()  # the next request may go then
        self._refused_at: float | None = None  # the first refusal since the last reply
        self._paused_at = self._next
        self._pauses = 0

    def wait(self) -> float:
        """Wait for a request's turn and return the time at which it comes.

        Raises:
            Stopping: the command is ending.
        """
        while True:
            with self._lock:
                now = self._clock()
                if self._stop.is_set():
                    raise Stopping
                if now >= self._next:
                    self._next = now + self._interval_s
                    return now
                pause_s = self._next - now
            self._stop.wait(pause_s)

    def replied(self) -> None:
        with self._lock:
            self._refused_at, self._pauses = None, 0

    def refused(self, sent_at: float, why: str, retry_after_s: float | None = None) -> None:
        """Put all requests off after one was refused.

        Args:
            sent_at: what `wait` returned; refusals of requests that went together are one.
            retry_after_s: as the server says.

        Raises:
            JudgeError: the next try would come later than max_wait_s after the first refusal.
        """
        with self._lock:
            now = self._clock()
            if self._refused_at is None:
                self._refused_at = now
            if sent_at >= self._paused_at:
                self._pauses += 1
                self._paused_at = now
            doubled_s = min(self._backoff_s * 2 ** (self._pauses - 1), LONGEST_PAUSE_S)
            pause_s = doubled_s * random.uniform(0.5, 1.0) if retry_after_s is None else retry_after_s
            if now + pause_s - self._refused_at > self._max_wait_s:
                raise JudgeError(
                    f"{why}, for {now - self._refused_at:.0f} s without a single reply"
                    + (f", and it asks to wait {retry_after_s:.0f} s more" if retry_after_s else "")
                    + f", which is more than max_wait_s={self._max_wait_s:g} allows; what was judged is kept: run the "
                    "same command later, or with a larger max_wait_s"
                )
            self._next = max(self._next, now + pause_s)
