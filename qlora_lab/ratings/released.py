"""GPT-4's reviews in the layout of the QLoRA study's release (github.com/artidoro/qlora, eval/ratings-gpt4).

A file has one review a line: the question's id (`question_id`, in the OpenAssistant set `message_id`), the ids of the
two answers in the order shown, the judge's `text`, and `score`. FIRST-vs-SECOND-JUDGE-reviewer-threeclass.jsonl holds
verdicts: 1 the first is better, 2 the second, 3 a tie, -1 unread. FIRST-vs-SECOND-JUDGE-reviewer.jsonl holds pairs of
scores from 1 to 10, [-1, -1] where they are unread.

Many file names state the order backwards, so answer ids decide where they are known. The id of an answer of the study's
own models is a hash of the text that was shown, so that files of generations tell all of them.
"""

import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment, json_rows
from qlora_lab.ratings.scores import ScoredPair
from qlora_lab.ratings.verdicts import three_class_verdict

NAME = re.compile(
    r"(?P<first>.+)-vs-(?P<second>.+?)-gpt-?(?P<version>[\d.]+)[-_]reviewer(?P<three_class>[-_]threeclass)?$"
)
VERDICT_OF_SCORE = {1: FIRST, 2: SECOND, 3: TIE}
UNREAD = -1
OTHER_NAMES = {"gpt-3.5": "gpt35", "gpt-4": "gpt4"}  # in files of the OpenAssistant set and of scores
NEXT_TURN = "A chat between a curious human and an artificial intelligence"  # a model that goes on; judges never saw it
SHORT_UUID_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
SHORT_UUID_LENGTH = 22


def is_released(file: Path) -> bool:
    parts = NAME.match(file.stem)
    return parts is not None and parts["three_class"] is not None


def is_released_scores(file: Path) -> bool:
    parts = NAME.match(file.stem)
    return parts is not None and parts["three_class"] is None


def read_released(file: Path, answers: Mapping[str, set[str]], *, reparse: bool = True) -> list[Judgment]:
    """Read a file of three-class reviews.

    Args:
        answers: the systems that may have given the answer of each id; see `answer_systems`.
        reparse: read verdicts that the release could not read from the judge's text.

    Raises:
        DataError: the name or a line is not of the layout; the sentence names file and line.
    """
    judgments = []
    for row, place, (first, second), judge in _reviews(file, answers):
        score = row["score"]
        if isinstance(score, bool) or score not in (*VERDICT_OF_SCORE, UNREAD):
            raise DataError(f"{place}: score must be 1, 2, 3 or -1; got {score!r}")
        verdict = VERDICT_OF_SCORE.get(int(str(score)))
        if verdict is None and reparse:
            verdict = three_class_verdict(str(row.get("text", "")))
        judgments.append(Judgment(question_of(row) or "", first, second, verdict, judge))
    return judgments


def read_released_scores(file: Path, answers: Mapping[str, set[str]]) -> list[ScoredPair]:
    """Read a file of reviews with two scores; see `read_released`.

    Raises:
        DataError: the name or a line is not of the layout; the sentence names file and line.
    """
    scored = []
    for row, place, (first, second), judge in _reviews(file, answers):
        pair = row["score"]
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(score, int | float) for score in pair):
            raise DataError(f"{place}: score must be a list of two numbers, [-1, -1] where unread; got {pair!r}")
        read = None not in pair and min(pair) >= 0
        its, others = (float(pair[0]), float(pair[1])) if read else (None, None)
        scored.append(ScoredPair(question_of(row) or "", first, second, its, others, judge))
    return scored


def answer_systems(files: Iterable[Path]) -> dict[str, set[str]]:
    """Return the systems of every answer id in files of generations, where the system is the file's name.

    Systems that gave the very same text have one id.
    """
    systems: dict[str, set[str]] = {}
    for file in files:
        for row, _ in json_rows(file):
            if "answer_id" in row:
                systems.setdefault(str(row["answer_id"]), set()).add(system_named(file.stem))
            elif "generation" in row:
                systems.setdefault(_id_of_text(shown_text(row)), set()).add(system_named(file.stem))
    return systems


def system_named(stem: str) -> str:
    """Return the short name of a system: of a file of generations, without what all of them have in theirs."""
    name = re.sub(r"-(vicuna|oa)-generations.*$", "", stem)
    name = re.sub(r"^answer[-_]", "", name).replace("_", "-")
    return OTHER_NAMES.get(name, name)


def shown_text(row: Mapping[str, object]) -> str:
    """Return what judges saw of a generation of the study's own models: cut where the model starts another turn."""
    return str(row.get("generation_truncated", row["generation"])).split(NEXT_TURN)[0]


def question_of(row: Mapping[str, object]) -> str | None:
    """Return the id of the question that a line is about, in this project's layout or the study's."""
    found = next((row[key] for key in ("question", "question_id", "message_id") if key in row), None)
    return None if found is None else str(found)


def _reviews(
    file: Path, answers: Mapping[str, set[str]]
) -> Iterable[tuple[dict[str, object], str, tuple[str, str], str]]:
    """Yield each line, where it stands, the systems in the order shown, and the judge."""
    parts = NAME.match(file.stem)
    if parts is None:
        raise DataError(f"{file} must be called FIRST-vs-SECOND-JUDGE-reviewer[-threeclass].jsonl")
    named = system_named(parts["first"]), system_named(parts["second"])
    for row, place in json_rows(file):
        missing = [key for key in ("answer1_id", "answer2_id", "score") if key not in row]
        if missing or question_of(row) is None:
            raise DataError(
                f"{place} must have question_id, answer1_id, answer2_id and score; got no "
                f"{', '.join(missing or ['question_id'])}"
            )
        ids = str(row["answer1_id"]), str(row["answer2_id"])
        yield row, place, _shown(named, ids, answers, place), f"gpt-{parts['version']}"


def _shown(
    named: tuple[str, str], ids: tuple[str, str], answers: Mapping[str, set[str]], place: str
) -> tuple[str, str]:
    """Return the systems in the order shown: by the answers' ids, else as the file's name says."""
    known = tuple(answers.get(identifier) for identifier in ids)
    for shown in (named, (named[1], named[0])):
        if all(systems is None or said in systems for systems, said in zip(known, shown, strict=True)):
            return shown
    of = " and ".join("nobody known" if systems is None else " or ".join(sorted(systems)) for systems in known)
    raise DataError(f"{place}: the answers are of {of}, but the file is about {' and '.join(named)}")


def _id_of_text(text: str) -> str:
    """Return the id that the release gives an answer: shortuuid's of the name-based UUID of the text."""
    is_address = text.lower().startswith(("http://", "https://"))
    number = uuid.uuid5(uuid.NAMESPACE_URL if is_address else uuid.NAMESPACE_DNS, text).int
    digits = ""
    while number:
        number, digit = divmod(number, len(SHORT_UUID_DIGITS))
        digits = SHORT_UUID_DIGITS[digit] + digits
    return digits.rjust(SHORT_UUID_LENGTH, SHORT_UUID_DIGITS[0])
