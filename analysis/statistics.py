"""How far two arms are apart, and whether the runs can tell.

An arm is scored on held-out rows by runs with several seeds. Both are samples: other rows and other seeds would have
given another difference. The estimator is the one behind the reported metric, a ratio of sums (nats over tokens) and
the mean of it over sets, so the difference shown is the difference of the reported numbers. Its variance has two parts:

    rows    bootstrap: rows are resampled with replacement, the same rows for every seed and for both arms, because
            the rows are the same in every run (rows and seeds are crossed, not nested); within each set
    seeds   the variance of the seeds' effects over their number; it is what resampling the seeds gives on average,
            times n / (n - 1), the share that resampling n seeds leaves out

The interval is estimate +- t * sqrt(rows + seeds), with Satterthwaite's degrees of freedom, because two or three
seeds say little about their own spread. The percentiles of a plain two-level bootstrap do not hold here: with two
seeds, and noise that comes mostly from seeds, they exclude 0 with seeds agreeing in 44 % of simulated studies where
nothing differs; this interval does in 12 % in that worst case, and in 3 to 6 % where rows are the larger part
(tests/analysis/test_analysis_statistics.py repeats the simulation).

Sources: Owen 2007, "The pigeonhole bootstrap" (crossed resampling); Satterthwaite 1946, "An approximate distribution
of estimates of variance components"; Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit  # scipy.stats would take a second to import

Array = npt.NDArray[np.float64]
LEVEL = 0.95
DRAWS = 2000
COUNTS_IN_MEMORY = 2**22  # of the bootstrap, at once


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (n - 1; NaN for one value) and number of values that are there."""

    mean: float
    std: float
    n: int


def summarize(values: Sequence[float] | Array) -> Summary:
    """Summarise one metric over seeds; missing values are not counted, and no value gives NaN."""
    present = np.asarray(values, dtype=float)
    present = present[~np.isnan(present)]
    mean = float(present.mean()) if present.size else math.nan
    std = float(present.std(ddof=1)) if present.size > 1 else math.nan
    return Summary(mean, std, int(present.size))


@dataclass(frozen=True, eq=False)
class Ratios:
    """What each row of one set adds to a ratio metric, in runs of one arm: (seeds, rows) each."""

    numerator: Array
    denominator: Array

    def per_seed(self) -> Array:
        """Return (seeds,): the metric of each run."""
        per_seed: Array = self.numerator.sum(axis=1) / self.denominator.sum(axis=1)
        return per_seed

    def resampled(self, counts: Array) -> Array:
        """Return (draws, seeds): the metric where row r is there counts[d, r] times."""
        resampled: Array = (counts @ self.numerator.T) / (counts @ self.denominator.T)
        return resampled


@dataclass(frozen=True, eq=False)
class Scored:
    """An arm's metric as it is, and as it would be with other rows.

    Attributes:
        per_seed: (seeds,) the metric of each run.
        draws: (draws, seeds) the metric on resampled rows; arms with the same rows are resampled alike. NaN where a
            set has fewer than two rows.
        per_row: (seeds, rows) the metric on each row alone.
    """

    per_seed: Array
    draws: Array
    per_row: Array

    @property
    def n_rows(self) -> int:
        return int(self.per_row.shape[1])


def score(sets: Sequence[Ratios], bootstrap_seed: int, draws: int = DRAWS) -> Scored:
    """Score an arm: the mean over `sets` of each set's ratio, and its bootstrap over rows within each set."""
    resampled = [_resample(ratios, [bootstrap_seed, number], draws) for number, ratios in enumerate(sets)]
    return Scored(
        per_seed=np.mean([ratios.per_seed() for ratios in sets], axis=0),
        draws=np.mean(resampled, axis=0),
        per_row=np.concatenate([ratios.numerator / ratios.denominator for ratios in sets], axis=1),
    )


