"""Bradley-Terry ratings: the chance that i beats j is a logistic function of the difference of their ratings.

A tie is half a win for each. Unlike Elo's, these ratings do not depend on the order of matches, and what is uncertain
about them is which questions were asked: intervals come from drawing questions again, with replacement.

Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs"; Hunter 2004 for when ratings exist.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components

from qlora_lab.errors import DataError
from qlora_lab.ratings.matches import Floats, Matches

POINTS = 400 / np.log(10)  # a difference of 400 points is odds of 10 to 1, as in Elo
CENTRE = 1000.0  # mean rating of the systems
PRECISION = 1e-3  # of a normal prior around the mean: keeps a drawn system that wins everything finite
STEPS, TOLERANCE = 100, 1e-9
LARGEST_STEP = 2.0  # log odds in one Newton step: further out, the curvature says little
COVERAGE = 0.95


@dataclass(frozen=True)
class Ratings:
    """Ratings in points, (S,) each, with the ends of 95 % intervals and of the ranks (1 is best).

    `first_advantage` is what being shown first is worth in points, with its interval; None where it was not fitted.
    """

    systems: tuple[str, ...]
    rating: Floats
    low: Floats
    high: Floats
    best_rank: Floats
    worst_rank: Floats
    first_advantage: tuple[float, float, float] | None


def bradley_terry(matches: Matches, *, draws: int = 1000, seed: int = 0, first_advantage: bool = True) -> Ratings:
    """Rate the systems of `matches`.

    Args:
        draws: of questions, for the intervals.
        first_advantage: fit what being shown first is worth, and rate without it.

    Raises:
        DataError: some systems never lost to the others (or never met them), so that no finite ratings exist.
    """
    counts, scores = matches.cells()
    _check_connected(matches.systems, counts.sum(0), scores.sum(0))
    generator = np.random.default_rng(seed)
    questions = len(matches.questions)
    weights = generator.multinomial(questions, np.full(questions, 1 / questions), size=draws).astype(float)
    weights = np.concatenate([np.ones((1, questions)), weights])
    size = len(matches.systems)
    drawn_counts, drawn_scores = (
        (weights @ cells.reshape(questions, -1)).reshape(-1, size, size) for cells in (counts, scores)
    )
    fitted, advantage = _fit(drawn_counts, drawn_scores, first_advantage)
    points = CENTRE + POINTS * fitted
    low, high = _interval(points[1:])
    ranks = (points[1:, :, None] < points[1:, None, :]).sum(2) + 1.0
    best, worst = _interval(ranks)
    return Ratings(
        matches.systems,
        points[0],
        low,
        high,
        np.floor(best),
        np.ceil(worst),
        None if advantage is None else (POINTS * advantage[0], *(POINTS * end for end in _interval(advantage[1:]))),
    )


def _interval(drawn: Floats) -> tuple[Floats, Floats]:
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    return low, high


def _fit(counts: Floats, scores: Floats, first_advantage: bool) -> tuple[Floats, Floats | None]:
    """Fit log odds by Newton's method, many tables at once.

    Args:
        counts, scores: (B, S, S); matches with i shown first and j second, and what i got in them.

    Returns:
        (B, S) with mean 0, and (B,) for being shown first, or None.
    """
    tables, size = counts.shape[:2]
    # one row of the design a cell: +1 for the first system, -1 for the second, and 1 for being first
    first, second = (index.ravel() for index in np.indices((size, size)))
    design = np.zeros((size * size, size + first_advantage))
    np.add.at(design, (np.arange(size * size), first), 1.0)
    np.add.at(design, (np.arange(size * size), second), -1.0)
    design[:, size:] = 1.0
    flat_counts, flat_scores = counts.reshape(tables, -1), scores.reshape(tables, -1)
    products = (design[:, :, None] * design[:, None, :]).reshape(size * size, -1)
    fitted = np.zeros((tables, design.shape[1]))
    for _ in range(STEPS):
        expected = 1 / (1 + np.exp(-fitted @ design.T))
        gradient = (flat_scores - flat_counts * expected) @ design - PRECISION * fitted
        curvature = (flat_counts * expected * (1 - expected)) @ products
        curvature = curvature.reshape(tables, *[design.shape[1]] * 2) + PRECISION * np.eye(design.shape[1])
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0].clip(-LARGEST_STEP, LARGEST_STEP)
        fitted += step
        if np.abs(step).max() < TOLERANCE:
            break
    systems = fitted[:, :size]
    return systems - systems.mean(1, keepdims=True), fitted[:, size] if first_advantage else None


def _check_connected(systems: tuple[str, ...], counts: Floats, scores: Floats) -> None:
    """Refuse systems of which some never got a point against the others: their distance has no end."""
    points = scores + (counts - scores).T  # what i got against j, in either order
    groups, group = connected_components(points > 0, directed=True, connection="strong")
    if groups > 1:
        apart = [system for system, its in zip(systems, group, strict=True) if its != group[0]]
        raise DataError(
            f"no finite ratings exist: between {', '.join(apart)} and the other systems one side won every match, or "
            "there was none; leave them out, or judge more pairs"
        )
