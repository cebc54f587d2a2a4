"""The peak resident memory of one part of a process's life."""

import re
import resource
import sys
from pathlib import Path

CLEAR_PEAK = "5"  # what /proc/PID/clear_refs takes to set the peak back to the present (Linux, proc(5))


class PeakRss:
    """Peak resident memory since `restart`, as far as the system lets it be known.

    Linux sets a process's peak back when asked to. Where that cannot be, the peak is that of the process's
    whole life: right for the first run of a process, and unknown for later ones, which would inherit it.
    """

    _used_before = False  # by an earlier run of this process

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self.known = self.restart() or not PeakRss._used_before
        PeakRss._used_before = True

    def restart(self) -> bool:
        """Set the peak back to the memory in use now; say whether that was possible."""
        try:
            (self._proc / "clear_refs").write_text(CLEAR_PEAK)
        except OSError:
            return False
        return True

    def peak_bytes(self) -> int | None:
        """Return the peak, or None where it is not known."""
        if not self.known:
            return None
        status = self._proc / "status"
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
        if found is not None:
            return int(found[1]) * 1024
        # macOS counts in bytes, others in KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
