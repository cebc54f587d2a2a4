"""Logistic regression of who wins, on the two systems and on covariates: many weightings of the questions at once.

Newton's method. The curvature is summed pair by pair: products of whole rows of the design would be nearly all zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lab.ratings.matches import Floats, Ints, Matches

PRECISION = 1e-3  # of a normal prior around the mean: keeps a drawn system that wins everything finite
STEPS, TOLERANCE = 100, 1e-3  # log odds; what is still to go after such a step is about its square
LARGEST_STEP = 2.0  # log odds in one step: further out, the curvature says little
CELLS_AT_ONCE = 40_000  # numbers that stay in the cache


@dataclass(frozen=True)
class Rows:
    """R rows of equal systems and covariates, sorted by pair: what the regression sees of N matches.

    `design` is (R, S + C): 1 for the system shown first, -1 for the second, then the covariates; `pair`, (R,), is
    first * S + second. `counts` and `scores` are matches and what the first system got in them: (Q, R) by question, or
    (R,) where each row is of the one question in `question`, (R,).
    """

    size: int
    design: Floats
    pair: Ints
    counts: Floats
    scores: Floats
    question: Ints | None

    @classmethod
    def of(cls, matches: Matches, covariates: Sequence[Floats], *, by_match: bool) -> "Rows":
        """Collect matches by pair, or leave them apart where covariates, (N,) each, differ from match to match."""
        size = len(matches.systems)
        pair = matches.first * size + matches.second
        if by_match:
            order = np.argsort(pair, kind="stable")
            scores, question = matches.score[order], matches.question[order]
            return cls(size, _design(matches, covariates, order), pair[order], np.ones(len(pair)), scores, question)
        pairs, of_pair, row = np.unique(pair, return_index=True, return_inverse=True)
        counts, scores = np.zeros((2, len(matches.questions), len(pairs)))
        np.add.at(counts, (matches.question, row), 1.0)
        np.add.at(scores, (matches.question, row), matches.score)
        return cls(size, _design(matches, covariates, of_pair), pairs, counts, scores, None)

    def weighted(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return counts and scores, (B, R) each, where question q counts weights[b, q] times."""
        if self.question is None:
            return weights @ self.counts, weights @ self.scores
        counts = weights[:, self.question]
        return counts, counts * self.scores

    def by_pair(self, values: Floats) -> Floats:
        """Sum (B, R) over the rows of each pair, (B, S, S)."""
        starts = np.flatnonzero(np.diff(self.pair, prepend=-1))
        summed = np.zeros((len(values), self.size * self.size))
        summed[:, self.pair[starts]] = (
            values if len(starts) == len(self.pair) else np.add.reduceat(values, starts, axis=1)
        )
        return summed.reshape(-1, self.size, self.size)


def fit(rows: Rows, weights: Floats) -> tuple[Floats, Floats]:
    """Fit log odds, once a weighting of the questions.

    Args:
        weights: (B, Q); how often each question counts. The first is where the others start from.

    Returns:
        (B, S) of the systems, with mean 0, and (B, C) of the covariates.
    """
    start = _newton(rows, weights[:1], np.zeros(rows.design.shape[1]))
    at_once = max(1, CELLS_AT_ONCE // len(rows.pair))
    fitted = np.concatenate(
        [start, *(_newton(rows, weights[at : at + at_once], start[0]) for at in range(1, len(weights), at_once))]
    )
    systems, effects = fitted[:, : rows.size], fitted[:, rows.size :]
    return systems - systems.mean(1, keepdims=True), effects


def _design(matches: Matches, covariates: Sequence[Floats], order: Ints) -> Floats:
    size, row = len(matches.systems), np.arange(len(order))
    design = np.zeros((len(order), size + len(covariates)))
    design[row, matches.first[order]] = 1.0
    design[row, matches.second[order]] = -1.0
    for index, covariate in enumerate(covariates):
        design[:, size + index] = covariate[order]
    return design


def _newton(rows: Rows, weights: Floats, start: Floats) -> Floats:
    """Return (B, S + C)."""
    counts, scores = rows.weighted(weights)
    fitted = np.tile(start, (len(weights), 1))
    prior = PRECISION * np.eye(len(start))
    for _ in range(STEPS):
        expected = 1 / (1 + np.exp(-fitted @ rows.design.T))
        won = counts * expected
        gradient = (scores - won) @ rows.design - PRECISION * fitted
        curvature = _curvature(rows, won * (1 - expected)) + prior
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0].clip(-LARGEST_STEP, LARGEST_STEP)
        fitted += step
        if np.abs(step).max() < TOLERANCE:
            break
    return fitted


def _curvature(rows: Rows, weight: Floats) -> Floats:
    """Return (B, S + C, S + C) of the weight of each row, (B, R)."""
    size, total = rows.size, rows.design.shape[1]
    system = np.arange(size)
    pairs = rows.by_pair(weight)
    either_order = pairs + pairs.transpose(0, 2, 1)
    curvature = np.empty((len(weight), total, total))
    curvature[:, :size, :size] = -either_order
    curvature[:, system, system] = either_order.sum(2)
    for covariate in range(size, total):
        curvature[:, covariate, :] = curvature[:, :, covariate] = (weight * rows.design[:, covariate]) @ rows.design
    return curvature
