"""How far two arms are apart, and whether the runs can tell.

An arm is scored on held-out rows by runs with several seeds. Both are samples: other rows and other seeds would have
given another difference. The estimator is the one behind the reported metric, a ratio of sums (nats over tokens) and
the mean of it over sets, so the difference shown is the difference of the reported numbers. Its variance has two parts:

    rows    bootstrap: rows are resampled with replacement, the same rows for every seed and for both arms, because
            the rows are the same in every run (rows and seeds are crossed, not nested); within each set
    seeds   the spread of a run's metric around the means of its arm and its seed, pooled over all arms of the study
            ((k - 1) (n - 1) degrees of freedom for k arms and n seeds), times 2 / n for a difference; at least that
            of the pair's own effects, so that a noisy arm does not hide behind quiet ones. Two arms have but their own

The interval is estimate +- t * sqrt(rows + seeds), with Satterthwaite's degrees of freedom, because two or three
seeds say little about their own spread. How often arms that do not differ are called separated, in simulations with
the seeds' standard error 0, 1, 3, 5, 7 and 10 times that of the rows:

    2 arms, 2 seeds   4, 7, 12, 13, 12, 11 %   Satterthwaite's approximation is at its weakest; worst 13 %
    2 arms, 3 seeds   4, 6,  8,  7,  7,  7 %
    2 arms, 5 seeds   5, 5,  5,  4,  4,  4 %
    3 arms, 2 seeds      5,  6,  7,      4 %   at least one of 3 pairs
    6 arms, 2 seeds   3, 2,  3,  4,  2,  3 %   at least one of 15 pairs; each pair's own seeds alone: 25 to 60 %
    6 arms, one ten times as noisy as the others: 15 % with 2 seeds, 6 % with 3

The percentiles of a plain two-level bootstrap exclude 0 with two agreeing seeds in 44 % of such studies of two arms.
tests/analysis/test_analysis_statistics.py repeats the simulations, smaller.

Sources: Owen 2007, "The pigeonhole bootstrap" (crossed resampling); Satterthwaite 1946, "An approximate distribution
of estimates of variance components"; Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit  # scipy.stats would take a second to import

# Measured on simulated studies in which no arm differs (seeds' standard error 0 to 10 times that of the rows); a
# sentence for people who read an answer.
FALSE_POSITIVES = (
    "How often this is wrong: in simulated studies of two arms that do not differ, they are called separated in at "
    "most 13 % with two seeds (4 % where the noise is that of the held-out rows, 13 % where it is mostly that of the "
    "seeds), in 8 % with three and in 5 % with five. Several arms tell more about the seeds: with two seeds at least "
    "one pair is called separated wrongly in 7 % with three arms and in 4 % with six; where one of six is ten "
    "times as noisy as the others, in 15 % with two seeds and in 6 % with three."
)
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
    values = [ratios.resampled(counts) for counts in _row_counts(tuple(seed), n_rows, draws)]
    # resampling n rows leaves out 1 / n of the variance
    widened = math.sqrt(n_rows / (n_rows - 1))
    center = ratios.per_seed()
    return center + widened * (np.concatenate(values) - center)


def _row_counts(seed: tuple[int, ...], n_rows: int, draws: int) -> Iterable[Array]:
    """Give (draws, rows) how often each row is drawn, in pieces where it would be large."""
    if n_rows * draws <= COUNTS_IN_MEMORY // 4:
        return (_remembered_counts(seed, n_rows, draws),)
    rng = np.random.default_rng(seed)
    even = np.full(n_rows, 1 / n_rows)
    step = max(1, COUNTS_IN_MEMORY // n_rows)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    return (rng.multinomial(n_rows, even, size=size).astype(float) for size in sizes)


@functools.lru_cache(maxsize=4)  # the same for every arm
def _remembered_counts(seed: tuple[int, ...], n_rows: int, draws: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=draws).astype(float)


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


@dataclass(frozen=True)
class SeedSpread:
    """The variance of one run's metric that comes from its seed: of what its arm and its seed alone do not explain."""

    variance: float
    degrees_of_freedom: int

    def of_difference(self, n_seeds: int) -> float:
        """Return the variance of the difference of two arms' means over `n_seeds`."""
        return 2 * self.variance / n_seeds


