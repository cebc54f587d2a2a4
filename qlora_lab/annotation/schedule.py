"""Which pairs of answers a study compares, and in which order an annotator sees them.

Everything is drawn from hashes of the seed and the names, so that it comes out the same wherever it is computed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.answers import Answer, Question, by_question

MOST_REPEATS = 0.5  # a repeat comes half a sequence after its first showing, so only the first half can be repeated


@dataclass(frozen=True)
class Comparison:
    """Two systems' answers to one question; the systems in alphabetical order."""

    question: str
    systems: tuple[str, str]


@dataclass(frozen=True)
class Item:
    """A comparison as an annotator sees it; `repeat` where it is shown for the second time."""

    question: str
    first: str
    second: str
    repeat: bool = False


def asked(answers: Iterable[Answer]) -> dict[str, Question]:
    """Return what was asked, by the question's id.

    Raises:
        DataError: no answer says what was asked, or two say different things.
    """
    found: dict[str, Question] = {}
    for answer in answers:
        known = found.setdefault(answer.question, Question(answer.question, answer.category, answer.prompt))
        if answer.prompt and known.prompt and answer.prompt.strip() != known.prompt.strip():
            raise DataError(
                f"question {answer.question} is {known.prompt[:60]!r} in one file and {answer.prompt[:60]!r} in the "
                f"answer of {answer.system}; answers to different prompts cannot be compared"
            )
        prompt, category = known.prompt or answer.prompt, known.category or answer.category
        found[answer.question] = Question(answer.question, category, prompt)
    without = [question for question, its in found.items() if not its.prompt]
    if without:
        raise DataError(
            f"no file says what was asked in question {', '.join(without[:5])}; give the questions with --questions"
        )
    return found


def comparisons(
    answers: Iterable[Answer], *, against: str | None = None, limit: int | None = None, seed: int = 0
) -> list[Comparison]:
    """Return the pairs to compare: every two answers to one question.

    Args:
        against: keep only pairs with this system.
        limit: keep so many pairs, spread evenly over the pairs of systems.

    Raises:
        DataError: no question is answered by two systems, or `against` is not among them.
    """
    answered = by_question(answers)
    systems = sorted({system for found in answered.values() for system in found})
    if against is not None and against not in systems:
        raise DataError(unknown_name("--against", against, systems))
    groups = {
        pair: [Comparison(question, pair) for question, found in answered.items() if set(pair) <= set(found)]
        for pair in combinations(systems, 2)
        if against in (None, *pair)
    }
    ranked = [
        (rank, draw(seed, "pair", *comparison.systems), comparison)
        for group in groups.values()
        for rank, comparison in enumerate(drawn(group, seed, "choose"))
    ]
    chosen = [comparison for *_, comparison in sorted(ranked, key=lambda entry: entry[:2])][:limit]
    if not chosen:
        raise DataError(f"no question is answered by two of {', '.join(systems) or 'no systems'}; nothing to compare")
    return chosen


def unanswered(answers: Iterable[Answer]) -> list[str]:
    """Say which systems lack answers that others have: their pairs are fewer."""
    answered = by_question(answers)
    counts = Counter(system for found in answered.values() for system in found)
    return [
        f"{system} answers {count} of {len(answered)} questions"
        for system, count in sorted(counts.items())
        if count < len(answered)
    ]


def items_for(
    chosen: Sequence[Comparison], annotator: str, number: int, *, repeat: float = 0.0, seed: int = 0
) -> list[Item]:
    """Return what an annotator sees, in order.

    Of each pair of systems, one is shown first in half of its comparisons, and each comparison is shown in both orders
    to as many annotators (both up to one). A repeat shows a comparison again in the other order, half a sequence later.

    Args:
        annotator: the name; another one gets another sequence.
        number: how many annotators were there before.
        repeat: share of the comparisons to show twice, 0 to MOST_REPEATS.
    """
    ranks: Counter[tuple[str, str]] = Counter()
    items = {}
    for comparison in drawn(chosen, seed, "order"):
        turn = draw(seed, "pair", *comparison.systems) + ranks[comparison.systems] + number
        first, second = comparison.systems[:: 1 if turn % 2 == 0 else -1]
        items[comparison] = Item(comparison.question, first, second)
        ranks[comparison.systems] += 1
    sequence = drawn(chosen, seed, "sequence", annotator)
    again = set(drawn(sequence[: (len(sequence) + 1) // 2], seed, "repeat", annotator)[: round(repeat * len(sequence))])
    shown: list[Item] = []
    for index, comparison in enumerate(sequence):
        shown.append(items[comparison])
        earlier = sequence[index - len(sequence) // 2]
        if index >= len(sequence) // 2 and earlier in again:
            item = items[earlier]
            shown.append(replace(item, first=item.second, second=item.first, repeat=True))
    return shown


def drawn(these: Iterable[Comparison], seed: int, *purpose: str) -> list[Comparison]:
    """Return comparisons in an order drawn for a purpose."""
    return sorted(these, key=lambda one: draw(seed, *purpose, one.question, *one.systems))


def draw(seed: int, *names: str) -> int:
    """Return a 64-bit number drawn for some names."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest())
