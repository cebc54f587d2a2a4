"""One number over several tasks: the interquartile mean, which neither a broken task nor an easy one decides.

Source: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from analysis.statistics.estimates import LEVEL
from analysis.statistics.rows import DRAWS

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval and the two-sided p-value of 0; NaN where nothing tells them, as with one seed."""

    value: float
    low: float
    high: float
    p_value: float = math.nan


def interquartile_mean(scores: Array) -> Array:
    """Return (...): the mean of the middle half of the last axis; a quarter, rounded down, is left out at each end."""
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    middle: Array = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return middle


def estimate_iqm(scores: Array, *, tasks_share_runs: bool = True, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Estimate the interquartile mean over all seeds and tasks, by a bootstrap of the runs, stratified by task.

    Args:
        scores: (seeds, tasks), on scales that can be compared, such as accuracies. For a difference of two arms pass
            the scores of both to `estimate_iqm_difference`.
        tasks_share_runs: one run was scored on all tasks, so that a run is drawn with all its scores; False: each score
            is of a run of its own, and each task's are drawn for themselves.

    Returns:
        value +- t times the bootstrap's standard error. The plain percentiles of two or three seeds are far too narrow.
    """
    return estimate_iqm_difference(scores, None, tasks_share_runs=tasks_share_runs, draws=draws, seed=seed)


def estimate_iqm_difference(
    first: Array, second: Array | None, *, tasks_share_runs: bool = True, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Estimate first minus second, paired by seed and task; see `estimate_iqm`."""
    n_seeds, n_tasks = first.shape
    groups = [first] if second is None else [first, second]

    def difference(of: list[Array]) -> Array:
        pooled = [interquartile_mean(scores.reshape(*scores.shape[:-2], -1)) for scores in of]
        return pooled[0] - pooled[1] if len(pooled) == 2 else pooled[0]

    value = float(difference(groups))
    if n_seeds < 2:
        return Interval(value, math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(0, n_seeds, (draws, n_seeds, 1 if tasks_share_runs else n_tasks))
    resampled = difference([scores[drawn, np.arange(n_tasks)] for scores in groups])
    # resampling n seeds leaves out 1 / n of the variance
    error = float(resampled.std(ddof=1)) * math.sqrt(n_seeds / (n_seeds - 1))
    freedom = (n_seeds - 1) * (1 if tasks_share_runs else n_tasks)
    half_width = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p_value = 2 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
    return Interval(value, value - half_width, value + half_width, p_value)
