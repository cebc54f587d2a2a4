"""Judges compared: verdict by verdict, and by the ranking of systems that they lead to.

An item is a question and a pair of systems. A judge who saw a pair in both orders has one verdict on it: the winner
where both orders have the same, else a tie. What is uncertain is which questions were asked: 95 % intervals come from
drawing them again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lab.ratings.agreement import (
    agreed,
    agreeing_pairs,
    alpha_of,
    cohen_of,
    coincidences,
    fleiss_of,
    kendall_tau,
    spearman_rho,
)
from qlora_lab.ratings.bradley_terry import Interval, check_connected, drawn_questions, interval
from qlora_lab.ratings.judgments import Judgment, majority
from qlora_lab.ratings.logistic import Rows, fit
from qlora_lab.ratings.matches import Floats, Matches, matches_of

CLASSES = 3  # the second of a pair wins, tie, the first wins: in this order they are ranks
Votes = Mapping[tuple[str, str, str], int]  # class by question and pair


@dataclass(frozen=True)
class ItemAgreement:
    """Agreement of raters on single items, each measure with its interval over questions; NaN where it has no value.

    `raters` is 2 for two judges; of a group, the number that most items have: Fleiss' kappa is of those `fleiss_items`.
    `same` is the share of equal verdicts, of pairs of raters in a group. Cohen's kappa is of two raters only.
    """

    items: int
    questions: int
    raters: int
    fleiss_items: int
    same: Interval
    cohen: Interval | None
    fleiss: Interval
    alpha_nominal: Interval
    alpha_ordinal: Interval


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of the Bradley-Terry ratings of the same systems, with intervals over questions."""

    systems: int
    questions: int
    kendall_tau: Interval
    spearman_rho: Interval


def verdicts(judgments: Iterable[Judgment]) -> Votes:
    """Return the class of each question and pair, a judge's orders or people's votes taken together."""
    return {(judgment.question, *judgment.pair): _class(judgment) for judgment in majority(judgments)}


def verdicts_as_shown(judgments: Sequence[Judgment]) -> Votes:
    """Return the class of each question, pair and order shown, people's votes taken together.

    It says whether what was shown first wins, as the study counts.
    """
    straight, swapped = (majority(side) for side in both_orders(judgments))
    return {(judgment.question, *judgment.pair): _class(judgment) for judgment in straight} | {
        (judgment.question, *judgment.pair[::-1]): CLASSES - 1 - _class(judgment) for judgment in swapped
    }


def compare_two(one: Votes, other: Votes, *, draws: int = 1000, seed: int = 0) -> ItemAgreement | None:
    """Compare two raters on the items of both; None where there is none."""
    items = [item for item in one if item in other]
    if not items:
        return None
    questions, place = _questions(items)
    tables = np.zeros((len(questions), CLASSES, CLASSES))
    np.add.at(tables, (place, [one[item] for item in items], [other[item] for item in items]), 1.0)
    weighted = _weighted(draws, seed, tables)
    return ItemAgreement(
        items=len(items),
        questions=len(questions),
        raters=2,
        fleiss_items=len(items),
        same=_interval(agreed(weighted)),
        cohen=_interval(cohen_of(weighted)),
        fleiss=_interval(fleiss_of(np.trace(weighted, axis1=1, axis2=2), weighted.sum(1) + weighted.sum(2), raters=2)),
        alpha_nominal=_interval(alpha_of(weighted + weighted.transpose(0, 2, 1), ordinal=False)),
        alpha_ordinal=_interval(alpha_of(weighted + weighted.transpose(0, 2, 1), ordinal=True)),
    )


