"""Scores from 1 to 10 that a judge gives two answers shown together, and the JSON lines in which they are kept.

A line is an object with `question`, `first`, `second` (the systems, in the order in which their answers were shown),
`first_score`, `second_score` (null where what the judge said could not be read) and `judge`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import json_rows

FIELDS = ("question", "first", "second", "first_score", "second_score", "judge")
LOWEST, HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class ScoredPair:
    """Two scores of one judge for one pair; both are None where they could not be read."""

    question: str
    first: str
    second: str
    first_score: float | None
    second_score: float | None
    judge: str


def write_scores(file: Path, scores: Iterable[ScoredPair]) -> None:
    file.write_text("".join(json.dumps(asdict(score), ensure_ascii=False) + "\n" for score in scores))


def read_scores(file: Path) -> list[ScoredPair]:
    """Read one file of scored pairs.

    Raises:
        DataError: a line is none, or a score is not from 1 to 10; the sentence names file and line.
    """
    return [_scored_pair(row, place) for row, place in json_rows(file)]


def _scored_pair(row: dict[str, object], place: str) -> ScoredPair:
    missing = [name for name in FIELDS if name not in row]
    if missing:
        raise DataError(f"{place} must have {', '.join(FIELDS)}; got no {', '.join(missing)}")
    first_score, second_score = (_score(row[name], name, place) for name in ("first_score", "second_score"))
    if (first_score is None) != (second_score is None):
        raise DataError(f"{place}: either both scores are numbers, or both are null")
    first, second = str(row["first"]), str(row["second"])
    if first == second:
        raise DataError(f"{place}: first and second must be different systems; got '{first}' twice")
    return ScoredPair(str(row["question"]), first, second, first_score, second_score, str(row["judge"]))


def _score(value: object, name: str, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not LOWEST <= value <= HIGHEST:
        raise DataError(f"{place}: {name} must be a number from 1 to 10, or null; got {value!r}")
    return float(value)


def latest_scores(scores: Iterable[ScoredPair]) -> list[ScoredPair]:
    """Keep the last pair of scores of a judge on a question and an order shown, which corrects those before it."""
    return list({(score.judge, score.question, score.first, score.second): score for score in scores}.values())
