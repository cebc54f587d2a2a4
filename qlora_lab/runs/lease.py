"""Leases: at most one attempt at a time may write into a folder, whatever node or moment it comes from.

A lease is the folder `lease.000003`: the attempt's number, a file `beat` that its holder changes every few seconds,
some space on the disk kept in reserve, and whatever the holder is writing. Nothing here trusts the clock of another
machine, or that a process is gone because nobody has heard of it:

- Taking: a folder with a beat in it is prepared and renamed to the next number, which works for one taker only.
- Dead or alive (`heartbeat`): a holder whose beat has not changed for `STALE_S` on the observer's own monotonic clock
  is given up. On the same kernel a lock on the beat, which dies with its holder, says so at once.
- Fence: the taker removes the older lease's folder before it reads anything. What the older attempt puts in place, it
  renames from inside that folder, of which it keeps a descriptor: a process that was stopped for an hour and wakes up
  between two instructions finds its rename refused, even where it has since made a folder of that name again. There is
  no window between asking and writing.

A file that grows by lines is fenced by being another file for each attempt: `appending` puts a copy in place, and only
its own descriptor writes there. What a lost attempt still appends goes into the copy that nobody sees any more.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qlora_lab.errors import LeaseLostError
from qlora_lab.runs.heartbeat import (
    BEAT,
    BEAT_S,
    NO_LOCKS,
    STALE_S,
    Pulse,
    holder,
    leases_in,
    lives_by_lock,
    newest,
    number_of,
)

RESERVE = "reserve"
RESERVE_BYTES = 1 << 16  # a status with a traceback and a hundred earlier attempts
COUNTER_DIGITS = 12
POLL_S = 0.5  # between tries for a lease that another process has
# What a rename or an open says when the folder it goes through has been taken away; ESTALE is a file server's word.
TAKEN_AWAY = (errno.ENOENT, errno.ESTALE, errno.ENOTDIR)


class Lease:
    """The right to write into a folder, held from `Claim.attempt` until `release`, or until it is lost.

    Attributes:
        attempt: its number; a later attempt has a higher one.
        path: the lease's own folder, where everything is written before it is put in place.
    """

    def __init__(self, path: Path, beat: int, beat_s: float) -> None:
        self.path = path
        self.attempt = number_of(path)
        self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._beat = beat
        self._offset = os.fstat(beat).st_size - COUNTER_DIGITS - 1
        self._beat_s = beat_s
        self._done = threading.Event()
        self._appended: list[BinaryIO] = []
        self._thread = threading.Thread(target=self._keep_beating, name=f"beat of {path}", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return the file descriptor of the lock; a child that keeps it open keeps the lease taken a while."""
        return self._beat

    def is_held(self) -> bool:
        """Say whether no later attempt has taken the folder."""
        if self._done.is_set():
            return False
        try:  # numbers may come again where nobody keeps a record of them; files do not
            return os.path.samestat((self.path / BEAT).stat(), os.fstat(self._beat))
        except OSError as error:
            if error.errno in TAKEN_AWAY:
                return False
            raise

    def check(self) -> None:
        """Refuse to go on without the lease.

        Raises:
            LeaseLostError: a later attempt has the folder.
        """
        if not self.is_held():
            raise LeaseLostError(
                f"attempt {self.attempt} at {self.path.parent.name} was silent for so long that another one took over; "
                "it stops here, and what it has not yet written stays unwritten"
            )

    @contextmanager
    def staged(self, target: Path) -> Iterator[Path]:
        """Give a path to write a file or fill a folder at, and put that in place of `target` when the block ends well.

        Raises:
            LeaseLostError: a later attempt has the folder; `target` is as that one wants it.
            OSError: the disk is full or not writable; `target` is as it was.
        """
        temporary = self.path / f"{target.name}.{uuid.uuid4().hex[:8]}"
        try:
            yield temporary
            if temporary.is_dir() and target.exists():
                self.remove(target)
            os.rename(temporary.name, target, src_dir_fd=self._folder)
        except BaseException as error:
            _remove(temporary)
            with contextlib.suppress(OSError):  # what filled it may have made a lost lease's folder again
                self.path.rmdir()
            if isinstance(error, OSError) and error.errno in TAKEN_AWAY:
                self.check()
            raise

    def appending(self, target: Path) -> BinaryIO:
        """Open a file of lines for appending, until the lease is released; half a line at its end is left out.

        Raises:
            LeaseLostError: a later attempt has the folder; `target` is as that one wants it.
            OSError: the disk is full or not writable; `target` is as it was.
        """
        with self.staged(target) as copy:
            file = copy.open("ab", buffering=0)
            self._appended.append(file)
            if target.exists():
                content = target.read_bytes()
                write_whole(file, content[: content.rfind(b"\n") + 1])
                os.fsync(file.fileno())
        return file

    def remove(self, target: Path) -> None:
        """Remove a file or folder, by way of the lease's folder.

        Raises:
            LeaseLostError: a later attempt has the folder; `target` is still there.
        """
        aside = self.path / f"{target.name}.{uuid.uuid4().hex[:8]}"
        try:
            os.rename(target, aside.name, dst_dir_fd=self._folder)
        except OSError:
            self.check()
            raise
        _remove(aside)

    def keep_reserve(self) -> None:
        """Take up some space on the disk, so that a run that fills it can still say so.

        Raises:
            OSError: the disk is full already.
        """
        (self.path / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))  # which no file system can store in less

    def give_up_reserve(self) -> None:
        (self.path / RESERVE).unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lease back; a lease that is lost already stays with who has it."""
        try:
            if self.is_held():
                _take_away(self.path)
        finally:
            self._done.set()
            self._thread.join()
            for file in self._appended:
                file.close()
            os.close(self._folder)
            os.close(self._beat)

    def _keep_beating(self) -> None:
        count = 0
        while not self._done.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a file server that hangs: the next beat may get through
                if not self.is_held():
                    return
                count += 1
                os.pwrite(self._beat, f"{count:0{COUNTER_DIGITS}}\n".encode(), self._offset)


class Claim:
    """Tries for the lease of `folder`, and remembers between tries what it saw of the holder's beat.

    Args:
        last_attempt: the highest number that the folder's own record knows of; numbers are never used twice.
        dead: a lease whose holder is gone by a scheduler's word, also where that cannot be seen from here.
        patient: whether a lock that is seen to be held is waited for, however silent its holder: a child may keep it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        last_attempt: Callable[[], int] = lambda: 0,
        beat_s: float = BEAT_S,
        dead: Path | None = None,
        patient: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._last_attempt = last_attempt
        self._beat_s = beat_s
        self._dead = dead
        self._patient = patient
        self._pulse = Pulse(clock)

    @property
    def holder_moved(self) -> bool:
        """Whether the present holder's beat has changed under our eyes."""
        return self._pulse.moved

    def attempt(self) -> Lease | None:
        """Take the lease where nobody has it, or its holder is gone; None means try again later, or leave it."""
        current = newest(self._folder)
        if current is not None and not self._is_given_up(current):
            return None
        number = max(number_of(current) if current is not None else 0, self._last_attempt()) + 1
        return self._take(number)

    def wait(self, told: str, *, poll_s: float = POLL_S, log: Callable[[str], object] = print) -> Lease:
        """Take the lease as soon as it can be had; where it cannot at once, log `told`."""
        lease = self.attempt()
        if lease is None:
            log(told)
        while lease is None:
            time.sleep(poll_s)
            lease = self.attempt()
        return lease

    def _is_given_up(self, lease: Path) -> bool:
        lives = lives_by_lock(lease)
        if self._patient and lives:
            return False
        return lease == self._dead or lives is False or self._pulse.silent_s(lease) >= STALE_S

    def _take(self, number: int) -> Lease | None:
        target = self._folder / f"lease.{number:06}"
        prepared = _aside(self._folder)
        prepared.mkdir(parents=True)
        beat = os.open(prepared / BEAT, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(beat, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            os.write(beat, f"{json.dumps(holder())}\n{0:0{COUNTER_DIGITS}}\n".encode())
            prepared.rename(target)  # refused where the target is a lease already: it is never empty
        except OSError as error:
            _remove(prepared)
            os.close(beat)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, *TAKEN_AWAY):
                return None
            raise
        lease = Lease(target, beat, self._beat_s)
        newer = newest(self._folder)
        if newer != target or self._last_attempt() >= number:  # others came and went between our look and our step
            lease.release()
            return None
        for older in leases_in(self._folder):
            if number_of(older) < number:
                _take_away(older)
        for leftover in self._folder.glob(".claim-*"):
            if lives_by_lock(leftover) is False:
                _remove(leftover)
        return lease


def write_whole(file: BinaryIO, content: bytes) -> None:
    """Write all of it to an unbuffered file, which may take less at a time.

    Raises:
        OSError: the disk is full; what had space for is written.
    """
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _aside(folder: Path) -> Path:
    return folder / f".claim-{uuid.uuid4().hex[:8]}"


def _take_away(lease: Path) -> None:
    """Remove a lease's folder: under its name from one moment to the next, then for good.

    A file server keeps files that a process of the same machine still has open, and with them the folder they are in.
    """
    aside = _aside(lease.parent)
    with contextlib.suppress(FileNotFoundError):  # somebody else has
        lease.rename(aside)
        _remove(aside)


def _remove(path: Path) -> None:
    """Remove a file or folder for good, also while a holder that has not yet noticed writes into it."""
    for _ in range(100):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        time.sleep(0.01)
