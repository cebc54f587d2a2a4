"""The SQLite file of a study: opening it, and transactions that are on the disk when they end."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from qlora_lab.errors import DataError

APPLICATION = 0x716C6162  # "qlab", where SQLite files say whose they are
VERSION = 1
BUSY_S = 20.0  # to wait for another process that is writing


class NotSavedError(DataError):
    """The study's file cannot be read or written now, as when the disk is full; what it holds is safe."""


class Database:
    """An open file, which threads may share.

    Raises:
        NotSavedError: it cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        try:
            self._connection = sqlite3.connect(
                f"file:{quote(str(file.resolve()))}?mode=rw",
                uri=True,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(
                "PRAGMA synchronous = FULL"
            )  # WAL's default may lose the last votes with the power
            self._connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error as error:
            raise NotSavedError(f"{file} cannot be used as the file of an annotation study: {error}") from error

    @contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Cursor]:
        """Give one transaction: all of it is on the disk when the block ends, or nothing of it.

        Raises:
            NotSavedError: SQLite refuses, as when the disk is full.
        """
        with self._lock:
            cursor = self._connection.cursor()
            try:
                cursor.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                yield cursor
                cursor.execute("COMMIT")
            except sqlite3.Error as error:
                raise NotSavedError(f"{self._file} could not be {'written' if write else 'read'}: {error}") from error
            finally:
                if self._connection.in_transaction:
                    self._connection.rollback()
                cursor.close()

    def close(self) -> None:
        self._connection.close()


def touch_private(file: Path) -> None:
    """Create a file that only its owner reads, where there is none: it will hold the annotators' tokens."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError as error:
        raise NotSavedError(f"{file} cannot be written: {error.strerror}") from error


def holds_study(cursor: sqlite3.Cursor) -> bool:
    """Tell whether the file is one of ours; False where it is empty.

    Raises:
        DataError: it is somebody else's.
    """
    (application,) = cursor.execute("PRAGMA application_id").fetchone()
    (version,) = cursor.execute("PRAGMA user_version").fetchone()
    if (application, version) == (APPLICATION, VERSION):
        return True
    if application or version or cursor.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise DataError("this SQLite file holds something else than an annotation study; name another one with --db")
    return False


def create_tables(cursor: sqlite3.Cursor) -> None:
    """Make an empty file one of ours."""
    for statement in resources.files(__package__).joinpath("schema.sql").read_text().split(";\n"):
        cursor.execute(statement)
    cursor.execute(f"PRAGMA application_id = {APPLICATION}")
    cursor.execute(f"PRAGMA user_version = {VERSION}")
