"""Showing how far training is: a bar in a terminal, a few plain lines in a log."""

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 15.0


class Progress(Protocol):
    """What `fit` tells while it trains."""

    def start(self, total_steps: int, done_steps: int) -> None:
        """Training begins, with `done_steps` of `total_steps` done by an earlier attempt."""

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """`step` steps are done; `metrics` are those of the last."""

    def close(self) -> None:
        """Training ended, finished or not."""


class NoProgress:
    """Shows nothing."""

    def start(self, total_steps: int, done_steps: int) -> None:
        pass

    def update(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class ProgressBar:
    """One line that is drawn over and over; for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm | None = None

    def start(self, total_steps: int, done_steps: int) -> None:
        self._bar = tqdm(
            total=total_steps, initial=done_steps, file=self._stream, desc="training", unit="step", leave=True
        )

    def update(self, step: int, metrics: dict[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class ProgressLines:
    """Whole lines: the first step, the last, and at most one every 15 seconds; for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float], interval_s: float = LINE_INTERVAL_S) -> None:
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._total_steps = 0
        self._first_step = 0
        self._started_s = 0.0
        self._shown_s: float | None = None

    def start(self, total_steps: int, done_steps: int) -> None:
        self._total_steps, self._first_step = total_steps, done_steps
        self._started_s, self._shown_s = self._clock(), None

    def update(self, step: int, metrics: dict[str, float]) -> None:
        now = self._clock()
        due = self._shown_s is None or now - self._shown_s >= self._interval_s
        if not due and step < self._total_steps:
            return
        self._shown_s = now
        left_s = (now - self._started_s) / (step - self._first_step) * (self._total_steps - step)
        self._stream.write(
            f"step {step}/{self._total_steps}  loss {metrics['train/loss']:.3f}  "
            f"rate {metrics['train/learning_rate']:.2e}  {metrics['train/tokens_per_s']:.0f} tokens/s  "
            f"{_minutes(left_s)} left\n"
        )
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()


def progress_for(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a bar where `stream` is a terminal, lines where it is not."""
    return ProgressBar(stream) if stream.isatty() else ProgressLines(stream, clock)


def _minutes(seconds: float) -> str:
    """Write a duration as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
