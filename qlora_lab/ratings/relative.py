"""Scores relative to a reference system: a system's total in percent of the reference's, as the QLoRA study has it.

Both answers were shown together and got a score from 1 to 10 each. Totals are taken over both orders shown, and what is
uncertain is which questions were asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.bradley_terry import drawn_questions, interval
from qlora_lab.ratings.matches import Floats
from qlora_lab.ratings.scores import ScoredPair


@dataclass(frozen=True)
class RelativeScore:
    """Percent of the reference's score, with its 95 % interval over questions, and by which answer was shown first.

    `pairs` were read and count; `unread` could not be read. An order that was not shown is NaN.
    """

    system: str
    pairs: int
    unread: int
    questions: int
    percent: float
    low: float
    high: float
    reference_first: float
    system_first: float


def relative_scores(
    scores: Sequence[ScoredPair], reference: str, *, draws: int = 1000, seed: int = 0
) -> list[RelativeScore]:
    """Compare every system that was shown beside the reference, best first; other pairs do not count.

    Raises:
        DataError: the reference is in none of the pairs.
    """
    systems = {system for score in scores for system in (score.first, score.second)}
    if reference not in systems:
        raise DataError(unknown_name("--reference", reference, sorted(systems)))
    compared = []
    for system in sorted(systems - {reference}):
        its = [score for score in scores if {score.first, score.second} == {system, reference}]
        if its:
            compared.append(_relative(system, its, draws, seed))
    return sorted(compared, key=lambda score: -score.percent)


def _relative(system: str, scores: Sequence[ScoredPair], draws: int, seed: int) -> RelativeScore:
    questions = sorted({score.question for score in scores})
    place = {question: index for index, question in enumerate(questions)}
    totals = np.zeros((2, len(questions), 2))  # shown first, question, system and reference
    unread = 0
    for score in scores:
        if score.first_score is None or score.second_score is None:
            unread += 1
        elif score.first == system:
            totals[0, place[score.question]] += score.first_score, score.second_score
        else:
            totals[1, place[score.question]] += score.second_score, score.first_score
    percents = _percent(drawn_questions(len(questions), draws, seed) @ totals.sum(0))
    low, high = interval(percents[1:])
    system_first, reference_first = _percent(totals.sum(1))
    return RelativeScore(
        system,
        pairs=len(scores) - unread,
        unread=unread,
        questions=len(questions),
        percent=float(percents[0]),
        low=float(low),
        high=float(high),
        reference_first=float(reference_first),
        system_first=float(system_first),
    )


def _percent(totals: Floats) -> Floats:
    """Return the system's part of the reference's, in percent, of (..., 2) totals."""
    with np.errstate(invalid="ignore", divide="ignore"):
        percent: Floats = 100 * totals[..., 0] / totals[..., 1]
    return percent
