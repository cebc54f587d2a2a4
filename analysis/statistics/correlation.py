"""Whether two metrics put the arms in the same order: does MMLU predict chatbot quality?

Sources: Bonett & Wright 2000, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations" (the
interval); the p-value is of a permutation test, exact up to 7 arms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtri

from analysis.statistics.estimates import LEVEL
from analysis.statistics.holm import holm

Array = npt.NDArray[np.float64]
FEWEST_ARMS = 4  # of fewer nothing can be said: 3 arms are in the same order by chance in one case of six
EXACT_ARMS = 7  # 5,040 orders
PERMUTATIONS = 10_000


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho with its 95 % interval over arms, Kendall's tau-b, and the p-value of no association.

    NaN where there are fewer than FEWEST_ARMS arms, or all of them have the same value.
    """

    rho: float
    low: float
    high: float
    tau: float
    p_value: float
    n_arms: int


def rank_correlation(first: Sequence[float] | Array, second: Sequence[float] | Array, seed: int = 0) -> RankCorrelation:
    """Correlate two metrics over arms; an arm that lacks one of them does not count."""
    values = np.array([first, second], dtype=float)
    values = values[:, np.isfinite(values).all(axis=0)]
    n = values.shape[1]
    if n < FEWEST_ARMS or (values == values[:, :1]).all(axis=1).any():
        return RankCorrelation(math.nan, math.nan, math.nan, math.nan, math.nan, n)
    from qlora_lab.ratings.agreement import kendall_tau, spearman_rho  # imports scipy.stats, which takes a second

    rho = float(spearman_rho(*values))
    ranks = np.array([pd.Series(row).rank() for row in values])
    ranks -= (n + 1) / 2
    by_chance = np.abs(_other_orders(ranks[1], seed) @ ranks[0])
    p_value = float((by_chance >= abs(ranks[1] @ ranks[0]) - 1e-9).mean())
    return RankCorrelation(rho, *_interval(rho, n), float(kendall_tau(*values)), p_value, n)


def correlate_metrics(arms: pd.DataFrame, metrics: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Correlate every two metrics over arms.

    Args:
        arms: one row an arm, with the metrics' means.

    Returns:
        One row a pair: `first`, `second`, `arms` (that have both), `rho`, `low`, `high`, `tau`, `p`, and `p_holm`,
        corrected for all pairs.
    """
    return _correlated(arms, list(combinations(metrics, 2)), seed)


def correlate_with(arms: pd.DataFrame, metric: str, others: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Correlate one metric with each of some others over arms; otherwise as `correlate_metrics`."""
    return _correlated(arms, [(metric, other) for other in others], seed)


def _correlated(arms: pd.DataFrame, pairs: Sequence[tuple[str, str]], seed: int) -> pd.DataFrame:
    rows = []
    for first, second in pairs:
        found = rank_correlation(arms[first].to_numpy(dtype=float), arms[second].to_numpy(dtype=float), seed)
        estimates = {"rho": found.rho, "low": found.low, "high": found.high, "tau": found.tau, "p": found.p_value}
        rows.append({"first": first, "second": second, "arms": found.n_arms, **estimates})
    table = pd.DataFrame(rows, columns=["first", "second", "arms", "rho", "low", "high", "tau", "p"])
    return table.assign(p_holm=holm(table["p"].tolist()))


def _interval(rho: float, n: int) -> tuple[float, float]:
    one_exchange = 12 / (n * (n**2 - 1))  # of neighbours: the step from a perfect order to the next
    center = math.atanh(math.copysign(min(abs(rho), 1 - one_exchange / 2), rho))
    half_width = float(ndtri((1 + LEVEL) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(center - half_width), math.tanh(center + half_width)


def _other_orders(values: Array, seed: int) -> Array:
    """Return (orders, arms): every order of the values, or of many arms random ones and the one seen."""
    if values.size <= EXACT_ARMS:
        return values[np.array(list(permutations(range(values.size))))]
    shuffled = np.random.default_rng(seed).permuted(np.tile(values, (PERMUTATIONS - 1, 1)), axis=1)
    return np.vstack([values, shuffled])
