"""How large a difference is beside what seeds do, and how many seeds would tell it.

Sources: Hedges 1981, "Distribution theory for Glass's estimator of effect size" (the correction for few seeds);
Cohen 1988, "Statistical power analysis for the behavioral sciences" (the noncentral t).
"""

import math

import numpy as np
from scipy.special import gammaln, nctdtr, stdtrit  # scipy.stats would take a second to import

from analysis.statistics.estimates import LEVEL, Estimate, satterthwaite

POWER = 0.8
MOST_SEEDS = 1000  # more are no advice
ALL_SEEDS = 10**9


def effect_size(difference: Estimate) -> float:
    """Return Hedges' g of a paired difference: its size in standard deviations of one seed's difference.

    Of a difference over blocks it is one block's, or one seed's where these limit it (`Estimate.limiting_seeds`).
    Positive and negative as the difference. NaN where the seeds' spread has fewer than two degrees of freedom, as with
    two arms of two seeds: g is then no better than a guess.
    """
    freedom = difference.seed_freedom
    if freedom < 2 or not difference.seed_variance > 0:
        return math.nan
    few = math.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return few * difference.value / math.sqrt(difference.seed_variance)


def seeds_needed(difference: Estimate, *, power: float = POWER, comparisons: int = 1) -> int | None:
    """Return how many seeds of both arms would tell a difference of the size seen.

    Of a difference over blocks these are blocks, in further seeds or settings, but seeds where these limit it
    (`Estimate.limiting_seeds`): what the draws of a seed do is in all its blocks, and further settings do not help. The
    size seen is itself uncertain: with few seeds the answer may be off by a factor of several.

    Args:
        power: the chance of finding it.
        comparisons: made at once; each is tested at 5 % over their number, the strictest that Holm's correction asks.

    Returns:
        The smallest number of seeds, 2 or more; None where the spread of the seeds is not known (one seed), the
        difference is 0, or about MOST_SEEDS are not enough (`rows_are_too_few` says whether any number would be).
    """
    if difference.seed_freedom < 1 or not difference.value or math.isnan(difference.row_variance):
        return None
    level = (1 - LEVEL) / comparisons
    few, many = 1, 2
    while power_of_seeds(difference, many, level) < power:
        few, many = many, 2 * many
        if few >= MOST_SEEDS:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if power_of_seeds(difference, middle, level) >= power else (middle, many)
    return many


def rows_are_too_few(difference: Estimate, *, power: float = POWER, comparisons: int = 1) -> bool:
    """Whether no number of seeds would tell a difference of the size seen, since the held-out rows alone blur it.

    False where one seed tells no spread.
    """
    if not difference.n_rows or not difference.seed_freedom:
        return False
    return power_of_seeds(difference, ALL_SEEDS, (1 - LEVEL) / comparisons) < power


def power_of_seeds(difference: Estimate, n_seeds: int, level: float = 1 - LEVEL) -> float:
    """Return the chance that `n_seeds` (2 or more) find a difference of this size, two-sided at `level`."""
    freedom_a_seed = difference.seed_freedom / (difference.n_units - 1)  # several arms tell more of the seeds
    parts = [(difference.seed_variance / n_seeds, freedom_a_seed * (n_seeds - 1))]
    if difference.n_rows:
        parts.append((difference.row_variance, max(difference.n_rows - 1, 1)))
    error = math.sqrt(sum(variance for variance, _ in parts))
    if error == 0:
        return 1.0
    freedom = satterthwaite(parts)
    critical = float(stdtrit(freedom, 1 - level / 2))
    shift = abs(difference.value) / error
    wrong_sign = np.nan_to_num(nctdtr(freedom, shift, -critical))  # which SciPy has no value for where it is nothing
    return float(1 - nctdtr(freedom, shift, critical) + wrong_sign)
