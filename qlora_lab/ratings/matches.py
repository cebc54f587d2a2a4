"""Judgments as arrays, which is what ratings are worked out from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment

SCORES = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Matches:
    """N matches between S systems over Q questions.

    `first`, `second` and `question` are (N,) indices into `systems` and `questions`; `score` is (N,), what the system
    shown first got: 1 for a win, 0.5 for a tie, 0 for a loss.
    """

    systems: tuple[str, ...]
    questions: tuple[str, ...]
    first: Ints
    second: Ints
    question: Ints
    score: Floats

    def __len__(self) -> int:
        return len(self.score)

    def in_both_orders(self) -> bool:
        """Tell whether a pair was shown in both orders; if none was, being first looks like being better."""
        shown = {*zip(self.first.tolist(), self.second.tolist(), strict=True)}
        return any((second, first) in shown for first, second in shown)

    def cells(self) -> tuple[Floats, Floats]:
        """Return matches and scores of the first system per question and ordered pair, (Q, S, S) each."""
        shape = (len(self.questions), len(self.systems), len(self.systems))
        counts, scores = np.zeros(shape), np.zeros(shape)
        np.add.at(counts, (self.question, self.first, self.second), 1.0)
        np.add.at(scores, (self.question, self.first, self.second), self.score)
        return counts, scores


def matches_of(judgments: Sequence[Judgment]) -> Matches:
    """Return the judgments that have a verdict, systems and questions in alphabetical order.

    Matches are sorted too: ratings do not depend on which file a judgment came from.

    Raises:
        DataError: none has.
    """
    read = sorted(
        (judgment for judgment in judgments if judgment.verdict is not None),
        key=lambda judgment: (judgment.question, judgment.first, judgment.second, SCORES[judgment.verdict or TIE]),
    )
    if not read:
        raise DataError(f"ratings need at least one judgment with a verdict; got {len(judgments)} without")
    systems = sorted({system for judgment in read for system in judgment.pair})
    questions = sorted({judgment.question for judgment in read})
    number = {system: index for index, system in enumerate(systems)}
    place = {question: index for index, question in enumerate(questions)}
    return Matches(
        tuple(systems),
        tuple(questions),
        np.array([number[judgment.first] for judgment in read]),
        np.array([number[judgment.second] for judgment in read]),
        np.array([place[judgment.question] for judgment in read]),
        np.array([SCORES[judgment.verdict] for judgment in read if judgment.verdict is not None]),
    )
