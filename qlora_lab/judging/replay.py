"""Published ratings in place of a judge: the study's release, or files of this project; nothing is asked."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.judging.pairs import Comparison
from qlora_lab.judging.prompts import VERDICTS
from qlora_lab.judging.settings import JudgeConfig
from qlora_lab.ratings.files import AnswerFiles, files_in, read_ratings
from qlora_lab.ratings.judgments import Judgment, json_rows
from qlora_lab.ratings.scores import ScoredPair

Row = dict[str, Any]
KEPT = (
    "text",
    "review_id",
    "category",
    "model",
    "judge_sha256",
    "sampling",
    "prompt_sha256",
    "date",
    "finish_reason",
    "reminded",
)


def published_rows(config: JudgeConfig, task: str, systems_of_ids: dict[str, set[str]]) -> list[Row]:
    """Return the ratings of one judge as lines of a file of ratings, verdicts that were not read read again.

    Args:
        systems_of_ids: the systems of the answers' ids, as far as they are known; see `ratings.released`.

    Raises:
        DataError: a file is missing or has no ratings of this task, or they are of several judges and none is chosen.
    """
    known = AnswerFiles(systems_of_ids=systems_of_ids)
    rows = [row for file in files_in(map(Path, config.ratings), ".jsonl") for row in _rows(file, task, known)]
    if not rows:
        raise DataError(f"{', '.join(config.ratings)} have no {task}; choose other ratings, or another --task")
    judges = sorted({row["judge"] for row in rows})
    chosen = config.model or (judges[0] if len(judges) == 1 else "")
    if not chosen:
        raise DataError(f"the ratings are of {len(judges)} judges ({', '.join(judges)}); choose with --set model=NAME")
    if chosen not in judges:
        raise DataError(unknown_name("model", chosen, judges))
    its = [row | {"judge": config.name or chosen} for row in rows if row["judge"] == chosen]
    if len({row.get("judge_sha256") for row in its}) > 1:
        raise DataError(f"several judges are called {chosen} in {', '.join(config.ratings)}; replay them apart")
    return its


def matching(rows: Sequence[Row], comparisons: Iterable[Comparison]) -> tuple[list[Row], int]:
    """Return the rows of these comparisons, and how many comparisons have none."""
    wanted = {comparison.identity for comparison in comparisons}
    found = [row for row in rows if (row["question"], row["first"], row["second"]) in wanted]
    return found, len(wanted - {(row["question"], row["first"], row["second"]) for row in found})


def _rows(file: Path, task: str, known: AnswerFiles) -> list[Row]:
    wanted = Judgment if task == VERDICTS else ScoredPair
    return [
        asdict(rating) | {name: row[name] for name in KEPT if name in row}
        for rating, (row, _) in zip(read_ratings(file, known), json_rows(file), strict=True)
        if isinstance(rating, wanted)
    ]
