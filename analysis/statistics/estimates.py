"""How far two arms are apart, and how surely.

An arm is scored on held-out rows by runs with several seeds. Both are samples: other rows and other seeds would have
given another difference. The estimator is the one behind the reported metric, a ratio of sums (nats over tokens) and
the mean of it over sets, so the difference shown is the difference of the reported numbers. Its variance has two parts:

    rows    bootstrap within each set (`rows`)
    seeds   the spread of a run's metric around the means of its arm and its seed, pooled over all arms of the study
            ((k - 1) (n - 1) degrees of freedom for k arms and n seeds), times 2 / n for a difference; at least that
            of the pair's own effects, so that a noisy arm does not hide behind quiet ones. Two arms have but their own

The interval is estimate +- t * sqrt(rows + seeds), with Satterthwaite's degrees of freedom, because two or three
seeds say little about their own spread. `verdicts` has how often it is wrong.

Source: Satterthwaite 1946, "An approximate distribution of estimates of variance components".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit  # scipy.stats would take a second to import

from analysis.statistics.rows import Scored
from analysis.statistics.seeds import SeedSpread

Array = npt.NDArray[np.float64]
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. With one seed the interval covers the rows only; without rows, the seeds only.

    Attributes:
        row_variance: of the value, from its rows; 0 where there are none.
        seed_variance: of one seed's value; NaN with one seed.
        seed_freedom: degrees of freedom behind `seed_variance`.
        limiting_seeds: of values over blocks: how many seeds there are, where the interval is that of their means
            (`blocks`) and `seed_variance` is of one such mean; 0 where each of `per_seed` counts by itself.
    """

    value: float
    low: float
    high: float
    standard_error: float
    degrees_of_freedom: float
    per_seed: tuple[float, ...]
    n_rows: int
    row_variance: float = 0.0
    seed_variance: float = math.nan
    seed_freedom: int = 0
    limiting_seeds: int = 0

    @property
    def n_seeds(self) -> int:
        return len(self.per_seed)

    @property
    def n_units(self) -> int:
        """How many values that vary by themselves are behind it: seeds, or blocks."""
        return self.limiting_seeds or self.n_seeds

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def p_value(self) -> float:
        """Two-sided, for a true value of 0; NaN where there is no standard error."""
        if math.isnan(self.standard_error):
            return math.nan
        if self.standard_error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stdtr(self.degrees_of_freedom, -abs(self.value) / self.standard_error))


def estimate_arm(arm: Scored) -> Estimate:
    """Estimate one arm's metric over its seeds and rows."""
    return estimate_with_rows(arm.per_seed, float(arm.draws.mean(axis=1).var(ddof=1)), arm.n_rows)


def estimate_difference(first: Scored, second: Scored, spread: SeedSpread | None = None) -> Estimate:
    """Estimate first minus second, paired by seed and row: both are scored on the same seeds and rows, in one order.

    Args:
        spread: of the seeds, pooled over all arms of the study; without it these two arms must tell it alone.
    """
    row_variance = float((first.draws - second.draws).mean(axis=1).var(ddof=1))
    return estimate_with_rows(first.per_seed - second.per_seed, row_variance, first.n_rows, spread)


def estimate_over_seeds(per_seed: Sequence[float] | Array, spread: SeedSpread | None = None) -> Estimate:
    """Estimate a mean from one value a seed, where no rows stand behind the metric (time, memory)."""
    return estimate_with_rows(np.asarray(per_seed, dtype=float), None, 0, spread)


def estimate_with_rows(
    per_seed: Array, row_variance: float | None, n_rows: int, spread: SeedSpread | None = None
) -> Estimate:
    """Estimate a mean over seeds (or other units) from the value of each and the variance that the rows give it.

    Args:
        row_variance: of the mean; None where no rows stand behind the metric.
        n_rows: held-out rows behind it, or 0.
        spread: of the units, pooled; without it their own.
    """
    return estimate_from_units(per_seed, variance_of_units(per_seed, spread), per_seed.size, row_variance, n_rows)


def estimate_from_units(
    per_seed: Array, of_unit: tuple[float, int], n_units: int, row_variance: float | None, n_rows: int
) -> Estimate:
    """Estimate a mean over seeds (or other units) whose spread is known.

    Args:
        of_unit: the variance of one unit's value, and its degrees of freedom.
        n_units: that vary by themselves.
    """
    value = float(per_seed.mean())
    unit_variance, unit_freedom = of_unit
    parts = []  # (variance, degrees of freedom) of each source that can be seen
    if row_variance is not None:
        parts.append((row_variance, max(n_rows - 1, 1)))
    if n_units > 1:
        parts.append((unit_variance / n_units, unit_freedom))
    variance = sum(part for part, _ in parts) if parts else math.nan
    freedom = satterthwaite(parts) if parts else math.nan
    half_width = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return Estimate(
        value=value,
        low=value - half_width,
        high=value + half_width,
        standard_error=math.sqrt(variance),
        degrees_of_freedom=freedom,
        per_seed=tuple(float(effect) for effect in per_seed),
        n_rows=n_rows,
        row_variance=row_variance or 0.0,
        seed_variance=unit_variance,
        seed_freedom=unit_freedom,
    )


def variance_of_units(per_seed: Array, spread: SeedSpread | None) -> tuple[float, int]:
    """Return the variance of one seed's (or other unit's) value, and its degrees of freedom."""
    n_seeds = per_seed.size
    if n_seeds < 2:
        return math.nan, 0
    own = float(per_seed.var(ddof=1))
    if spread is None:
        return own, n_seeds - 1
    # an arm that is noisier than the others must not hide behind them
    return max(own, n_seeds * spread.of_difference(n_seeds)), spread.degrees_of_freedom


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of variances, each given with its own."""
    variance = sum(part for part, _ in parts)
    if math.isnan(variance):
        return math.nan
    if variance == 0:
        return float(min(freedom for _, freedom in parts))
    return variance**2 / sum(part**2 / freedom for part, freedom in parts)
