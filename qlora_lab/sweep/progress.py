"""Show how the runs of a study stand, from their folders alone: one line, redrawn in a terminal."""

import time
from typing import TextIO

from qlora_lab.runs.folder import FINISHED, NEW, RUNNING, RunFolder, states_of

LOG_EVERY_S = 20.0


class SweepProgress:
    """A line redrawn in place in a terminal; in a log, a new line whenever a run changes state or time has passed."""

    def __init__(self, folders: list[RunFolder], stream: TextIO) -> None:
        self._folders = folders
        self._stream = stream
        self._start = self._shown = time.monotonic()
        self._states: list[str] = []

    def show(self, *, final: bool = False) -> None:
        # finished runs stay so: of thousands, only the others are looked at twice a second
        both = zip(self._folders, self._states or [NEW] * len(self._folders), strict=True)
        looked_at = [folder for folder, state in both if state != FINISHED]
        now = dict(zip(looked_at, states_of(looked_at), strict=True))
        states = [now.get(folder, FINISHED) for folder in self._folders]
        line = self._line(states)
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[2K{line}" + ("\n" if final else ""))
        elif final or states != self._states or time.monotonic() - self._shown > LOG_EVERY_S:
            self._stream.write(line + "\n")
            self._shown = time.monotonic()
        self._states = states
        self._stream.flush()

    def _line(self, states: list[str]) -> str:
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        running = [_describe(folder) for folder, state in zip(self._folders, states, strict=True) if state == RUNNING]
        elapsed_s = int(time.monotonic() - self._start)
        return f"[{elapsed_s // 60}:{elapsed_s % 60:02}] {counts}" + "".join(f" | {text}" for text in running[:4])


def _describe(folder: RunFolder) -> str:
    metrics = folder.last_metrics()
    if metrics is None:
        return f"{folder.run_id} starting"
    loss = metrics.get("train/loss")
    return f"{folder.run_id} step {metrics['step']}" + (f" loss {loss:.3f}" if loss is not None else "")
