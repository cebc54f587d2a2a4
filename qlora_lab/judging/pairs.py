"""Which answers are compared: every pair of systems on every question that both answered, in both orders."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.answers import Answer, by_question, common_questions

BOTH, ONE = "both", "one"
ORDERS = (BOTH, ONE)


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question, in the order in which the judge sees them."""

    question: str
    category: str
    prompt: str
    first: Answer
    second: Answer

    @property
    def identity(self) -> tuple[str, str, str]:
        """What no two comparisons of a file of ratings share, however the judge was asked."""
        return self.question, self.first.system, self.second.system

    def __str__(self) -> str:
        return f"question {self.question}, {self.first.system} and {self.second.system}"


def comparisons(
    answers: Sequence[Answer], *, reference: str | None = None, orders: str = BOTH
) -> tuple[list[Comparison], list[str]]:
    """Return what is to be judged, question by question, and sentences about answers that have no counterpart.

    Args:
        reference: compare the other systems with this one only.
        orders: `both`, or `one` chosen at random by question and pair, always the same.

    Raises:
        DataError: fewer than two systems, an unknown reference, no common question, or questions that differ between
            the systems or are not known.
    """
    systems = list(dict.fromkeys(answer.system for answer in answers))
    if len(systems) < 2:
        raise DataError(f"there must be answers of two systems or more; got {', '.join(systems) or 'none'}")
    if reference is not None and reference not in systems:
        raise DataError(unknown_name("--reference", reference, systems))
    pairs = [pair for pair in combinations(systems, 2) if reference is None or reference in pair]
    found = by_question(answers)
    chosen, warnings = [], []
    for pair in pairs:
        common = set(common_questions(answers, pair))
        for one, other in (pair, pair[::-1]):
            missing = [question for question, told in found.items() if one in told and question not in common]
            if missing:
                warnings.append(
                    f"{len(missing)} answers of {one} have no counterpart by {other} and are left out (such as to "
                    f"question {missing[0]})"
                )
        if not common:
            raise DataError(f"{pair[0]} and {pair[1]} have answered no question in common")
        for question in (question for question in found if question in common):
            chosen += _shown(found[question][pair[0]], found[question][pair[1]], orders)
    place = {question: number for number, question in enumerate(found)}
    return sorted(chosen, key=lambda comparison: place[comparison.question]), warnings


def one_sided(judged: Iterable[tuple[str, str, str]]) -> int:
    """Count the comparisons (question, first, second) that are there in one order only."""
    there = set(judged)
    return sum((question, second, first) not in there for question, first, second in there)


def _shown(one: Answer, other: Answer, orders: str) -> list[Comparison]:
    asked = {answer.prompt.strip() for answer in (one, other) if answer.prompt.strip()}
    if len(asked) != 1:
        problem = (
            "is another one for" if asked else "is not known: give the file of questions with --questions; it is of"
        )
        raise DataError(f"question {one.question} {problem} {one.system} and {other.system}")
    prompt, category = asked.pop(), one.category or other.category
    both = [Comparison(one.question, category, prompt, *shown) for shown in ((one, other), (other, one))]
    if orders == BOTH:
        return both
    names = sorted((one.system, other.system))
    coin = hashlib.sha256("\n".join((one.question, *names)).encode()).digest()[0] % 2
    return [comparison for comparison in both if (comparison.first.system == names[coin])]
