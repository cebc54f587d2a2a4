"""Showing how far judging is: a bar in a terminal, a line every half minute in a log."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from qlora_lab.judging.work import Outcome

LINE_INTERVAL_S = 30.0


class Progress:
    """To be used in a with block; `show` is called after each comparison."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._stream, self._clock = total, stream, clock
        self._bar: tqdm | None = None
        self._shown_s = clock()

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._bar = tqdm(total=self._total, file=self._stream, desc="judging", unit="pair")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, outcome: Outcome) -> None:
        if self._bar is not None:
            self._bar.set_postfix(asked=outcome.asked, paid=f"${outcome.paid:.3f}", refresh=False)
            self._bar.update(len(outcome.judged) - self._bar.n)
        elif self._clock() - self._shown_s >= LINE_INTERVAL_S:
            self._shown_s = self._clock()
            self._stream.write(f"judged {len(outcome.judged)} of {self._total}; paid ${outcome.paid:.3f}\n")
            self._stream.flush()
