"""What matters: how much of a metric's variance between runs goes with each axis, with the seed, and with the rest.

A run's metric is the sum of a main effect of each axis, of what the axes do only together, and of its seed:

    axes          least squares; where runs are missing, so that axes overlap, the mean over all orders in which the
                  axes can be counted (Shapley's value, in statistics: Lindeman, Merenda and Gold's). The shares add up
                  whatever is missing, and `overlap` says how much of one depends on the order
    nested axes   where an axis has values of its own inside each value of an earlier one, as ranks that were chosen
                  for each placement, it is counted after that one, always, and named `rank within placement`: the
                  placements' share holds whatever their ranks have in common, which nothing can tell apart. An axis
                  that earlier ones determine (a learning rate for each model) is no source: its share is theirs
    interactions  what the means of the arms have beyond the main effects
    seed          the spread of runs of one arm, which differ by the seed alone

Chance gives every axis some variance. Each sum of squares is reduced by what seeds alone would give it (as epsilon
squared is). The interval of a share inverts the noncentral F distribution, with the other shares as they are.
With one seed an arm, interactions cannot be told from chance: they are the yardstick, and are called so.

Sources: Gromping 2007, "Estimators of relative importance in linear regression based on variance decomposition";
Steiger 2004, "Beyond the F test" (intervals).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import fdtrc, ncfdtr

from analysis.statistics.estimates import LEVEL
from qlora_lab.errors import ConfigError

Array = npt.NDArray[np.float64]
COLUMNS = ("source", "freedom", "share", "low", "high", "p", "overlap")
INTERACTIONS, CHANCE, SEED = "interactions", "interactions and chance", "seed"
MOST_AXES = 8  # 256 fits


@dataclass(frozen=True)
class _Part:
    """A source of variance: its sum of squares, its degrees of freedom, and how far both depend on an order."""

    source: str
    squares: float
    freedom: float
    overlap: float = 0.0  # a share of the whole sum of squares


def split_variance(runs: pd.DataFrame, axes: Sequence[str], metric: str) -> pd.DataFrame:
    """Split the variance of a metric between runs by what varies.

    Args:
        runs: one row a run, with `metric` and a column for each axis. Runs without the metric do not count.
        axes: the columns that vary, without the seed, the leading ones first. Axes that always change together are one
            (`a + b`); one that does not vary, or that those before it determine, is left out.

    Returns:
        One row a source, the largest share first, `seed` and `interactions` among them: `source`, `freedom` (degrees
        of it), `share` (of the variance, 0 to 1, all together 1), `low` and `high` (its 95 % interval), `p` (of no
        effect), and `overlap` (how much the share may change with the order in which axes are counted: 0 where every
        combination has as many runs). Empty where fewer than two arms or no spread can be seen; intervals are NaN where
        no run is left to tell chance.

    Raises:
        ConfigError: more than MOST_AXES axes vary.
    """
    runs = runs[np.isfinite(runs[metric].to_numpy(dtype=float))]
    codes = _distinct(runs, axes)
    if len(codes) > MOST_AXES:
        raise ConfigError(f"variance is split by at most {MOST_AXES} axes; got {len(codes)}: {', '.join(codes)}")
    values = runs[metric].to_numpy(dtype=float)
    if not codes or not float(values.var()) > 0:
        return pd.DataFrame(columns=list(COLUMNS))
    return _shares(_parts(values, codes), len(values))


def _distinct(runs: pd.DataFrame, axes: Sequence[str]) -> dict[str, npt.NDArray[np.intp]]:
    """Return the values of each axis as numbers; of axes that always change together one, named by all."""
    names: dict[bytes, list[str]] = {}
    codes: dict[bytes, npt.NDArray[np.intp]] = {}
    for axis in axes:
        numbers, _ = pd.factorize(runs[axis].map(str))
        if len(numbers) and numbers.max() > 0:
            names.setdefault(numbers.tobytes(), []).append(axis)
            codes[numbers.tobytes()] = numbers
    found: dict[str, npt.NDArray[np.intp]] = {}
    for key, numbers in codes.items():
        if _cells([*found.values(), numbers]) > _cells([*found.values()]):
            found[" + ".join(names[key])] = numbers
    return found


def _cells(codes: Sequence[npt.NDArray[np.intp]]) -> int:
    """Count the combinations of values that runs have."""
    return len(np.unique(np.stack(codes, axis=1), axis=0)) if codes else 1


def _parents(codes: Sequence[npt.NDArray[np.intp]]) -> list[set[int]]:
    """Return, for each axis, the earlier axes that it is nested in: its value tells theirs."""
    return [
        {other for other in range(axis) if _cells([codes[other], codes[axis]]) == _cells([codes[axis]])}
        for axis in range(len(codes))
    ]


def _parts(values: Array, codes: dict[str, npt.NDArray[np.intp]]) -> list[_Part]:
    arms, arm_of, counts = np.unique(
        np.stack(list(codes.values()), axis=1), axis=0, return_inverse=True, return_counts=True
    )
    arm_of = arm_of.ravel()
    means = np.bincount(arm_of, values) / counts
    within = float(((values - means[arm_of]) ** 2).sum())
    weight = np.sqrt(counts)
    centered = weight * (means - values.mean())
    columns = [np.equal.outer(arms[:, axis], np.unique(arms[:, axis])) for axis in range(len(codes))]

    def explained(subset: tuple[int, ...]) -> tuple[float, int]:
        """Return the sum of squares that main effects of some axes explain, and their degrees of freedom."""
        design = np.hstack([np.ones((len(arms), 1)), *(columns[axis] for axis in subset)]) * weight[:, None]
        effects, _, rank, _ = np.linalg.lstsq(design, centered, rcond=1e-9)
        return float(((design @ effects) ** 2).sum()), int(rank) - 1

    everything = tuple(range(len(codes)))
    parents = _parents(list(codes.values()))
    fits = {
        subset: explained(subset)
        for size in range(len(codes) + 1)
        for subset in combinations(everything, size)
        if all(parents[axis] <= set(subset) for axis in subset)
    }
    total = float(((values - values.mean()) ** 2).sum())
    names = list(codes)
    parts = [
        _of_axis(" within ".join([name, *(names[parent] for parent in sorted(parents[axis]))]), axis, fits, total)
        for axis, name in enumerate(names)
    ]
    main_squares, main_freedom = fits[everything]
    lack = max(float((centered**2).sum()) - main_squares, 0.0)
    free_arms, free_runs = len(arms) - 1 - main_freedom, len(values) - len(arms)
    if free_arms:
        parts.append(_Part(INTERACTIONS if free_runs else CHANCE, lack, free_arms))
    if free_runs:
        parts.append(_Part(SEED, within, free_runs))
    return parts


def _of_axis(name: str, axis: int, fits: dict[tuple[int, ...], tuple[float, int]], total: float) -> _Part:
    """Return what an axis adds to the others, as a mean over all orders in which they can be counted.

    Args:
        fits: of the subsets that such an order can begin with: of each axis those that it is nested in are there too.
    """
    squares = freedom = 0.0
    added = []
    begin, end = _orders(fits), _orders(fits, backwards=True)
    n_orders = begin[max(fits, key=len)]
    for subset, (without, rank_without) in fits.items():
        more = tuple(sorted((*subset, axis)))
        if axis in subset or more not in fits:
            continue
        with_it, rank_with = fits[more]
        share_of_orders = begin[subset] * end[more] / n_orders
        squares += share_of_orders * (with_it - without)
        freedom += share_of_orders * (rank_with - rank_without)
        added.append(with_it - without)
    overlap = (max(added) - min(added)) / total
    return _Part(name, squares, freedom, overlap if overlap > 1e-9 else 0.0)


def _orders(subsets: Collection[tuple[int, ...]], *, backwards: bool = False) -> dict[tuple[int, ...], int]:
    """Count the orders in which each subset can be filled axis by axis, or, backwards, those that fill the rest."""
    counts: dict[tuple[int, ...], int] = {}
    everything = max(subsets, key=len)
    for subset in sorted(subsets, key=len, reverse=backwards):
        neighbours = (
            [tuple(sorted((*subset, axis))) for axis in everything if axis not in subset]
            if backwards
            else [tuple(other for other in subset if other != axis) for axis in subset]
        )
        counts[subset] = sum(counts.get(other, 0) for other in neighbours) or int(not neighbours)
    return counts


def _shares(parts: list[_Part], n_runs: int) -> pd.DataFrame:
    yardstick = parts[-1] if parts[-1].source in (SEED, CHANCE) else None
    noise = yardstick.squares / yardstick.freedom if yardstick else 0.0
    effects = [part for part in parts if part is not yardstick]
    # in units of the variance of one run
    variances = [max(part.squares - part.freedom * noise, 0.0) / n_runs for part in effects]
    total = sum(variances) + noise
    rows = []
    for part, variance in zip(effects, variances, strict=True):
        low, high, p = math.nan, math.nan, math.nan
        if yardstick is not None and part.freedom > 0:
            low, high, p = _bounds(part, yardstick, n_runs, others=total - variance)
        rows.append((part.source, part.freedom, variance / total, low, high, p, part.overlap))
    if yardstick is not None:
        every = _Part("", sum(part.squares for part in effects), sum(part.freedom for part in effects))
        low, high, _ = _bounds(every, yardstick, n_runs, others=noise)
        rows.append((yardstick.source, yardstick.freedom, noise / total, 1 - high, 1 - low, math.nan, 0.0))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)


def _bounds(part: _Part, yardstick: _Part, n_runs: int, others: float) -> tuple[float, float, float]:
    """Return the interval of a part's share of its variance and `others`, and the p-value of no effect."""
    noise = yardstick.squares / yardstick.freedom
    if noise == 0:
        share = part.squares / n_runs / (part.squares / n_runs + others) if part.squares else 0.0
        return share, share, 0.0 if part.squares else 1.0
    ratio = part.squares / part.freedom / noise
    tail = (1 - LEVEL) / 2
    limits = [_noncentrality(ratio, part.freedom, yardstick.freedom, level) for level in (1 - tail, tail)]
    low, high = (limit * noise / n_runs / (limit * noise / n_runs + others) for limit in limits)
    return low, high, float(fdtrc(part.freedom, yardstick.freedom, ratio))


def _noncentrality(ratio: float, freedom: float, free_noise: float, level: float) -> float:
    """Return the noncentrality under which F is below `ratio` with a chance of `level`; 0 where none is so small."""
    low, high = 0.0, 1.0
    if ncfdtr(freedom, free_noise, low, ratio) <= level:
        return 0.0
    while ncfdtr(freedom, free_noise, high, ratio) > level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ncfdtr(freedom, free_noise, middle, ratio) > level else (low, middle)
    return low
