"""Elo ratings as the QLoRA study reports them: the mean over many random orders of the same matches.

A single order can be off by a hundred points, and the spread over orders says nothing about how ratings would change
with other questions; both are told here, apart. `bradley_terry` is what this project concludes from.

Source: Elo 1967; Dettmers et al. 2023, section 5.3 (start 1000, K 32, 10,000 orders).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_lab.ratings.matches import Floats, Matches

ORDERS_AT_ONCE, MATCHES_AT_ONCE = 1000, 32  # whose ratings, and which part of whose schedule, stay in the cache
SHUFFLED_AT_ONCE = 50
CONFIDENCE_95 = 1.96
QUESTION_DRAWS, ORDERS_OF_A_DRAW = 200, 10
Schedule = NDArray[np.int64]  # (orders, matches played): which match is played when; N means none


@dataclass(frozen=True)
class EloRatings:
    """(S,) each: the mean over orders, the standard deviation of one order, and half the 95 % interval of the mean."""

    systems: tuple[str, ...]
    mean: Floats
    order_std: Floats
    mean_half_width: Floats


def elo(
    matches: Matches,
    *,
    k: float = 32.0,
    start: float = 1000.0,
    orders: int = 10_000,
    sampled: int | None = None,
    seed: int = 0,
) -> EloRatings:
    """Play the matches in random orders.

    Args:
        k: points that a match moves at most.
        sampled: matches drawn, without replacement, for each order; None plays all.
    """
    generator = np.random.default_rng(seed)
    played = len(matches) if sampled is None else min(sampled, len(matches))
    finals = np.concatenate(
        [
            _play(matches, _shuffled(len(matches), min(ORDERS_AT_ONCE, orders - done), played, generator), k, start)
            for done in range(0, orders, ORDERS_AT_ONCE)
        ]
    )
    spread = finals.std(0, ddof=1) if orders > 1 else np.full(len(matches.systems), np.nan)
    return EloRatings(matches.systems, finals.mean(0), spread, CONFIDENCE_95 * spread / np.sqrt(orders))


def elo_question_std(
    matches: Matches, *, k: float = 32.0, start: float = 1000.0, draws: int = QUESTION_DRAWS, seed: int = 0
) -> Floats:
    """Return how much the mean over orders would change with other questions: a standard deviation in points, (S,).

    Questions are drawn with replacement, each draw is played in several orders, and what the mean of so few orders
    varies by itself is taken off (analysis of variance).
    """
    generator = np.random.default_rng(seed)
    orders = ORDERS_OF_A_DRAW
    schedules = _drawn(matches, draws, generator)
    finals = np.concatenate(
        [
            _play(matches, schedules[done : done + ORDERS_AT_ONCE], k, start)
            for done in range(0, draws * orders, ORDERS_AT_ONCE)
        ]
    ).reshape(draws, orders, -1)
    of_orders = finals.var(1, ddof=1).mean(0)
    result: Floats = np.sqrt(np.maximum(finals.mean(1).var(0, ddof=1) - of_orders / orders, 0))
    return result


def _shuffled(matches: int, orders: int, played: int, generator: np.random.Generator) -> Schedule:
    """Return the first matches of random orders: random numbers, sorted with the matches in their lowest bits.

    A shuffle of each order takes twice as long.
    """
    lowest = np.uint64((1 << matches.bit_length()) - 1)
    schedule = np.empty((orders, played), dtype=np.int64)
    drawn = np.empty((SHUFFLED_AT_ONCE, matches))
    keys = drawn.view(np.uint64)  # as bits, positive floats are in the same order
    for at in range(0, orders, SHUFFLED_AT_ONCE):
        generator.random(out=drawn)
        keys &= ~lowest
        keys |= np.arange(matches, dtype=np.uint64)
        keys.sort(axis=1)
        schedule[at : at + SHUFFLED_AT_ONCE] = keys[: orders - at, :played] & lowest
    return schedule


def _drawn(matches: Matches, draws: int, generator: np.random.Generator) -> Schedule:
    """Return the matches of drawn questions in random orders; the shorter draws end in none."""
    of_question = [np.flatnonzero(matches.question == index) for index in range(len(matches.questions))]
    orders = []
    for _ in range(draws):
        drawn = generator.integers(len(of_question), size=len(of_question))
        its = np.concatenate([of_question[question] for question in drawn])
        orders += [generator.permutation(its) for _ in range(ORDERS_OF_A_DRAW)]
    schedule = np.full((len(orders), max(map(len, orders))), len(matches))
    for lane, order in enumerate(orders):
        schedule[lane, : len(order)] = order
    return schedule


def _play(matches: Matches, schedule: Schedule, k: float, start: float) -> Floats:
    """Return the ratings after a schedule, (orders, S): all orders advance together, a match at a time."""
    size, orders = len(matches.systems) + 1, len(schedule)  # one more system plays the matches that are none
    to_log_odds = np.log(10) / 400
    # Float32 holds ratings to a ten-thousandth of a point, far below the spread over orders. The loop writes into
    # arrays that are there: making new ones is half of its time.
    first, second = (np.append(side, size - 1) for side in (matches.first, matches.second))
    ratings = np.full(orders * size, start * to_log_odds, dtype=np.float32)
    step = np.float32(k * to_log_odds)
    points = (np.append(matches.score, 0.5) * step).astype(np.float32)
    row = np.arange(orders) * size
    its, others, expected = np.empty((3, orders), dtype=np.float32)
    for at in range(0, schedule.shape[1], MATCHES_AT_ONCE):
        played = np.ascontiguousarray(schedule[:, at : at + MATCHES_AT_ONCE].T)
        for one, other, moved in zip(first[played] + row, second[played] + row, points[played], strict=True):
            ratings.take(one, out=its, mode="clip")
            ratings.take(other, out=others, mode="clip")
            np.exp(np.subtract(others, its, out=expected), out=expected)
            np.divide(step, np.add(expected, 1, out=expected), out=expected)
            np.subtract(moved, expected, out=moved)
            ratings[one] = np.add(its, moved, out=its)
            ratings[other] = np.subtract(others, moved, out=others)
    return ratings.reshape(orders, size)[:, :-1].astype(np.float64) / to_log_odds
