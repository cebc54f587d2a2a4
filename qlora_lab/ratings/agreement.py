"""How far raters agree, on single items and on the ranking of systems.

Each measure is worked out of sums over items, so that it can be had of many drawn sets of questions at once: a leading
axis of the arrays stands for the draws.
"""

from collections.abc import Sequence

import numpy as np

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
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, ([classes.index(value) for value in one], [classes.index(value) for value in other]), 1.0)
    return float(cohen_of(table))


def cohen_of(table: Floats) -> Floats:
    """Return Cohen's kappa of counts (..., classes of one, classes of the other)."""
    share = _share(table)
    return beyond_chance(_trace(share), (share.sum(-1) * share.sum(-2)).sum(-1))


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
    return float(fleiss_of(agreeing_pairs(counts).sum(), counts.sum(0), raters[0]))


def agreeing_pairs(counts: Floats) -> Floats:
    """Return the share of pairs of raters that agree, (items,), of counts (items, classes)."""
    raters = counts.sum(1)
    shares: Floats = ((counts**2).sum(1) - raters) / (raters * (raters - 1))
    return shares


def fleiss_of(agreeing: Floats, counts: Floats, raters: float) -> Floats:
    """Return Fleiss' kappa of the sum of `agreeing_pairs`, (...), and of the counts, (..., classes), over items."""
    ratings = counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = ((counts / ratings[..., None]) ** 2).sum(-1)
        return beyond_chance(agreeing * raters / ratings, chance)


def krippendorff_alpha(ratings: Floats, *, ordinal: bool = False) -> float:
    """Return Krippendorff's alpha: 1 - observed / expected disagreement, for any number of ratings an item.

    Args:
        ratings: (raters, items); NaN where a rater did not rate the item. Items with one rating are left out.
        ordinal: whether the values are ranks; otherwise they are names.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[:, :, None] == values).sum(0).astype(float)
    return float(alpha_of(coincidences(counts).sum(0), ordinal=ordinal))


def coincidences(counts: Floats) -> Floats:
    """Return how often values come together on an item, (items, values, values); counts are (items, values)."""
    raters = counts.sum(1)[:, None, None]
    own = np.eye(counts.shape[1]) * counts[:, :, None]
    result: Floats = np.where(
        raters >= 2, (counts[:, :, None] * counts[:, None, :] - own) / np.maximum(raters - 1, 1), 0
    )
    return result


def alpha_of(coincidence: Floats, *, ordinal: bool) -> Floats:
    """Return Krippendorff's alpha of `coincidences` summed over items, (..., values, values)."""
    total = coincidence.sum(-1)
    if ordinal:
        below = np.cumsum(total, axis=-1) - total / 2
        distance = (below[..., :, None] - below[..., None, :]) ** 2
    else:
        distance = np.broadcast_to(1.0 - np.eye(total.shape[-1]), coincidence.shape)
    expected = (total[..., :, None] * total[..., None, :] * distance).sum((-2, -1)) / (total.sum(-1) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected == 0, np.nan, 1 - (coincidence * distance).sum((-2, -1)) / expected)


def kendall_tau(one: Floats, other: Floats) -> Floats:
    """Return Kendall's tau-b of ratings of the same systems, (..., S) each; NaN where one has no order."""
    below, above = np.triu_indices(one.shape[-1], 1)
    mine, theirs = (np.sign(ratings[..., below] - ratings[..., above]) for ratings in (one, other))
    with np.errstate(invalid="ignore"):
        tau: Floats = (mine * theirs).sum(-1) / np.sqrt((mine**2).sum(-1) * (theirs**2).sum(-1))
    return tau


def spearman_rho(one: Floats, other: Floats) -> Floats:
    """Return Spearman's rho of ratings of the same systems, (..., S) each; NaN where one has no order."""
    from scipy.stats import rankdata  # which takes longer to import than all else here

    ranks = [rankdata(ratings, axis=-1) for ratings in (one, other)]
    mine, theirs = (its - its.mean(-1, keepdims=True) for its in ranks)
    with np.errstate(invalid="ignore"):
        rho: Floats = (mine * theirs).sum(-1) / np.sqrt((mine**2).sum(-1) * (theirs**2).sum(-1))
    return rho


def agreed(table: Floats) -> Floats:
    """Return the share of items on which two raters agree, of counts (..., classes, classes)."""
    return _trace(_share(table))


def beyond_chance(observed: Floats, chance: Floats) -> Floats:
    """Return the part of the agreement that chance leaves open; NaN where it leaves none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        part: Floats = (observed - chance) / (1 - chance)
    return part


def _share(table: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Floats = table / table.sum((-2, -1), keepdims=True)
    return share


def _trace(table: Floats) -> Floats:
    return np.trace(table, axis1=-2, axis2=-1)
