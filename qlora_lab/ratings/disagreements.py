"""Where two raters differ: every question and pair that both judged, the largest differences first."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from qlora_lab.ratings.judgments import Judgment
from qlora_lab.ratings.matches import SCORES


@dataclass(frozen=True)
class Case:
    """One question and pair; `one` and `other` are what share the pair's first system got from either, 0 to 1.

    A share is the mean over verdicts (both orders, several people), with a tie half a win each.
    """

    question: str
    pair: tuple[str, str]
    one: float
    other: float

    @property
    def gap(self) -> float:
        return abs(self.one - self.other)

    @property
    def opposite(self) -> bool:
        """Whether the two prefer different systems."""
        return (self.one - 0.5) * (self.other - 0.5) < 0


def cases(one: Iterable[Judgment], other: Iterable[Judgment]) -> list[Case]:
    """Return what both judged, from the largest difference to the smallest; equal ones by question."""
    mine, theirs = _shares(one), _shares(other)
    both = [Case(item[0], (item[1], item[2]), mine[item], theirs[item]) for item in mine if item in theirs]
    return sorted(both, key=lambda case: (-case.gap, by_number(case.question), case.pair))


def by_number(question: str) -> tuple[int, str]:
    """Return what sorts questions: by their numbers, and those without one after them by name."""
    return (int(question), "") if question.isdigit() else (sys.maxsize, question)


def _shares(judgments: Iterable[Judgment]) -> dict[tuple[str, str, str], float]:
    scores: dict[tuple[str, str, str], list[float]] = {}
    for judgment in judgments:
        if judgment.verdict is not None:
            of_first_shown = SCORES[judgment.verdict]
            share = of_first_shown if judgment.first == judgment.pair[0] else 1 - of_first_shown
            scores.setdefault((judgment.question, *judgment.pair), []).append(share)
    return {item: sum(shares) / len(shares) for item, shares in scores.items()}
