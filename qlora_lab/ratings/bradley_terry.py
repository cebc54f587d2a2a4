"""Bradley-Terry ratings: the chance that i beats j is a logistic function of the difference of their ratings.

A tie is half a win for each. Unlike Elo's, these ratings do not depend on the order of matches, and what is uncertain
about them is which questions were asked: intervals come from drawing questions again, with replacement. What else moves
a judge, being shown first and being longer, can be fitted in the same regression, and is then taken out of the ratings.

Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs"; Hunter 2004 for when ratings exist; Dubois
et al. 2024, "Length-controlled AlpacaEval", for the covariate of length.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qlora_lab.errors import DataError
from qlora_lab.ratings.logistic import Rows, fit
from qlora_lab.ratings.matches import Floats, Ints, Matches

POINTS = 400 / np.log(10)  # a difference of 400 points is odds of 10 to 1, as in Elo
CENTRE = 1000.0  # mean rating of the systems
COVERAGE = 0.95
Interval = tuple[float, float, float]  # the estimate, and the ends of its 95 % interval


@dataclass(frozen=True)
class Ratings:
    """Ratings in points, (S,) each, with the ends of 95 % intervals and of the ranks (1 is best).

    `win_rate`, (S, 3), is the chance to beat the other systems, one as likely as another, with its interval: what is
    fitted besides (order, length) is taken out of it. `first_advantage` is what being shown first is worth in points,
    `length_effect` what being longer by a standard deviation of the differences of length is; None where not fitted.
    """

    systems: tuple[str, ...]
    rating: Floats
    low: Floats
    high: Floats
    best_rank: Floats
    worst_rank: Floats
    win_rate: Floats
    first_advantage: Interval | None
    length_effect: Interval | None


def bradley_terry(
    matches: Matches,
    *,
    draws: int = 1000,
    seed: int = 0,
    first_advantage: bool = True,
    longer: Floats | None = None,
) -> Ratings:
    """Rate the systems of `matches`.

    Args:
        draws: of questions, for the intervals.
        first_advantage: fit what being shown first is worth, and rate without it.
        longer: (N,), how much longer the answer shown first is, see `length_differences`; rate without its effect.

    Raises:
        DataError: some systems never lost to the others (or never met them), so that no finite ratings exist.
    """
    check_connected(matches)
    covariates = ([np.ones(len(matches))] if first_advantage else []) + ([] if longer is None else [longer])
    rows = Rows.of(matches, covariates, by_match=longer is not None)
    weights = drawn_questions(len(matches.questions), draws, seed)
    systems, effects = fit(rows, weights)
    points = CENTRE + POINTS * systems
    low, high = interval(points[1:])
    ranks = (points[1:, :, None] < points[1:, None, :]).sum(2) + 1.0
    best, worst = interval(ranks)
    wins = _chances(systems)
    return Ratings(
        matches.systems,
        points[0],
        low,
        high,
        np.floor(best),
        np.ceil(worst),
        np.stack([wins[0], *interval(wins[1:])], axis=1),
        first_advantage=_points(effects[:, 0]) if first_advantage else None,
        length_effect=None if longer is None else _points(effects[:, -1] * np.tanh(1.0)),
    )


def drawn_questions(questions: int, draws: int, seed: int) -> Floats:
    """Return how often each question counts, (1 + draws, questions): once each, then as often as it was drawn."""
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=draws)
    return np.concatenate([np.ones((1, questions)), drawn.astype(float)])


def interval(drawn: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % interval of what was worked out of each draw, the first axis."""
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return low, high


def length_differences(matches: Matches, lengths: Mapping[tuple[str, str], int]) -> Floats:
    """Return how much longer the answer shown first is, (N,), from -1 to 1.

    It is the hyperbolic tangent of the difference in characters over the standard deviation of all differences, so that
    much longer counts little more than longer.

    Args:
        lengths: characters of the answer, by system and question.

    Raises:
        DataError: an answer is not there.
    """
    shown = np.array([_lengths(matches, side, lengths) for side in (matches.first, matches.second)], dtype=float)
    difference = shown[0] - shown[1]
    spread = difference.std()
    return np.tanh(difference / spread) if spread > 0 else np.zeros(len(matches))


def check_connected(matches: Matches) -> None:
    """Refuse systems of which some never met the others, or never got a point against them: there is no distance.

    Raises:
        DataError: names the groups.
    """
    from scipy.sparse.csgraph import connected_components  # which takes longer to import than all else here

    size = len(matches.systems)
    points = np.zeros((size, size))  # what i got against j, in either order
    np.add.at(points, (matches.first, matches.second), matches.score)
    np.add.at(points, (matches.second, matches.first), 1 - matches.score)
    met, together = connected_components(points + points.T > 0, directed=False)
    if met > 1:
        raise DataError(
            f"no ratings of all systems exist: these never met each other: {_grouped(matches.systems, together)}; rate "
            "them apart (--systems), or judge pairs between them"
        )
    groups, group = connected_components(points > 0, directed=True, connection="strong")
    if groups > 1:
        raise DataError(
            "no finite ratings exist: between these one side won every match: "
            f"{_grouped(matches.systems, group)}; leave them out (--systems), or judge more pairs"
        )


def _grouped(systems: tuple[str, ...], group: Ints) -> str:
    sides = [[name for name, its in zip(systems, group, strict=True) if its == one] for one in sorted(set(group))]
    return " | ".join(sorted(", ".join(names) for names in sides))


def _lengths(matches: Matches, side: Ints, lengths: Mapping[tuple[str, str], int]) -> list[int]:
    names = [
        (matches.systems[index], matches.questions[question])
        for index, question in zip(side, matches.question, strict=True)
    ]
    for system, question in names:
        if (system, question) not in lengths:
            raise DataError(
                f"the length of {system}'s answer to question {question} is not known; give all answers that were "
                "judged with --answers, or rate without --length"
            )
    return [lengths[name] for name in names]


def _chances(systems: Floats) -> Floats:
    """Return the chance to beat another system, (B, S), of log odds (B, S)."""
    size = systems.shape[1]
    chance = 1 / (1 + np.exp(systems[:, None, :] - systems[:, :, None]))
    result: Floats = (chance.sum(2) - 0.5) / (size - 1)
    return result


def _points(drawn: Floats) -> Interval:
    low, high = interval(drawn[1:])
    return float(POINTS * drawn[0]), float(POINTS * low), float(POINTS * high)