def compare_group(votes: Iterable[Judgment], *, draws: int = 1000, seed: int = 0) -> ItemAgreement | None:
    """Compare all raters of a group with each other, on items that two or more rated; None where there is none."""
    of_rater: dict[str, list[Judgment]] = {}
    for vote in votes:
        of_rater.setdefault(vote.judge, []).append(vote)
    counted: dict[tuple[str, str, str], Floats] = {}
    for its in of_rater.values():
        for item, its_class in verdicts(its).items():  # one each, also of who saw both orders
            counted.setdefault(item, np.zeros(CLASSES))[its_class] += 1
    items = [item for item, its in counted.items() if its.sum() >= 2]
    if not items:
        return None
    counts = np.array([counted[item] for item in items])
    raters, fleiss_items = Counter(counts.sum(1)).most_common(1)[0]
    questions, place = _questions(items)
    whole = counts.sum(1) == raters
    together, agreeing, of_fleiss, shares, ones = (
        _weighted(draws, seed, _by_question(values, place, len(questions)))
        for values in (
            coincidences(counts),
            np.where(whole, agreeing_pairs(counts), 0.0),
            np.where(whole[:, None], counts, 0.0),
            agreeing_pairs(counts),
            np.ones(len(items)),
        )
    )
    with np.errstate(invalid="ignore"):
        same = shares / ones
    return ItemAgreement(
        items=len(items),
        questions=len(questions),
        raters=int(raters),
        fleiss_items=int(fleiss_items),
        same=_interval(same),
        cohen=None,
        fleiss=_interval(fleiss_of(agreeing, of_fleiss, float(raters))),
        alpha_nominal=_interval(alpha_of(together, ordinal=False)),
        alpha_ordinal=_interval(alpha_of(together, ordinal=True)),
    )


def compare_rankings(
    one: Sequence[Judgment], other: Sequence[Judgment], *, draws: int = 1000, seed: int = 0
) -> RankAgreement | None:
    """Compare the ratings that two judges lead to, of the systems of both; None where those are fewer than three.

    People's votes are made their majority before; `one` and `other` have one judge each.

    Raises:
        DataError: one of them allows no ratings.
    """
    systems = {name for judgment in one for name in judgment.pair} & {name for its in other for name in its.pair}
    sides = [[judgment for judgment in side if systems >= {*judgment.pair}] for side in (one, other)]
    if len(systems) < 3:
        return None
    matches = [matches_of(side) for side in sides]
    questions = sorted({question for side in matches for question in side.questions})
    weights = drawn_questions(len(questions), draws, seed)
    ratings = [_ratings(side, weights[:, [questions.index(name) for name in side.questions]]) for side in matches]
    return RankAgreement(
        len(systems), len(questions), _interval(kendall_tau(*ratings)), _interval(spearman_rho(*ratings))
    )


def both_orders(judgments: Sequence[Judgment]) -> tuple[list[Judgment], list[Judgment]]:
    """Return a judge's judgments with the alphabetically first system shown first, and the others."""
    return (
        [judgment for judgment in judgments if judgment.first == judgment.pair[0]],
        [judgment for judgment in judgments if judgment.first != judgment.pair[0]],
    )


def _ratings(matches: Matches, weights: Floats) -> Floats:
    check_connected(matches)
    covariates = [np.ones(len(matches))] if matches.in_both_orders() else []
    return fit(Rows.of(matches, covariates, by_match=False), weights)[0]


def _class(judgment: Judgment) -> int:
    return 1 if judgment.winner is None else 2 * (judgment.winner == judgment.pair[0])


def _questions(items: Sequence[tuple[str, str, str]]) -> tuple[list[str], list[int]]:
    questions = sorted({item[0] for item in items})
    number = {question: index for index, question in enumerate(questions)}
    return questions, [number[item[0]] for item in items]


def _by_question(values: Floats, place: Sequence[int], questions: int) -> Floats:
    summed = np.zeros((questions, *values.shape[1:]))
    np.add.at(summed, place, values)
    return summed


def _weighted(draws: int, seed: int, by_question: Floats) -> Floats:
    """Return sums over drawn questions, (1 + draws, ...); the first is of each question once."""
    return np.tensordot(drawn_questions(len(by_question), draws, seed), by_question, axes=1)


def _interval(values: Floats) -> Interval:
    """Return the first value, and the ends of the interval of the others that have one."""
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = interval(drawn) if len(drawn) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)