def pool_seed_spread(values: Mapping[tuple[str, int], float]) -> SeedSpread | None:
    """Estimate the seeds' spread from all arms together: the residuals of metric = arm + seed, by least squares.

    With k arms that share n seeds this is sum(residual^2) / ((k - 1) (n - 1)); two arms give the variance of their
    per-seed differences over two. Missing runs take nothing but their own residual away.

    Args:
        values: the metric by (arm, seed).

    Returns:
        None where no residual is left, as with one seed.
    """
    arms, arm_of = np.unique([arm for arm, _ in values], return_inverse=True)
    seeds, seed_of = np.unique([seed for _, seed in values], return_inverse=True)
    runs = np.arange(len(values))
    table = np.zeros((len(values), 1 + seeds.size))  # the metric, and which seed it is
    table[:, 0] = list(values.values())
    table[runs, 1 + seed_of] = 1
    sums = np.zeros((arms.size, table.shape[1]))
    np.add.at(sums, arm_of, table)
    table -= (sums / np.bincount(arm_of)[:, None])[arm_of]  # takes out the arms' own means
    metric, seed_columns = table[:, 0], table[:, 1:]
    effects, _, rank, _ = np.linalg.lstsq(seed_columns, metric, rcond=1e-9)
    freedom = len(values) - arms.size - int(rank)
    if freedom < 1:
        return None
    return SeedSpread(float(((metric - seed_columns @ effects) ** 2).sum()) / freedom, freedom)


def estimate_arm(arm: Scored) -> Estimate:
    """Estimate one arm's metric over its seeds and rows."""
    return _estimate(arm.per_seed, float(arm.draws.mean(axis=1).var(ddof=1)), arm.n_rows)


def estimate_difference(first: Scored, second: Scored, spread: SeedSpread | None = None) -> Estimate:
    """Estimate first minus second, paired by seed and row: both are scored on the same seeds and rows, in one order.

    Args:
        spread: of the seeds, pooled over all arms of the study; without it these two arms must tell it alone.
    """
    row_variance = float((first.draws - second.draws).mean(axis=1).var(ddof=1))
    return _estimate(first.per_seed - second.per_seed, row_variance, first.n_rows, spread)


def estimate_over_seeds(per_seed: Sequence[float] | Array, spread: SeedSpread | None = None) -> Estimate:
    """Estimate a mean from one value a seed, where no rows stand behind the metric (time, memory)."""
    return _estimate(np.asarray(per_seed, dtype=float), None, 0, spread)


def _estimate(per_seed: Array, row_variance: float | None, n_rows: int, spread: SeedSpread | None = None) -> Estimate:
    n_seeds = per_seed.size
    value = float(per_seed.mean())
    parts = []  # (variance, degrees of freedom) of each source that can be seen
    if row_variance is not None:
        parts.append((row_variance, max(n_rows - 1, 1)))
    if n_seeds > 1:
        own, freedom_of_own = float(per_seed.var(ddof=1)) / n_seeds, n_seeds - 1
        if spread is None:
            parts.append((own, freedom_of_own))
        else:
            # an arm that is noisier than the others must not hide behind them
            parts.append((max(own, spread.of_difference(n_seeds)), spread.degrees_of_freedom))
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


def holm(p_values: Sequence[float], n_comparisons: int | None = None) -> list[float]:
    """Adjust p-values for being several: the i-th smallest of m times m - i + 1, never falling, at most 1.

    NaN (a comparison that cannot separate anyway) stays NaN and does not count in m.

    Args:
        n_comparisons: m, where more comparisons than these were open; those that are not made only raise the result.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    m = len(known) if n_comparisons is None else n_comparisons
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (m - rank)))
        adjusted[index] = largest
    return adjusted


class Verdict(Enum):
    """Whether two arms are separated; every other member says why not, in the order in which it is checked."""

    SEPARATED = "separated"
    NO_SHARED_SEED = "the arms share no seed that finished in both"
    OTHER_TOKENS = "their targets are counted in different tokens"
    OTHER_TARGETS = "their targets were cut at different lengths"
    ONE_SEED = "one seed cannot separate arms"
    TOO_FEW_ROWS = "there are fewer than two rows to compare"
    INTERVAL_HOLDS_ZERO = "the interval holds 0"
    SEEDS_DISAGREE = "the seeds disagree on the sign"
    SEVERAL_COMPARISONS = "it does not survive Holm's correction for several comparisons"


def judge(
    difference: Estimate | None, adjusted_p: float, refused: Verdict | None = None, *, seeded: bool = True
) -> Verdict:
    """Call two arms separated only if the runs bear it.

    All must hold: at least two shared seeds; the 95 % interval excludes 0; every seed's difference has the same
    sign; and the p-value, corrected by Holm for all comparisons of the study, is at most 0.05.

    Args:
        refused: what keeps the two metrics from meaning the same, whatever the numbers.
        seeded: whether a seed can change the runs; of those that train nothing, one says all that there is to say.
    """
    if difference is None or difference.n_seeds == 0:
        return Verdict.NO_SHARED_SEED
    if refused is not None:
        return refused
    if difference.n_seeds == 1 and seeded:
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
