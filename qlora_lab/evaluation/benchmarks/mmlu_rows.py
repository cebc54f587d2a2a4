"""MMLU's questions in the two schemas they come in.

On the hub (cais/mmlu) a row is question, subject, choices and answer (a number from 0). In the files of the QLoRA study
it is subject, input and output: the whole prompt, in the five-shot files with the worked examples, and the letter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_lab.data.records import BrokenRowError, kind_of, text_of

LETTERS = ("A", "B", "C", "D")
ANSWER = "\nAnswer:"
HEADER = re.compile(r"\AThe following are multiple choice questions.*?\n\n", re.DOTALL)
AFTER_AN_EXAMPLE = re.compile(r"(?<=\nAnswer: [ABCD])\n\n")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        subject: as the rows name it, such as high_school_biology.
        header: what begins the prompt, with its empty line.
        own_shots: worked examples that the row itself brings, each without the empty line after it.
        text: the question with its choices, up to and with "Answer:".
        answer: its letter.
    """

    subject: str
    header: str
    own_shots: tuple[str, ...]
    text: str
    answer: str

    @property
    def solved(self) -> str:
        """The question with its answer, as a worked example of others."""
        return f"{self.text} {self.answer}"


def question_of(columns: Mapping[str, Any], header: str) -> Question:
    """Return a row's question.

    Args:
        header: of a row that brings none; "{subject}" stands for the subject in words.

    Raises:
        BrokenRowError: the row is in neither schema, or names no letter.
    """
    subject = text_of(columns, "subject")
    header = header.replace("{subject}", subject.replace("_", " "))
    if "input" in columns:
        return _of_the_study(subject, text_of(columns, "input"), text_of(columns, "output").strip(), header)
    text = text_of(columns, "question").strip()
    choices = columns["choices"] if "choices" in columns else text_of(columns, "choices")
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise BrokenRowError(f"column 'choices' must hold a list of {len(LETTERS)} texts; got {kind_of(choices)}")
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    answer = columns["answer"] if "answer" in columns else text_of(columns, "answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        answer = LETTERS[answer]
    return Question(subject, header, (), text + lines + ANSWER, _letter(answer, "answer"))


def _of_the_study(subject: str, prompt: str, answer: str, header: str) -> Question:
    found = HEADER.match(prompt)
    body = prompt[found.end() :] if found else prompt
    *examples, text = AFTER_AN_EXAMPLE.split(body)
    if not text.endswith(ANSWER):
        raise BrokenRowError("column 'input' must end in a line 'Answer:'")
    return Question(subject, found[0] if found else header, tuple(examples), text, _letter(answer, "output"))


def _letter(given: Any, column: str) -> str:
    if given not in LETTERS:
        shown = f"'{given}'" if isinstance(given, str) else kind_of(given)
        numbers = f", or a number from 0 to {len(LETTERS) - 1}" if column == "answer" else ""
        raise BrokenRowError(f"column '{column}' must be one of {', '.join(LETTERS)}{numbers}; got {shown}")
    return str(given)
