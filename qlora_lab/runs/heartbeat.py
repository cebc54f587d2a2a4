"""Whether the holder of a lease lives, wherever it runs: by its lock where that reaches, by its beat everywhere.

A lock dies with its holder, but on some clusters it is not seen beyond a node, and some file systems have none. The
beat is a number that the holder changes every few seconds. Who wants to know sees it change, or not, by a monotonic
clock of their own: the clocks of other machines, and the times that they write into files, say nothing.
"""

import errno
import fcntl
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

BEAT_S = 4.0
STALE_S = 25.0  # of silence; the beat of a holder on a slow file server must be quicker than that
POLL_S = 0.5
LEASE_FOLDER = re.compile(r"lease\.(\d{6})")
BEAT = "beat"
# What a file system without locks says (Lustre, unless it was mounted with them): beats alone decide there.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Pulse:
    """What one observer has seen of the beat in a folder, over several looks.

    Attributes:
        moved: whether the present holder's beat has changed under our eyes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[Path, bytes, float] | None = None  # whose beat, what it said, since when
        self.moved = False

    def silent_s(self, lease: Path) -> float:
        """Look at the beat of a lease, and return for how long it has said the same."""
        now = self._clock()
        said = _read(lease / BEAT)
        if self._seen is None or self._seen[0] != lease:
            self.moved = False
            self._seen = lease, said, now
        elif self._seen[1] != said:
            self.moved = True
            self._seen = lease, said, now
        return now - self._seen[2]


class Observer:
    """Tells what is being executed from what was left behind, and remembers what it saw.

    Args:
        stale_s: of silence after which a holder is dead.
        clock: monotonic seconds.
        sleep: waits between two looks at a beat.
    """

    def __init__(
        self,
        *,
        stale_s: float = STALE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._stale_s = stale_s
        self._clock = clock
        self._sleep = sleep
        self._pulses: dict[Path, Pulse] = {}

    def living(self, folders: Iterable[Path]) -> set[Path]:
        """Return those of the folders whose lease a living process holds.

        Where locks say nothing, this waits until every beat has moved, or has been silent for `stale_s`: a few seconds,
        once for all folders. Those seen before are known at once.
        """
        found: set[Path] = set()
        waiting = list(folders)
        told = False
        while True:
            looks = {folder: self._look(folder) for folder in waiting}
            found |= {folder for folder, lives in looks.items() if lives}
            waiting = [folder for folder, lives in looks.items() if lives is None]
            if not waiting:
                return found
            if not told:
                print(f"waiting for the heartbeat of {len(waiting):,} runs on other machines", file=sys.stderr)
                told = True
            self._sleep(POLL_S)

    def _look(self, folder: Path) -> bool | None:
        """Say whether the holder lives; None where that takes another look."""
        lease = newest(folder)
        if lease is None:
            return False
        lives = lives_by_lock(lease)
        if lives is not None:
            return lives
        pulse = self._pulses.setdefault(folder, Pulse(self._clock))
        if pulse.silent_s(lease) >= self._stale_s:
            return False
        return True if pulse.moved else None


def holder() -> dict[str, object]:
    """Say who we are, for those who find our lease."""
    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "pid": os.getpid(),
        "kernel": _kernel(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def lives_by_lock(lease: Path) -> bool | None:
    """Say whether the holder lives, as its lock has it; None where that cannot be seen from here.

    A lock that is held is held by a living process. One that is free belongs to a dead one only on the same kernel.
    """
    try:
        with (lease / BEAT).open("rb+") as file:
            here = json.loads(file.readline()).get("kernel") == _kernel()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: observers do not keep each other out
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return None
    return False if here else None


def leases_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [Path(entry.path) for entry in os.scandir(folder) if LEASE_FOLDER.fullmatch(entry.name)]


def newest(folder: Path) -> Path | None:
    """Return the lease of the latest attempt, or None where nobody has begun one."""
    return max(leases_in(folder), default=None)


def number_of(lease: Path) -> int:
    return int(lease.name.rpartition(".")[2])


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _kernel() -> str:
    """Return what tells a running kernel from every other: it is drawn at random at boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} without boot_id"
