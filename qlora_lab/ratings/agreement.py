"""How far raters agree, on single items and on the ranking of systems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qlora_lab.errors import ShapeError
from qlora_lab.ratings.matches import Floats


def cohen_kappa(one: Sequence[object], other: Sequence[object]) -> float:
    """Return the agreement of two raters on the same items beyond chance; NaN where both always say the same.

    Raises:
        ShapeError: they did not rate the same number of items.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    if len(one) != len(other) or not one:
        raise ShapeError(f"two raters must rate the same items, one at least; got {len(one)} and {len(other)}")
    classes = sorted({*one, *other}, key=str)
    table = np.array([[sum(pair == (a, b) for pair in zip(one, other, strict=True)) for b in classes] for a in classes])
    table = table / table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    return float("nan") if chance == 1 else float((np.trace(table) - chance) / (1 - chance))


def fleiss_kappa(counts: Floats) -> float:
    """Return the agreement of a fixed number of raters beyond chance.

    Args:
        counts: (items, classes); how many raters put the item into the class. Every row has the same sum, 2 or more.

    Raises:
        ShapeError: the rows have other sums.

    Source: Fleiss 1971, "Measuring nominal scale agreement among many raters".
    """
    raters = counts.sum(1)
    if counts.ndim != 2 or len(counts) == 0 or raters.min() != raters.max() or raters[0] < 2:
        raise ShapeError(f"each item must have the same number of ratings, 2 or more; got {sorted(set(raters))}")
    observed = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return float("nan") if chance == 1 else float((observed.mean() - chance) / (1 - chance))


def krippendorff_alpha(ratings: Floats, *, ordinal: bool = False) -> float:
    """Return Krippendorff's alpha: 1 - observed / expected disagreement, for any number of ratings an item.

    Args:
        ratings: (raters, items); NaN where a rater did not rate the item. Items with one rating are left out.
        ordinal: whether the values are ranks; otherwise they are names.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0).astype(float)  # (items, values)
    counts = counts[counts.sum(1) >= 2]
    size = counts.sum(1)[:, None, None]
    coincidence = (
        (counts[:, :, None] * counts[:, None, :] - np.eye(len(values)) * counts[:, :, None]) / (size - 1)
    ).sum(0)
    total = coincidence.sum(0)
    if ordinal:
        below = np.cumsum(total) - total / 2
        distance = (below[:, None] - below[None, :]) ** 2
    else:
        distance = 1.0 - np.eye(len(values))
    expected = (np.outer(total, total) * distance).sum() / (total.sum() - 1)
    return float("nan") if expected == 0 else float(1 - (coincidence * distance).sum() / expected)


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of two ratings of the same systems."""

    kendall_tau: float
    spearman_rho: float


def rank_agreement(one: Sequence[float], other: Sequence[float]) -> RankAgreement:
    """Compare two ratings of the same systems, in the same order."""
    tau, rho = stats.kendalltau(one, other), stats.spearmanr(one, other)
    return RankAgreement(float(tau.statistic), float(rho.statistic))
