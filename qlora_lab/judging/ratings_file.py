"""The file of ratings a judge makes: the layouts of qlora_lab.ratings with what is needed to look up how each was made.

Further fields of a line: `category`, `text` (what the judge wrote), `reminded` (whether it had to be asked for the
verdict alone, and then `unread_text`, what it wrote first), `model`, `judge_sha256` (of kind, model and address that
were asked), `sampling`, `prompt_sha256` (of the words it was asked with), `request_sha256` (in the cache), `date`,
`finish_reason`, `prompt_tokens`, `completion_tokens`, `cost`.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError, JudgeError
from qlora_lab.judging.prompts import CRITERIA, VERDICTS, prompt_sha256
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.judging.work import Judged
from qlora_lab.ratings.judgments import Judgment, json_rows, read_judgments
from qlora_lab.ratings.scores import ScoredPair, read_scores
from qlora_lab.runs.files import write_json_lines

Row = dict[str, Any]


def row_of(judged: Judged, task: str, config: JudgeConfig) -> Row:
    """Return the line of one comparison."""
    comparison, response, earlier = judged.comparison, judged.response, judged.earlier
    costs = [reply.cost for reply in (response, earlier) if reply is not None]
    return {
        **_rating(judged, task, config.judge),
        "category": comparison.category,
        "text": response.text,
        "reminded": earlier is not None,
        **({} if earlier is None else {"unread_text": earlier.text}),
        "model": response.model,
        "judge_sha256": config.asked_sha256(),
        "sampling": config.sampling(),
        "prompt_sha256": prompt_sha256(comparison.category, task),
        "request_sha256": judged.key,
        "date": response.date,
        "finish_reason": response.finish_reason,
        "prompt_tokens": _total([reply.prompt_tokens for reply in (response, earlier) if reply is not None]),
        "completion_tokens": _total([reply.completion_tokens for reply in (response, earlier) if reply is not None]),
        "cost": _total(costs),
    }


def check_ratings(file: Path, judge: str, task: str, judge_sha256: str | None, sampling: Row | None = None) -> None:
    """Refuse, before anything is paid, to write into a file that holds something else.

    Args:
        judge_sha256: of who is asked; None: of a replay that does not say it.
        sampling: with which the judge writes; None: of a replay, whatever it was.

    Raises:
        DataError: it has ratings of another judge, of another kind, made otherwise, or lines that are none.
    """
    if not file.exists():
        if not file.parent.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {file.parent}")
        return
    ratings: Sequence[Judgment | ScoredPair] = read_judgments(file) if task == VERDICTS else read_scores(file)
    others = sorted({rating.judge for rating in ratings} - {judge})
    if others:
        raise DataError(f"{file} holds ratings of {', '.join(others)}; give those of {judge} a file of their own")
    words = {prompt_sha256(category, task) for category in CRITERIA}
    for row, place in json_rows(file):
        if row.get("judge_sha256") != judge_sha256:
            raise DataError(
                f"{place} is of another judge that is called {judge} as well: another model or endpoint, or published "
                "ratings; give these ratings a file of their own"
            )
        if sampling is not None and (row.get("sampling") != sampling or row.get("prompt_sha256") not in words):
            raise DataError(
                f"{place}: {judge} was asked with other words or with {row.get('sampling')}, now with {sampling}; give "
                "these ratings a file of their own"
            )


def merge_ratings(file: Path, rows: Sequence[Row]) -> None:
    """Put rows into a file of ratings, in place of those about the same question and pair in the same order.

    Processes that do so at the same time take turns. The file is either the old one or the new one, whole.

    Raises:
        JudgeError: it cannot be written; what was judged is in the cache.
    """
    try:
        with _turn(file):
            found = {_identity(row): row for row, _ in json_rows(file)} if file.exists() else {}
            write_json_lines(file, list((found | {_identity(row): row for row in rows}).values()))
    except OSError as error:
        raise JudgeError(
            f"{file} cannot be written ({error.strerror}); what was judged is kept in the cache: make space, and run "
            "the same command again"
        ) from error


def _rating(judged: Judged, task: str, judge: str) -> Row:
    comparison, reading = judged.comparison, judged.reading
    shown = comparison.question, comparison.first.system, comparison.second.system
    if task == VERDICTS:
        assert reading is None or isinstance(reading, str)
        return asdict(Judgment(*shown, reading, judge))
    first, second = reading if isinstance(reading, tuple) else (None, None)
    return asdict(ScoredPair(*shown, first, second, judge))


def _identity(row: Row) -> tuple[str, str, str]:
    return str(row["question"]), str(row["first"]), str(row["second"])


def _total(values: Sequence[Any]) -> Any:
    return None if None in values else sum(values)


@contextmanager
def _turn(file: Path) -> Iterator[None]:
    lock = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
