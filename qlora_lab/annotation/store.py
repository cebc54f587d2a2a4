"""A study of human annotators in one SQLite file: the pairs, who sees what, and every vote.

A vote that was acknowledged is on the disk: the write-ahead log is flushed before `vote` returns, so killing the
process loses nothing. Several processes may use one file, on a local disk: SQLite's locks do not reach across machines.
"""

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qlora_lab.annotation.database import Database, create_tables, holds_study, touch_private
from qlora_lab.annotation.schedule import Comparison, items_for
from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.answers import Answer, Question
from qlora_lab.ratings.judgments import VERDICTS, Judgment

LONGEST_NAME = 60


@dataclass(frozen=True)
class Annotator:
    number: int
    name: str
    token: str

    @property
    def judge(self) -> str:
        """The name under which the votes are exported."""
        return f"human:{self.name}"


@dataclass(frozen=True)
class Shown:
    """What an annotator is to judge next; nothing here tells the systems."""

    position: int
    prompt: str
    answers: tuple[str, str]  # first, second
    earlier: str | None  # the verdict that was given here and undone


@dataclass(frozen=True)
class Progress:
    judged: int
    total: int
    last_vote: int | None  # the one that undo takes back


@dataclass(frozen=True)
class Vote:
    """A vote that counts."""

    judgment: Judgment
    category: str
    repeat: bool
    milliseconds: int
    voted_at: str


