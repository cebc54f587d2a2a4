"""Stopping between two steps, and undoing what Lightning makes of signals."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException

from qlora_lab.errors import QloraLabError

logger = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class TrainingInterrupted(QloraLabError):
    """Training was asked to stop and did, after a checkpoint; the next attempt goes on from there."""


class CtrlC:
    """Whether Ctrl-C was pressed inside `waiting_for_step`."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def waiting_for_step(self) -> Iterator[None]:
        """Note the first Ctrl-C, so that the step can end and be saved; let the second stop at once.

        A handler that the caller installed is left alone. Threads cannot install one and do without.
        """
        before = signal.getsignal(signal.SIGINT)
        main_thread = threading.current_thread() is threading.main_thread()
        if before is not signal.default_int_handler or not main_thread:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed:
            signal.default_int_handler(signum, frame)
        self.pressed = True
        logger.warning("Ctrl-C: finishing and saving this step; press it again to stop at once")


@contextmanager
def as_usual_exceptions(ctrl_c: CtrlC) -> Iterator[None]:
    """Turn what Lightning raises for signals into KeyboardInterrupt and TrainingInterrupted.

    Lightning turns Ctrl-C into SystemExit(1), and a SIGTERM into SystemExit when the last step is done.
    """
    try:
        yield
    except TrainingInterrupted:
        if ctrl_c.pressed:
            raise KeyboardInterrupt from None
        raise
    except SIGTERMException:
        raise TrainingInterrupted("training was asked to stop after its last step, which is saved") from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if ctrl_c.pressed:
        raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and SIGUSR2, which schedulers send first, into an answer to "shall I stop after this step?".

    Once a stop was asked for, further signals change nothing, also after the block: the record is being written.
    """
    requested = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    before = {signum: signal.signal(signum, handle) for signum in STOP_SIGNALS}
    try:
        yield lambda: requested
    finally:
        if not requested:
            for signum, handler in before.items():
                signal.signal(signum, handler)
