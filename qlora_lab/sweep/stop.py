"""Being told to stop, by SIGTERM or SIGUSR2, at any moment and any number of times."""

import signal
import sys
from types import FrameType

from qlora_lab.config.exit_status import TERMINATED

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether this process was told to stop; the first signal ends what it is doing with SystemExit.

    A run in training handles the signals itself, to end and save its step. After the first signal all further ones
    are ignored: what is being recorded is not interrupted again.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)

    def ignore(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.ignore()
        self.signal = signal.Signals(signum)
        sys.exit(TERMINATED)
