"""How far a long evaluation or judging is: a bar in a terminal, a line now and then in a log."""

import sys
from typing import TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 15.0


def progress_bar(total: int, *, done: int = 0, what: str, unit: str, stream: TextIO | None = None) -> "tqdm[None]":
    """Return a bar to `update`, and to use as a context.

    Args:
        total: how many there are, those `done` by an earlier attempt among them.
        what: is evaluated, such as "vicuna of 0123456789ab".
        unit: what is counted, in the singular.
        stream: None: standard error.
    """
    stream = stream or sys.stderr
    interval_s = 0.1 if stream.isatty() else LINE_INTERVAL_S
    return _Bar(total=total, initial=done, desc=what, unit=unit, file=stream, mininterval=interval_s, maxinterval=60)


class _Bar(tqdm):
    """tqdm, in a log with whole lines in place of one that is drawn over and over."""

    @staticmethod
    def status_printer(file: TextIO):  # type: ignore[no-untyped-def]
        if file.isatty():
            return tqdm.status_printer(file)

        shown = ""

        def show(line: str) -> None:
            nonlocal shown
            if line not in ("", shown):  # tqdm clears lines, and shows the last one twice
                file.write(f"{line}\n")
                file.flush()
                shown = line

        return show