class Store:
    """An open study. Threads may share it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, file: Path) -> "Store":
        """Open a study that exists.

        Raises:
            DataError: there is none in the file.
        """
        if not file.is_file():
            raise DataError(f"{file} does not exist; to begin a study there, name the files of answers")
        database = Database(file)
        with database.transaction() as cursor:
            if not holds_study(cursor):
                raise DataError(f"{file} is empty; to begin a study there, name the files of answers")
        return cls(database)

    @classmethod
    def create(
        cls,
        file: Path,
        questions: Mapping[str, Question],
        answers: Iterable[Answer],
        comparisons: Sequence[Comparison],
        *,
        repeat: float,
        seed: int,
    ) -> "Store":
        """Begin a study, or open the one in the file where it is the same.

        Raises:
            DataError: the file holds something else.
            NotSavedError: it cannot be written.
        """
        used = {(comparison.question, system) for comparison in comparisons for system in comparison.systems}
        texts = {key: storable(one.answer) for one in answers if (key := (one.question, one.system)) in used}
        asked = [questions[question] for question in dict.fromkeys(comparison.question for comparison in comparisons)]
        pairs = sorted((one.question, *one.systems) for one in comparisons)
        content = [pairs, sorted(texts.items()), sorted((one.question, one.prompt) for one in asked), repeat, seed]
        study = {
            "content": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "repeat": json.dumps(repeat),
            "seed": json.dumps(seed),
        }
        touch_private(file)
        database = Database(file)
        with database.transaction(write=True) as cursor:
            if holds_study(cursor):
                if _setting(cursor, "content") != study["content"]:
                    raise DataError(
                        f"{file} holds a study of other answers, pairs or options; continue it without naming answers "
                        "(its options stay as they were), or name another file with --db"
                    )
                return cls(database)
            create_tables(cursor)
            cursor.executemany("INSERT INTO study VALUES (?, ?)", study.items())
            cursor.executemany(
                "INSERT INTO questions VALUES (?, ?, ?)",
                [(one.question, one.category, storable(one.prompt)) for one in asked],
            )
            cursor.executemany("INSERT INTO answers VALUES (?, ?, ?)", [(*key, text) for key, text in texts.items()])
            cursor.executemany("INSERT INTO comparisons VALUES (?, ?, ?)", pairs)
        return cls(database)

    def close(self) -> None:
        self._database.close()

    def annotators(self) -> list[Annotator]:
        with self._database.transaction() as cursor:
            return _annotators(cursor)

    def add_annotators(self, names: Sequence[str]) -> None:
        """Give each new name its sequence and its token; those who are there keep theirs.

        Raises:
            DataError: a name is empty, too long, unprintable, or comes twice.
        """
        fine = all(name.isprintable() and 1 <= len(name) <= LONGEST_NAME for name in names)
        if not fine or len(set(names)) < len(names):
            raise DataError(
                f"--annotators must be different names of 1 to {LONGEST_NAME} characters, separated by commas; "
                f"got {','.join(names)!r}"
            )
        with self._database.transaction(write=True) as cursor:
            rows = cursor.execute("SELECT question, one, other FROM comparisons ORDER BY rowid")
            chosen = [Comparison(question, (one, other)) for question, one, other in rows]
            repeat, seed = (json.loads(_setting(cursor, name)) for name in ("repeat", "seed"))
            known = {annotator.name for annotator in _annotators(cursor)}
            for number, name in enumerate([name for name in names if name not in known], start=len(known)):
                cursor.execute("INSERT INTO annotators VALUES (?, ?, ?)", (number, name, secrets.token_urlsafe(16)))
                items = items_for(chosen, name, number, repeat=repeat, seed=seed)
                cursor.executemany(
                    "INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)",
                    [
                        (number, position, item.question, item.first, item.second, item.repeat)
                        for position, item in enumerate(items)
                    ],
                )

    def annotator(self, token: str) -> Annotator | None:
        """Return whose link holds the token."""
        with self._database.transaction() as cursor:
            row = cursor.execute("SELECT number, name, token FROM annotators WHERE token = ?", (token,)).fetchone()
        return Annotator(*row) if row else None

    def progress(self, annotator: Annotator) -> Progress:
        with self._database.transaction() as cursor:
            (total,) = cursor.execute("SELECT count(*) FROM items WHERE annotator = ?", (annotator.number,)).fetchone()
            judged, last = cursor.execute(
                "SELECT count(*), max(number) FROM votes WHERE annotator = ? AND undone = 0", (annotator.number,)
            ).fetchone()
        return Progress(judged, total, last)

    def next_item(self, annotator: Annotator) -> Shown | None:
        """Return the first item without a vote; None when all have one."""
        with self._database.transaction() as cursor:
            row = cursor.execute(
                """
                SELECT position, prompt, one.answer, other.answer,
                    (SELECT verdict FROM votes WHERE votes.annotator = items.annotator
                     AND votes.position = items.position ORDER BY number DESC LIMIT 1)
                FROM items JOIN questions USING (question)
                JOIN answers AS one ON (one.question, one.system) = (items.question, first)
                JOIN answers AS other ON (other.question, other.system) = (items.question, second)
                WHERE annotator = ? AND NOT EXISTS
                    (SELECT 1 FROM votes WHERE votes.annotator = items.annotator
                     AND votes.position = items.position AND undone = 0)
                ORDER BY position LIMIT 1
                """,
                (annotator.number,),
            ).fetchone()
        return None if row is None else Shown(row[0], row[1], (row[2], row[3]), row[4])

    def vote(self, annotator: Annotator, position: int, verdict: str, milliseconds: int, now: datetime) -> bool:
        """Record a verdict, for good; an item that has one keeps it.

        Returns:
            Whether `verdict` is what now counts: a vote sent twice is recorded once, and a second opinion from another
            window is refused.

        Raises:
            DataError: the annotator has no such item, or this is no verdict.
            NotSavedError: nothing was recorded; try again.
        """
        if verdict not in VERDICTS:
            raise DataError(unknown_name("verdict", verdict, VERDICTS))
        where = (annotator.number, position)
        with self._database.transaction(write=True) as cursor:
            if not cursor.execute("SELECT 1 FROM items WHERE annotator = ? AND position = ?", where).fetchone():
                raise DataError(f"{annotator.name} has no item {position}; open your link again")
            counts = "SELECT verdict FROM votes WHERE annotator = ? AND position = ? AND undone = 0"
            known = cursor.execute(counts, where).fetchone()
            if known:
                return bool(known[0] == verdict)
            cursor.execute(
                "INSERT INTO votes (annotator, position, verdict, milliseconds, voted_at) VALUES (?, ?, ?, ?, ?)",
                (*where, verdict, milliseconds, now.astimezone(UTC).isoformat(timespec="milliseconds")),
            )
        return True

    def undo(self, annotator: Annotator, vote: int) -> None:
        """Take back a vote of this annotator; one that is already taken back stays so.

        Raises:
            NotSavedError: nothing was changed; try again.
        """
        with self._database.transaction(write=True) as cursor:
            cursor.execute("UPDATE votes SET undone = 1 WHERE annotator = ? AND number = ?", (annotator.number, vote))

    def votes(self) -> list[Vote]:
        """Return every vote that counts, in the order they were given."""
        with self._database.transaction() as cursor:
            judges = {annotator.number: annotator.judge for annotator in _annotators(cursor)}
            rows = cursor.execute(
                """
                SELECT annotator, question, first, second, verdict, category, repeat, milliseconds, voted_at
                FROM votes JOIN items USING (annotator, position) JOIN questions USING (question)
                WHERE undone = 0 ORDER BY votes.number
                """
            ).fetchall()
        return [
            Vote(Judgment(question, first, second, verdict, judges[annotator]), category, bool(repeat), *when)
            for annotator, question, first, second, verdict, category, repeat, *when in rows
        ]


def storable(text: str) -> str:
    """Return a text that UTF-8 can hold: half a character, which a cut answer may end in, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _setting(cursor: sqlite3.Cursor, name: str) -> str:
    return str(cursor.execute("SELECT value FROM study WHERE name = ?", (name,)).fetchone()[0])


def _annotators(cursor: sqlite3.Cursor) -> list[Annotator]:
    rows = cursor.execute("SELECT number, name, token FROM annotators ORDER BY number").fetchall()
    return [Annotator(*row) for row in rows]
