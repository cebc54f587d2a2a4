"""Elo ratings as the QLoRA study reports them: the mean over many random orders of the same matches.

A single order can be off by a hundred points, and the spread over orders says nothing about how ratings would change
with other questions; `bradley_terry` is what this project concludes from.

Source: Elo 1967; Dettmers et al. 2023, section 5.3 (start 1000, K 32, 10,000 orders).
"""

from dataclasses import dataclass

import numpy as np

from qlora_lab.ratings.matches import Floats, Matches

ORDERS_AT_ONCE = 1000  # whose ratings stay in the cache
CONFIDENCE_95 = 1.96


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
            _play(matches, generator, min(ORDERS_AT_ONCE, orders - done), played, k, start)
            for done in range(0, orders, ORDERS_AT_ONCE)
        ]
    )
    spread = finals.std(0, ddof=1) if orders > 1 else np.full(len(matches.systems), np.nan)
    return EloRatings(matches.systems, finals.mean(0), spread, CONFIDENCE_95 * spread / np.sqrt(orders))


def _play(matches: Matches, generator: np.random.Generator, orders: int, played: int, k: float, start: float) -> Floats:
    """Return the ratings after `played` matches, (orders, S): all orders advance together, a match at a time."""
    order = np.tile(np.arange(len(matches), dtype=np.int32), (orders, 1))
    order = np.ascontiguousarray(generator.permuted(order, axis=1, out=order)[:, :played].T)
    size = len(matches.systems)
    row = np.arange(orders) * size
    to_log_odds = np.log(10) / 400
    # Float32 holds ratings to a ten-thousandth of a point, far below the spread over orders. The loop writes into
    # arrays that are there: making new ones is half of its time.
    ratings = np.full(orders * size, start * to_log_odds, dtype=np.float32)
    step = np.float32(k * to_log_odds)
    points = (matches.score * step).astype(np.float32)
    one, other = np.empty(orders, dtype=np.intp), np.empty(orders, dtype=np.intp)
    its, others, expected, moved = np.empty((4, orders), dtype=np.float32)
    for match in order:
        np.add(matches.first.take(match, out=one, mode="clip"), row, out=one)
        np.add(matches.second.take(match, out=other, mode="clip"), row, out=other)
        ratings.take(one, out=its, mode="clip")
        ratings.take(other, out=others, mode="clip")
        np.exp(np.subtract(others, its, out=expected), out=expected)
        np.divide(step, np.add(expected, 1, out=expected), out=expected)
        np.subtract(points.take(match, out=moved, mode="clip"), expected, out=moved)
        ratings[one] = its + moved
        ratings[other] = others - moved
    return ratings.reshape(orders, size).astype(np.float64) / to_log_odds
