"""Published ratings in place of a judge: the study's release, or files of this project; nothing is asked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.judging.pairs import Comparison
from qlora_lab.judging.prompts import VERDICTS
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.ratings.files import files_in
from qlora_lab.ratings.judgments import json_rows, read_judgments
from qlora_lab.ratings.released import (
    answer_systems,
    is_released,
    is_released_scores,
    read_released,
    read_released_scores,
)
from qlora_lab.ratings.scores import read_scores

Row = dict[str, Any]
KEPT = ("text", "review_id", "category", "model", "sampling", "prompt_sha256", "date", "finish_reason", "reminded")


def published_rows(config: JudgeConfig, task: str, answers: Iterable[Path]) -> list[Row]:
    """Return the ratings of one judge as lines of a file of ratings, verdicts that were not read read again.

    Args:
        answers: files that may tell the systems of the answers' ids; see `ratings.released`.

    Raises:
        DataError: a file is missing or none of ratings, or they are of several judges and none is chosen.
    """
    ids = answer_systems(answers)
    rows = [row for file in files_in(map(Path, config.ratings), ".jsonl") for row in _rows(file, task, ids)]
    judges = sorted({row["judge"] for row in rows})
    chosen = config.model or (judges[0] if len(judges) == 1 else "")
    if not chosen:
        raise DataError(f"the ratings are of {len(judges)} judges ({', '.join(judges)}); choose with --set model=NAME")
    if chosen not in judges:
        raise DataError(unknown_name("model", chosen, judges))
    return [row | {"judge": config.name or chosen} for row in rows if row["judge"] == chosen]


def matching(rows: Sequence[Row], comparisons: Iterable[Comparison]) -> tuple[list[Row], int]:
    """Return the rows of these comparisons, and how many comparisons have none."""
    wanted = {comparison.identity for comparison in comparisons}
    found = [row for row in rows if (row["question"], row["first"], row["second"]) in wanted]
    return found, len(wanted - {(row["question"], row["first"], row["second"]) for row in found})


def _rows(file: Path, task: str, ids: Mapping[str, set[str]]) -> list[Row]:
    return [
        asdict(rating) | {name: row[name] for name in KEPT if name in row}
        for rating, (row, _) in zip(_read(file, task, ids), json_rows(file), strict=True)
    ]


def _read(file: Path, task: str, ids: Mapping[str, set[str]]) -> Sequence[Any]:
    """Return judgments or scored pairs, of the release with the systems that its answers' ids tell."""
    if task != VERDICTS:
        return read_released_scores(file, ids) if is_released_scores(file) else read_scores(file)
    return read_released(file, ids) if is_released(file) else read_judgments(file)
