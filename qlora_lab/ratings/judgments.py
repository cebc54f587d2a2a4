"""Judgments of two answers to one question, and the JSON lines in which they are kept.

A line is an object with `question`, `first`, `second` (the systems, in the order in which their answers were shown),
`verdict` ("first", "second", "tie", or null where what the judge said could not be read) and `judge`.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_lab.errors import DataError

FIRST, SECOND, TIE = "first", "second", "tie"
VERDICTS = (FIRST, SECOND, TIE)
FIELDS = ("question", "first", "second", "verdict", "judge")
HUMAN = "human"  # a person's name as a judge is human:NAME; alone it stands for the majority of them


class RatingsWarning(UserWarning):
    """Something about ratings that a reader must know, and that does not make them wrong."""


@dataclass(frozen=True)
class Judgment:
    """One verdict of one judge on one pair; `verdict` is None where it could not be read."""

    question: str
    first: str
    second: str
    verdict: str | None
    judge: str

    @property
    def pair(self) -> tuple[str, str]:
        """The two systems in alphabetical order, whichever was shown first."""
        return (self.first, self.second) if self.first < self.second else (self.second, self.first)

    @property
    def winner(self) -> str | None:
        """The better system; None for a tie, and where the verdict could not be read."""
        return {FIRST: self.first, SECOND: self.second}.get(self.verdict or "")


def write_judgments(file: Path, judgments: Iterable[Judgment]) -> None:
    file.write_text("".join(json.dumps(asdict(judgment), ensure_ascii=False) + "\n" for judgment in judgments))


def read_judgments(file: Path) -> list[Judgment]:
    """Read one file of judgments.

    Raises:
        DataError: a line is none; the sentence names file and line.
    """
    return [_judgment(row, place) for row, place in json_rows(file)]


def json_rows(file: Path) -> Iterator[tuple[dict[str, object], str]]:
    """Yield each JSON object of a file of JSON lines, and where it stands; empty lines are left out.

    A last line that has no line feed and is no JSON is one that another process is still writing: it is left out, with
    a RatingsWarning.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    try:
        lines = file.read_bytes().split(b"\n")  # and at nothing else that Unicode calls the end of a line
    except OSError as error:
        raise DataError(f"{file} must be a text file of JSON lines; got {error}") from error
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError as error:  # of JSON or of UTF-8
            if number == len(lines):
                warnings.warn(f"{place} is torn, as if still being written; left out", RatingsWarning, stacklevel=2)
                return
            shown = line[:60].decode(errors="replace")
            raise DataError(f"{place} must be a JSON object; got {shown!r} ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{place} must be a JSON object; got {line[:60].decode(errors='replace')!r}")
        yield row, place


def _judgment(row: dict[str, object], place: str) -> Judgment:
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise DataError(f"{place} must have {', '.join(FIELDS)}; got no {', '.join(missing)}")
    verdict = row["verdict"]
    if verdict is not None and verdict not in VERDICTS:
        raise DataError(f"{place}: verdict must be one of {', '.join(VERDICTS)}, or null; got {verdict!r}")
    names = {name: str(row[name]) for name in FIELDS if name != "verdict"}
    if names["first"] == names["second"]:
        raise DataError(f"{place}: first and second must be different systems; got '{names['first']}' twice")
    return Judgment(verdict=None if verdict is None else str(verdict), **names)


def latest(judgments: Iterable[Judgment]) -> list[Judgment]:
    """Keep one judgment of a judge on a question and an order shown: the last, which corrects those before it.

    A RatingsWarning says how many were replaced.
    """
    kept: dict[tuple[str, str, str, str], Judgment] = {}
    replaced = 0
    for judgment in judgments:
        key = (judgment.judge, judgment.question, judgment.first, judgment.second)
        replaced += kept.pop(key, None) is not None
        kept[key] = judgment
    if replaced:
        warnings.warn(
            f"{replaced} judgments came again from the same judge for the same question and order; the last ones count",
            RatingsWarning,
            stacklevel=2,
        )
    return list(kept.values())


def majority(votes: Iterable[Judgment], judge: str = "majority") -> list[Judgment]:
    """Return one judgment a question and pair, by the most votes; a tie where none has the most.

    Votes that could not be read count for nothing. The pair is shown in alphabetical order.
    """
    counts: dict[tuple[str, tuple[str, str]], Counter[str | None]] = {}
    for vote in votes:
        if vote.verdict is not None:
            counts.setdefault((vote.question, vote.pair), Counter())[vote.winner] += 1
    judgments = []
    for (question, (first, second)), counted in counts.items():
        (winner, most), *others = counted.most_common()
        tied = winner is None or any(count == most for _, count in others)
        verdict = TIE if tied else FIRST if winner == first else SECOND
        judgments.append(Judgment(question, first, second, verdict, judge))
    return judgments
