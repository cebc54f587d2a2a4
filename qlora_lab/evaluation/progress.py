"""Showing how far an evaluation is: a bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 15.0
Advance = Callable[[int], object]  # told how many more items are done


@contextmanager
def item_progress(
    name: str,
    stream: TextIO | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    interval_s: float = LINE_INTERVAL_S,
) -> Iterator[Callable[[int], Advance]]:
    """Give a function from a number of items to what is told, batch by batch, how many more are done.

    Args:
        name: of the evaluation, before the numbers.
        stream: where it is shown; None: standard error.
        interval_s: between lines, at least; the last item always gets one.
    """
    shown_on = stream or sys.stderr
    bars: list[tqdm] = []

    def bar(items: int) -> Advance:
        bars.append(tqdm(total=items, desc=name, unit="item", file=shown_on))
        return bars[-1].update

    def lines(items: int) -> Advance:
        done, started, shown = 0, clock(), clock()

        def advance(more: int) -> None:
            nonlocal done, shown
            done += more
            now = clock()
            if now - shown >= interval_s or done == items:
                left_s = (now - started) / done * (items - done)
                shown_on.write(f"{name}: {done}/{items} items, {left_s:.0f} s left\n")
                shown_on.flush()
                shown = now

        return advance

    try:
        yield bar if shown_on.isatty() else lines
    finally:
        for each in bars:
            each.close()
