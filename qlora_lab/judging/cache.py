"""Every response by the content of its request, in SQLite, shared by all processes of a machine.

A process claims a request before it sends it, so that no other one sends it too; whoever needs the same waits for the
response. A claim belongs to an owner, whose file is locked for as long as its process lives: the claims of a process
that is gone are free again at once, whatever ended it. The budget is checked in the transaction that claims, so that
several processes keep to it together.
"""

import contextlib
import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.errors import DataError, JudgeError

RESERVE_BYTES = 1 << 20  # kept on the disk, so that what was paid for can be stored when others fill it
BUSY_S = 60.0  # how long to wait for another process's transaction
CLAIMED, TAKEN, TOO_DEAR = "claimed", "taken", "too dear"
TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    key TEXT PRIMARY KEY, root TEXT NOT NULL, text TEXT NOT NULL, model TEXT NOT NULL, finish_reason TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL, date TEXT NOT NULL, request TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, root TEXT NOT NULL, owner TEXT NOT NULL, reserved REAL NOT NULL
);
CREATE TEMPORARY TABLE plan (root TEXT PRIMARY KEY);
"""


@dataclass(frozen=True)
class Response:
    """What a judge wrote to one request.

    Tokens are None where the endpoint did not say; `cost` is in US dollars, None where the price is not known.
    """

    text: str
    model: str  # as the endpoint calls itself
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    date: str


class ResponseCache:
    """The responses in one file, and this process's claims. To be used by one thread.

    Args:
        file: of the database; created with its folder.

    Raises:
        DataError: it cannot be opened, or is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._owners = file.with_name(f"{file.name}.owners")
        self._reserve = file.with_name(f"{file.name}.reserve")
        try:
            self._owners.mkdir(parents=True, exist_ok=True)
            if not self._reserve.exists():
                self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # which no file system can store in less
            self._owner = uuid.uuid4().hex
            self._lock = _locked(self._owners / self._owner, create=True)
            self._database = sqlite3.connect(file, timeout=BUSY_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            self._reserve.unlink(missing_ok=True)  # a part of it would count as all of it
            raise DataError(
                f"{file} cannot be used as the cache of responses ({error}); make space, or give another with --cache"
            ) from error

    def close(self) -> None:
        """Give up this process's claims."""
        with contextlib.suppress(sqlite3.Error):  # a full disk; the claims are free without this process
            self._database.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))
        self._database.close()
        (self._owners / self._owner).unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def plan(self, roots: Iterable[str]) -> None:
        """Say which requests the budget is for, by their first request's key."""
        self._database.executemany("INSERT OR IGNORE INTO plan VALUES (?)", ((root,) for root in roots))

    def get(self, key: str) -> Response | None:
        row = self._database.execute(
            "SELECT text, model, finish_reason, prompt_tokens, completion_tokens, cost, date FROM responses "
            "WHERE key = ?",
            (key,),
        ).fetchone()
        return None if row is None else Response(*row)

    def claim(self, key: str, root: str, reserved: float = 0.0, max_cost: float | None = None) -> str:
        """Take the right to send a request.

        Args:
            reserved: what it can cost at most.
            max_cost: of all requests of the plan, those of other processes included.

        Returns:
            `claimed`; `taken`: a process is at it, perhaps this one, or has just finished; `too dear`: max_cost could
            be exceeded.
        """
        with self._transaction():
            row = self._database.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
            if (row is not None and self._is_alive(row[0])) or self.get(key) is not None:
                return TAKEN
            if max_cost is not None and self._committed(key) + reserved > max_cost:
                return TOO_DEAR
            self._database.execute(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (key, root, self._owner, reserved)
            )
        return CLAIMED

    def put(self, key: str, root: str, request: str, response: Response) -> None:
        """Store a response and give up its claim.

        Raises:
            JudgeError: the disk is full. The response is stored all the same where what was kept in reserve sufficed.
        """
        try:
            self._put(key, root, request, response)
        except sqlite3.OperationalError as error:
            self._reserve.unlink(missing_ok=True)
            lost = f"{self.file} cannot be written ({error}), and a response is lost; make space"
            try:
                self._put(key, root, request, response)
            except sqlite3.OperationalError as again:
                raise JudgeError(lost) from again
            raise JudgeError(
                f"{self.file} has no space left ({error}); what is answered is kept and nothing more is asked: make "
                "space, and run the same command again"
            ) from error

    def release(self, key: str) -> None:
        """Give up a claim without a response."""
        self._database.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, self._owner))

    def spent(self) -> float:
        """Return the US dollars that the plan's responses have cost, whichever process and day paid them."""
        (cost,) = self._database.execute(
            "SELECT total(cost) FROM responses WHERE root IN (SELECT root FROM plan)"
        ).fetchone()
        return float(cost)

    def _committed(self, key: str) -> float:
        """Return what is spent, and what the requests under way can cost; claims of the dead count for nothing."""
        rows = self._database.execute(
            "SELECT owner, total(reserved) FROM claims WHERE key != ? AND root IN (SELECT root FROM plan) "
            "GROUP BY owner",
            (key,),
        ).fetchall()
        return self.spent() + sum(reserved for owner, reserved in rows if self._is_alive(owner))

    def _put(self, key: str, root: str, request: str, response: Response) -> None:
        with self._transaction():
            self._database.execute(
                "INSERT OR IGNORE INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    root,
                    response.text,
                    response.model,
                    response.finish_reason,
                    response.prompt_tokens,
                    response.completion_tokens,
                    response.cost,
                    response.date,
                    request,
                ),
            )
            self.release(key)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def _is_alive(self, owner: str) -> bool:
        if owner == self._owner:
            return True
        lock = _locked(self._owners / owner, create=False)
        if lock is None:
            return (self._owners / owner).exists()
        os.close(lock)
        (self._owners / owner).unlink(missing_ok=True)
        return False


def _locked(file: Path, *, create: bool) -> int | None:
    """Lock a file and return its descriptor; None where another process has it, or where there is none."""
    try:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
