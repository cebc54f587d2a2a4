"""Reviews in the layout of the QLoRA study's release (github.com/artidoro/qlora, eval/ratings-gpt4).

A file is called FIRST-vs-SECOND-JUDGE-reviewer-threeclass.jsonl and has one review a line: `question_id`, the ids of
the two answers in the order shown, the judge's `text`, and `score`: 1 the first is better, 2 the second, 3 a tie, -1
the verdict could not be read. Some file names state the order backwards, so answer ids decide where they are known.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment, json_rows
from qlora_lab.ratings.verdicts import three_class_verdict

NAME = re.compile(r"(?P<first>.+)-vs-(?P<second>.+?)-(?P<judge>gpt-?[\d.]+)-reviewer-threeclass$")
SCORES = {1: FIRST, 2: SECOND, 3: TIE}
UNREAD = -1


def is_released(file: Path) -> bool:
    return NAME.match(file.stem) is not None


def read_released(file: Path, answers: Mapping[str, str], *, reparse: bool = True) -> list[Judgment]:
    """Read a file of reviews.

    Args:
        answers: the system of each answer id that is known; see `answer_systems`.
        reparse: read verdicts that the release could not read from the judge's text.

    Raises:
        DataError: the name or a line is not of the layout; the sentence names file and line.
    """
    parts = NAME.match(file.stem)
    if parts is None:
        raise DataError(f"{file} must be called FIRST-vs-SECOND-JUDGE-reviewer-threeclass.jsonl")
    named = system_named(parts["first"]), system_named(parts["second"])
    judgments = []
    for row, place in json_rows(file):
        try:
            question, score = str(row["question_id"]), row["score"]
            ids = str(row["answer1_id"]), str(row["answer2_id"])
        except KeyError as error:
            raise DataError(f"{place} must have question_id, answer1_id, answer2_id and score; no {error}") from error
        if score not in (*SCORES, UNREAD):
            raise DataError(f"{place}: score must be 1, 2, 3 or -1; got {score!r}")
        verdict = SCORES.get(score)
        if verdict is None and reparse:
            verdict = three_class_verdict(str(row.get("text", "")))
        first, second = _shown(named, ids, answers, place)
        judgments.append(Judgment(question, first, second, verdict, parts["judge"]))
    return judgments


def answer_systems(files: Iterable[Path]) -> dict[str, str]:
    """Return the system of every answer id in files of generations, where the system is the file's name."""
    systems = {}
    for file in files:
        for row, _ in json_rows(file):
            if "answer_id" in row:
                systems[str(row["answer_id"])] = system_named(file.stem)
    return systems


def _shown(named: tuple[str, str], ids: tuple[str, str], answers: Mapping[str, str], place: str) -> tuple[str, str]:
    """Return the systems in the order shown: by the answers' ids, else as the file's name says."""
    known = tuple(answers.get(identifier) for identifier in ids)
    for shown in (named, named[::-1]):
        if all(system in (None, said) for system, said in zip(known, shown, strict=True)):
            return shown
    raise DataError(
        f"{place}: the answers are of {known[0]} and {known[1]}, but the file is about {' and '.join(named)}"
    )


def system_named(stem: str) -> str:
    """Return the short name of a system: of a file of generations, without what all of them have in theirs."""
    name = re.sub(r"-(vicuna|oa)-generations.*$", "", stem)
    return re.sub(r"^answer[-_]", "", name).replace("_", "-")
