"""Answers of systems to questions, which judges and people compare, and the JSON lines in which they are kept.

A line is an object with `question` (its id), `category`, `prompt` (what was asked), `answer` and `system`; what else it
has (settings, stop reason) is left alone. Two layouts of the QLoRA study's release (github.com/artidoro/qlora,
eval/generations) are read as well: generations, and answers of other services, whose file names the system.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import json_rows
from qlora_lab.ratings.released import question_of, shown_text, system_named

FIELDS = ("question", "category", "prompt", "answer", "system")


@dataclass(frozen=True)
class Question:
    """A prompt that every system gets."""

    question: str  # its id
    category: str  # "" where the set has none
    prompt: str


@dataclass(frozen=True)
class Answer:
    """What one system says to one question; `prompt` is "" where the file does not tell what was asked."""

    question: str
    category: str
    prompt: str
    answer: str
    system: str


def answer_line(answer: Answer) -> dict[str, str]:
    """Return the fields of an answer's line, for `json.dumps`."""
    return asdict(answer)


def read_questions(file: Path) -> dict[str, Question]:
    """Read a file of JSON lines as `questions_of` does."""
    return questions_of(json_rows(file))


def questions_of(rows: Iterable[tuple[Mapping[str, object], str]]) -> dict[str, Question]:
    """Return questions by id: this project's, the study's (`text`), or FastChat's (`turns`, the first counts).

    Args:
        rows: and where each stands, for errors.

    Raises:
        DataError: a row is none, or an id comes twice; the sentence names its place.
    """
    questions: dict[str, Question] = {}
    for row, place in rows:
        identifier = question_of(row)
        turns = row.get("turns")
        first_turn = turns[0] if isinstance(turns, list) and turns else None
        prompt = row.get("text", row.get("prompt", first_turn))
        if identifier is None or not isinstance(prompt, str):
            raise DataError(
                f"{place} must have a question (or question_id) and a prompt (or text, or turns); got {', '.join(row)}"
            )
        if str(identifier) in questions:
            raise DataError(f"{place}: question {identifier} comes twice; a question's id must be its own")
        questions[str(identifier)] = Question(str(identifier), str(row.get("category") or ""), prompt)
    return questions


def read_answers(file: Path, questions: Mapping[str, Question] | None = None) -> list[Answer]:
    """Read one file of answers.

    Args:
        questions: fill in category and prompt where the file has none.

    Raises:
        DataError: a line is no answer, or a question is answered twice by one system; names file and line.
    """
    answers: dict[tuple[str, str], Answer] = {}
    for row, place in json_rows(file):
        answer = _answer(row, file, place, questions or {})
        if (answer.system, answer.question) in answers:
            raise DataError(f"{place}: {answer.system} answers question {answer.question} twice")
        answers[answer.system, answer.question] = answer
    return list(answers.values())


def by_question(answers: Iterable[Answer]) -> dict[str, dict[str, Answer]]:
    """Return the answers of every system by question, both in the order they come."""
    found: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        found.setdefault(answer.question, {})[answer.system] = answer
    return found


def common_questions(answers: Iterable[Answer], systems: Sequence[str]) -> list[str]:
    """Return the questions that every one of `systems` has answered."""
    return [question for question, found in by_question(answers).items() if all(name in found for name in systems)]


def _answer(row: dict[str, object], file: Path, place: str, questions: Mapping[str, Question]) -> Answer:
    if "generation" in row:  # the release's own models: `text` is the question
        told = {"answer": shown_text(row), "prompt": row.get("text"), "system": system_named(file.stem)}
    elif "answer_id" in row:  # its other services: `text` is the answer
        told = {"answer": row.get("text"), "prompt": None, "system": system_named(file.stem)}
    else:
        told = {name: row.get(name) for name in ("answer", "prompt", "system")}
    identifier = question_of(row)
    if identifier is None or told["system"] is None or not isinstance(told["answer"], str):
        raise DataError(f"{place} must have {', '.join(FIELDS)}; got {', '.join(row)}")
    asked = questions.get(str(identifier), Question(str(identifier), "", ""))
    return Answer(
        question=str(identifier),
        category=str(row.get("category") or asked.category),
        prompt=str(told["prompt"] or asked.prompt),
        answer=told["answer"],
        system=str(told["system"]),
    )
