"""Ctrl-C and SIGTERM for commands that ask models: what is under way is waited for and kept, nothing more is asked."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """What a signal does: `event` is set, for the work to end well; the second one ends the process at once.

    Args:
        waited_for: what is under way, for the person who waits, such as "paid requests".
    """

    def __init__(self, waited_for: str) -> None:
        self.event = threading.Event()
        self.signal: int | None = None
        self._said = f"\nstopping: {waited_for} under way are waited for; once more ends at once\n".encode()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + signum)  # all there is to keep is on the disk
        self.signal = signum
        self.event.set()
        os.write(2, self._said)


@contextmanager
def stopping(waited_for: str) -> Iterator[StopSignal]:
    """Let Ctrl-C and SIGTERM set an event while the context lasts; in the main thread."""
    stop = StopSignal(waited_for)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
