"""A metric over seeds: its mean and spread, and the seeds' spread pooled over the arms of a study."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


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