def _resample(ratios: Ratios, seed: list[int], draws: int) -> Array:
    """Return (draws, seeds) bootstrap values; the same seed and number of rows give the same rows."""
    n_seeds, n_rows = ratios.numerator.shape
    if n_rows < 2:
        return np.full((draws, n_seeds), math.nan)
    rng = np.random.default_rng(seed)
    even = np.full(n_rows, 1 / n_rows)
    step = max(1, COUNTS_IN_MEMORY // n_rows)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    values = [ratios.resampled(rng.multinomial(n_rows, even, size=size).astype(float)) for size in sizes]
    # resampling n rows leaves out 1 / n of the variance
    widened = math.sqrt(n_rows / (n_rows - 1))
    center = ratios.per_seed()
    return center + widened * (np.concatenate(values) - center)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. With one seed the interval covers the rows only; without rows, the seeds only."""

    value: float
    low: float
    high: float
    standard_error: float
    degrees_of_freedom: float
    per_seed: tuple[float, ...]
    n_rows: int

    @property
    def n_seeds(self) -> int:
        return len(self.per_seed)

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
    return _estimate(arm.per_seed, float(arm.draws.mean(axis=1).var(ddof=1)), arm.n_rows)


def estimate_difference(first: Scored, second: Scored) -> Estimate:
    """Estimate first minus second, paired by seed and row: both are scored on the same seeds and rows, in one order."""
    row_variance = float((first.draws - second.draws).mean(axis=1).var(ddof=1))
    return _estimate(first.per_seed - second.per_seed, row_variance, first.n_rows)


def estimate_over_seeds(per_seed: Sequence[float] | Array) -> Estimate:
    """Estimate a mean from one value a seed, where no rows stand behind the metric (time, memory)."""
    return _estimate(np.asarray(per_seed, dtype=float), None, 0)


def _estimate(per_seed: Array, row_variance: float | None, n_rows: int) -> Estimate:
    n_seeds = per_seed.size
    value = float(per_seed.mean())
    parts = []  # (variance, degrees of freedom) of each source that can be seen
    if row_variance is not None:
        parts.append((row_variance, max(n_rows - 1, 1)))
    if n_seeds > 1:
        parts.append((float(per_seed.var(ddof=1)) / n_seeds, n_seeds - 1))
    variance = sum(part for part, _ in parts) if parts else math.nan
    freedom = math.nan
    if variance == 0:
        freedom = float(min(df for _, df in parts))
    elif not math.isnan(variance):
        freedom = variance**2 / sum(part**2 / df for part, df in parts)
    half_width = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return Estimate(
        value=value,
        low=value - half_width,
        high=value + half_width,
        standard_error=math.sqrt(variance),
        degrees_of_freedom=freedom,
        per_seed=tuple(float(effect) for effect in per_seed),
        n_rows=n_rows,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several: the i-th smallest of m times m - i + 1, never falling, at most 1.

    NaN (a comparison that cannot separate anyway) stays NaN and does not count in m.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted


class Verdict(Enum):
    """Whether two arms are separated; every other member says why not, in the order in which it is checked."""

    SEPARATED = "separated"
    NO_SHARED_SEED = "the arms share no seed that finished in both"
    ONE_SEED = "one seed cannot separate arms"
    TOO_FEW_ROWS = "there are fewer than two rows to compare"
    INTERVAL_HOLDS_ZERO = "the interval holds 0"
    SEEDS_DISAGREE = "the seeds disagree on the sign"
    SEVERAL_COMPARISONS = "it does not survive Holm's correction for several comparisons"


def judge(difference: Estimate | None, adjusted_p: float) -> Verdict:
    """Call two arms separated only if the runs bear it.

    All must hold: at least two shared seeds; the 95 % interval excludes 0; every seed's difference has the same
    sign; and the p-value, corrected by Holm for all comparisons of the study, is at most 0.05.
    """
    if difference is None or difference.n_seeds == 0:
        return Verdict.NO_SHARED_SEED
    if difference.n_seeds == 1:
        return Verdict.ONE_SEED
    if math.isnan(difference.standard_error):
        return Verdict.TOO_FEW_ROWS
    if difference.low <= 0 <= difference.high:
        return Verdict.INTERVAL_HOLDS_ZERO
    if len({math.copysign(1, effect) if effect else 0 for effect in difference.per_seed}) > 1:
        return Verdict.SEEDS_DISAGREE
    if not adjusted_p <= 1 - LEVEL:
        return Verdict.SEVERAL_COMPARISONS
    return Verdict.SEPARATED
