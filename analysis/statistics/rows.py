"""A metric as held-out rows make it, and as other rows would: a bootstrap over the rows of each set.

Rows are the same in every run, so that rows and seeds are crossed, not nested: the same rows are drawn for every seed
and for all arms.

Source: Owen 2007, "The pigeonhole bootstrap" (crossed resampling).
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
DRAWS = 2000
COUNTS_IN_MEMORY = 2**22  # of the bootstrap, at once


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
