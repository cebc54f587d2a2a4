"""Values of one axis, compared inside blocks: runs that share every other setting and the seed.

A block's own level (a large model, a hard task, a lucky seed) is in all its runs and drops out of their differences, so
that blocks may be as far apart as they like. A difference is averaged over the blocks that have both values. Its
variance has the two parts of `estimates`, with blocks in the place of seeds:

    rows    bootstrap over held-out rows. Blocks that were scored on the same rows are drawn alike, so that rows are
            crossed with blocks; of blocks with other rows the variances add up. There the spread of the blocks has the
            rows' noise in it as well: the interval is then too wide rather than too narrow
    blocks  the spread of the pair's own differences. A bootstrap of whole blocks has this variance: for a mean it can
            be written down, n / (n - 1) times the resampled one. Of fewer than OWN_BLOCKS blocks, which say little of
            their own spread, at least that of a run's metric around the levels of its value and its block, pooled over
            all values of the axis
    seeds   where there are two or more: that spread again, of one difference a seed (the mean over its blocks), because
            runs of one seed draw the same training rows in all settings, and what a draw does for a value is then in
            all their blocks. The larger of the two standard errors counts, with its own degrees of freedom: of
            two values and two seeds that is one, so that few true differences are found

The difference is that over the settings of this study, which somebody chose: how it varies between them widens the
interval, but of settings that were not tried it says nothing. Nor does it of other seeds where there is one: what its
draw does cannot be told from what a value does, blocks are taken as independent, and the sentence names the seed.

Of simulated studies of values that do not differ, at least one pair of values was called separated in

    one seed (300 studies each)
    2 values, 2 or 4 blocks             4 and 6 %; one value ten times as noisy as the other: 4 and 8 %
    7 values, 2, 4, 11 or 15 blocks     2, 3, 1 and 4 %; one of them ten times as noisy: 15, 8, 2 and 3 %

    more seeds (600 each); what value and seed have in common is 0, 1, 2, 4 and 10 times the noise of a seed's mean
    2 values, 4 settings, 2 seeds       5, 6,  9,  9, 7 %  by block alone 1 and 4 times would give 12 and 38 %
    2 values, 8 settings, 2 seeds       3, 7, 13, 13, 9 %                                          17 and 47 %
    2 values, 16 settings, 2 seeds      4, 5, 11, 13, 6 %                                          16 and 58 %
    2 values, 4 settings, 3 seeds       4, 3,  5,  6, 5 %                                          11 and 39 %
    2 values, 8 settings, 5 seeds       3, 4,  5,  9, 4 %                                          14 and 40 %
    3 values, 4 settings, 2 seeds       2, 5,  7,  8, 2 %                                          14 and 46 %
    7 values, 4 settings, 2 seeds       2, 3,  4,  3, 2 %                                          18 and 75 %
    7 values, 16 settings, 2 seeds      1, 5,  2,  2, 2 %                                          30 and 97 %
    with one value ten times as noisy as the others, in 5 % at most

Holm's correction is over the pairs of one axis: of a study with several axes each has these rates of its own.
tests/analysis/test_axes.py repeats some of it, smaller.

Source: Montgomery, "Design and analysis of experiments", chapter 4 (randomized complete and incomplete blocks).
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from analysis.statistics.estimates import Estimate, estimate_from_units, variance_of_units
from analysis.statistics.seeds import SeedSpread, pool_seed_spread

Array = npt.NDArray[np.float64]
OWN_BLOCKS = 12

# Measured as above; a sentence for people who read an answer.
FALSE_POSITIVES_IN_BLOCKS = (
    "How often this is wrong: in simulated studies of values that do not differ, at least one pair of an axis is "
    "called separated in at most 13 % with two values and two seeds, in 9 % with two values and more seeds, and in 8 % "
    "with three or more values. With one seed it is 2 to 6 % (15 % of seven values in two blocks where one is ten "
    "times as noisy as the others), as far as the seed itself favours no value, which one seed cannot tell. Holm's "
    "correction is for each axis alone: with several axes the chance that one of them is wrong adds up."
)
Cells = Mapping[tuple[str, Hashable], float]  # the metric by (value, block)


def connected(cells: Collection[tuple[str, Hashable]]) -> list[set[str]]:
    """Return the values in groups that chains of shared blocks connect, the largest group first."""
    blocks: dict[Hashable, set[str]] = defaultdict(set)
    for value, block in cells:
        blocks[block].add(value)
    groups: list[set[str]] = []
    for values in blocks.values():
        apart = [group for group in groups if not group & values]
        groups = [*apart, values.union(*(group for group in groups if group & values))]
    return sorted(groups, key=len, reverse=True)


def level_values(cells: Cells) -> dict[str, float]:
    """Return the level of each value with the blocks' own levels taken out, by least squares: metric = value + block.

    With all cells there these are the means of the values. Where some are missing, a value is not better for being
    there in the easy blocks only. Only levels of `connected` values can be compared.
    """
    values, value_of = np.unique([value for value, _ in cells], return_inverse=True)
    metric = np.array(list(cells.values()), dtype=float)
    numbers: dict[Hashable, int] = {}
    block_of = np.array([numbers.setdefault(block, len(numbers)) for _, block in cells])
    table = np.column_stack([metric, np.equal.outer(value_of, np.arange(values.size))])
    sums = np.zeros((len(numbers), table.shape[1]))
    np.add.at(sums, block_of, table)
    table -= (sums / np.bincount(block_of)[:, None])[block_of]  # takes out the blocks' own means
    effects, *_ = np.linalg.lstsq(table[:, 1:], table[:, 0], rcond=1e-9)
    level = float((metric - effects[value_of]).mean())
    return {str(value): level + float(effect) for value, effect in zip(values, effects, strict=True)}


def without_blocks(cells: Cells) -> dict[tuple[str, Hashable], float]:
    """Return the cells with the level of each one's block replaced by the mean of these levels, so that values remain.

    Of values that are not `connected`, only differences within a group mean something.
    """
    levels = level_values(cells)
    rests: dict[Hashable, list[float]] = defaultdict(list)
    for (value, block), metric in cells.items():
        rests[block].append(metric - levels[value])
    of_block = {block: float(np.mean(rest)) for block, rest in rests.items()}
    mean = float(np.mean([of_block[block] for _, block in cells]))
    return {(value, block): metric - of_block[block] + mean for (value, block), metric in cells.items()}


def pool_block_spread(cells: Cells) -> SeedSpread | None:
    """Estimate how far a run is from the levels of its value and its block; None where no residual is left."""
    numbers: dict[str, int] = {}
    # of the two factors the one with many levels is taken out first, which is what this function does with arms
    return pool_seed_spread(
        {(str(block), numbers.setdefault(value, len(numbers))): metric for (value, block), metric in cells.items()}
    )


def pool_seeds_of_blocks(cells: Cells, seeds: Mapping[Hashable, int]) -> SeedSpread | None:
    """Estimate how far a value's mean over the blocks of one seed is from the levels of the value and the seed.

    Args:
        seeds: of each block.

    Returns:
        None where no residual is left, as with one seed.
    """
    by_seed: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (value, block), metric in without_blocks(cells).items():
        by_seed[value, seeds[block]].append(metric)
    return pool_seed_spread({place: float(np.mean(metrics)) for place, metrics in by_seed.items()})


def estimate_over_blocks(
    per_block: Array,
    row_draws: Mapping[int, Array],
    n_rows: int,
    seeds: Sequence[int] = (),
    spread: SeedSpread | None = None,
    of_seeds: SeedSpread | None = None,
) -> Estimate:
    """Estimate the mean difference of two values over the blocks that have both.

    Args:
        per_block: (blocks,) first minus second.
        row_draws: by set of held-out rows: (draws,) the sum over its blocks of the difference on resampled rows; empty
            where no rows stand behind the metric.
        n_rows: distinct rows, of all sets.
        seeds: of each block; none: blocks share nothing.
        spread: of the runs, pooled over all values of the axis.
        of_seeds: the spread of means over the blocks of one seed, pooled over all values.

    Returns:
        `per_seed`, `n_seeds`, `seed_variance` and `seed_freedom` are then of blocks, or the latter two of seeds where
        these limit it (`limiting_seeds`).
    """
    if per_block.size >= OWN_BLOCKS:
        spread = None
    variances = [float((draws / per_block.size).var(ddof=1)) for draws in row_draws.values()]
    row_variance = sum(variances) if variances else None
    by_block = variance_of_units(per_block, spread)
    by_seed = _values_by_seed(per_block, np.asarray(seeds))
    of_seed = variance_of_units(by_seed, of_seeds)
    if by_seed.size > 1 and of_seed[0] / by_seed.size > by_block[0] / per_block.size:
        found = estimate_from_units(per_block, of_seed, by_seed.size, row_variance, n_rows)
        return replace(found, limiting_seeds=by_seed.size)
    return estimate_from_units(per_block, by_block, per_block.size, row_variance, n_rows)


def _values_by_seed(per_block: Array, seeds: npt.NDArray[np.int64]) -> Array:
    """Return a difference for each seed, whose mean is that of the blocks; none where seeds are not shared by blocks.

    Where seeds have unequal numbers of blocks their variance is the usual one of clusters: the sum of each one's
    deviations.
    """
    each, number = np.unique(seeds, return_inverse=True)
    if not 1 < each.size < per_block.size:
        return np.empty(0)
    center = per_block.mean()
    return center + np.bincount(number, per_block - center) * each.size / per_block.size
