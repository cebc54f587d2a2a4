"""What varies in a study, axis by axis: the values of each, compared inside blocks of equal other settings and seed."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.statistics.blocks import (
    connected,
    estimate_over_blocks,
    level_values,
    pool_block_spread,
    pool_seeds_of_blocks,
)
from analysis.statistics.estimates import Estimate
from analysis.statistics.seeds import SeedSpread
from analysis.statistics.verdicts import Verdict
from analysis.study.arms import SEED, AxisValues, axes_without_seed, label_arms
from analysis.study.comparison import MOST_ARMS_PAIRED, Comparison, Pair, judged, pairs_to_compare, refusal
from analysis.study.scores import Scores

Array = npt.NDArray[np.float64]
NOTHING = "none"
Runs = Mapping[int, tuple[str, int]]  # by block: the arm and the seed
Spreads = tuple[SeedSpread | None, SeedSpread | None]  # of blocks, and of what those of one seed have in common


@dataclass(frozen=True)
class Axis:
    """One axis, or several that the study takes as one, and the blocks that its values can be compared in.

    Attributes:
        keys: the axes taken as one.
        others: the axes whose values make a block, together with the seed.
        follow: axes that have other values where this one has: with it they change inside blocks.
        cells: one row a planned run: its `arm`, `seed`, `value` and `block`.
        asked: whether the study's question is about it.
    """

    keys: tuple[str, ...]
    others: tuple[str, ...]
    follow: tuple[str, ...]
    cells: pd.DataFrame
    asked: bool = False

    @property
    def name(self) -> str:
        return " + ".join(self.keys)

    @property
    def values(self) -> list[str]:
        return list(self.cells["value"].unique())

    @property
    def is_compared(self) -> bool:
        """Whether its values are compared: those of the question always, others where they are few."""
        return self.asked or len(self.values) <= MOST_ARMS_PAIRED

    @property
    def shared(self) -> bool:
        """Whether some block of the plan has several values."""
        return bool((self.cells.groupby("block")["value"].nunique() > 1).any())

    @property
    def connected(self) -> bool:
        """Whether the plan's blocks put all values in one order."""
        return len(connected(list(zip(self.cells["value"], self.cells["block"], strict=True)))) == 1


@dataclass(frozen=True)
class AxisComparison:
    """The values of an axis, compared.

    Attributes:
        levels: the metric of each value, the best first, with the blocks' own levels taken out: of those with finished
            runs that blocks connect; of several such groups the largest.
        apart: the other values with finished runs.
        blocks: with finished runs of two values or more.
        pairs: every two values, the better first, as far as `pairs_to_compare` goes.
        seeds: of these blocks.
    """

    axis: Axis
    levels: dict[str, float] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    blocks: int = 0
    pairs: list[Comparison] = field(default_factory=list)
    seeds: tuple[int, ...] = ()

    @property
    def of_the_best(self) -> list[Comparison]:
        best = next(iter(self.levels), None)
        return [pair for pair in self.pairs if pair.first == best]

    @property
    def answers(self) -> bool:
        """Whether it answers the question of its study."""
        return self.axis.asked and self.orders

    @property
    def orders(self) -> bool:
        """Whether it can say which value is the best: all have a place in one order, and some can be compared."""
        return self.axis.connected and self.comparable

    @property
    def comparable(self) -> bool:
        """Whether any two values have a difference that means something."""
        return any(pair.difference is not None and pair.refused is None for pair in self.pairs)


def axes_of_study(
    runs: pd.DataFrame, places: Mapping[str, AxisValues], axes: Sequence[str], question: Sequence[str] = ()
) -> list[Axis]:
    """Return the axes whose values can be compared inside blocks, that of the question first.

    An axis that changes just where an earlier one does is no axis of its own, but follows that. One that tells all arms
    apart is none either: then its values are compared as arms.

    Args:
        runs: one row a planned run, with `run_id`, `arm` and `seed`.
        places: run id -> axis -> value.
        axes: of the study, in its order.
        question: the axes that the question is about, taken as one; those that do not vary are left out, and where none
            does the first axis that varies is meant.
    """
    names = axes_without_seed(axes)
    table = pd.DataFrame(
        {axis: [str(places[run_id].get(axis, NOTHING)) for run_id in runs["run_id"]] for axis in names}, dtype=object
    )
    varying = [axis for axis in names if table[axis].nunique() > 1]
    asked = [axis for axis in varying if axis in question] or varying[:1]
    found: list[Axis] = []
    partitions: set[bytes] = set()
    for keys in (asked, *([axis] for axis in varying if axis not in asked)):
        partition = table.groupby(keys, sort=False).ngroup().to_numpy().tobytes() if keys else b""
        if not keys or partition in partitions:
            continue
        partitions.add(partition)
        axis = _axis(keys, varying, table, runs)
        is_arms = len(axis.values) == len(table.drop_duplicates())
        if axis.shared and not is_arms:
            found.append(replace(axis, asked=keys == asked))
    return found


def axis_notes(axes: Sequence[Axis]) -> list[str]:
    """Say which axes have too many values to be compared."""
    return [
        f"The {len(axis.values):,} values of {axis.name} are not compared: of an axis that the question is not about "
        f"at most {MOST_ARMS_PAIRED} are. `study.compares: [{', '.join(axis.keys)}]` makes it the question."
        for axis in axes
        if not axis.is_compared
    ]


def _axis(keys: Sequence[str], varying: Sequence[str], table: pd.DataFrame, runs: pd.DataFrame) -> Axis:
    others: list[str] = []
    dropped: list[str] = []
    arms = table[list(keys)].drop_duplicates()
    for other in (axis for axis in varying if axis not in keys):
        finer = table[[*keys, *others, other]].drop_duplicates()
        # one that the others determine tells no two runs apart that they do not
        (others if len(finer) > len(arms) else dropped).append(other)
        arms = finer if len(finer) > len(arms) else arms
    settings = table.groupby(others, sort=False).ngroup() if others else pd.Series(0, index=table.index)
    follow = [axis for axis in dropped if (table[axis].groupby(settings).nunique() > 1).any()]
    places = {str(row): dict(zip(keys, place, strict=True)) for row, place in enumerate(table[list(keys)].to_numpy())}
    labels = label_arms(places)
    seeds = pd.factorize(runs[SEED].astype(object))[0]
    cells = pd.DataFrame(
        {
            "arm": runs["arm"].to_numpy(),
            SEED: runs[SEED].to_numpy(),
            "value": list(labels.values()),
            "block": settings.to_numpy() * (seeds.max() + 2) + seeds,
        }
    )
    return Axis(tuple(keys), tuple(others), tuple(follow), cells)


def compare_values(scores: Scores, axis: Axis, goal: str) -> AxisComparison:
    """Compare every two values of an axis over the blocks that both have, with Holm's correction over these pairs."""
    runs: dict[str, dict[int, tuple[str, int]]] = defaultdict(dict)
    cells: dict[tuple[str, Hashable], float] = {}
    seeds: dict[Hashable, int] = {}
    for arm, seed, value, block in axis.cells.dropna().itertuples(index=False, name=None):
        if (arm, seed) in scores.compared:
            runs[value][block] = (arm, seed)
            cells[value, block] = scores.compared[arm, seed]
            seeds[block] = seed
    if not cells:
        return AxisComparison(axis)
    together = connected(cells)[0]
    levels = level_values({cell: metric for cell, metric in cells.items() if cell[0] in together})
    levels = dict(sorted(levels.items(), key=lambda level: level[1] if goal == "min" else -level[1]))
    apart = [value for value in runs if value not in together]
    ordered = [*levels, *apart]
    pairs = [_pair(scores, (one, runs[one]), (other, runs[other])) for one, other in pairs_to_compare(ordered)]
    # where some values are not counted alike, a spread of all has no unit
    refused = any(pair.refused for pair in pairs)
    spreads = (None, None) if refused else (pool_block_spread(cells), pool_seeds_of_blocks(cells, seeds))
    pairs = [
        replace(pair, difference=_difference(scores, pair.seeds, runs[pair.first], runs[pair.second], spreads))
        for pair in pairs
    ]
    several = [block for block, count in Counter(block for _, block in cells).items() if count > 1]
    of_several = tuple(sorted({seeds[block] for block in several}))
    return AxisComparison(axis, levels, apart, len(several), judged(pairs, len(ordered)), of_several)


def _pair(scores: Scores, first: tuple[str, Runs], second: tuple[str, Runs]) -> Pair:
    """Return two values with the blocks that both have, and why they cannot be compared if so."""
    (name, of_first), (other, of_second) = first, second
    shared = sorted(of_first.keys() & of_second.keys())
    refused = None
    if shared and scores.has_rows:
        shared = [block for block in shared if len(_rows_of(scores, of_first[block], of_second[block]))]
        arms = dict.fromkeys((of_first[block][0], of_second[block][0]) for block in shared)
        counted = (refusal(scores.other_counts(*pair)) for pair in arms)
        refused = next(filter(None, counted), None) if shared else Verdict.OTHER_ROWS
    finished = tuple(sorted(of_first)), tuple(sorted(of_second))
    return Pair(name, other, None, tuple(shared), finished, refused=refused, seeded=scores.seeded, unit="block")


def _difference(
    scores: Scores, blocks: Sequence[int], of_first: Runs, of_second: Runs, spreads: Spreads
) -> Estimate | None:
    """Estimate the first value minus the second over the blocks, each on the rows that its two runs share."""
    if not blocks:
        return None
    seeds = [of_first[block][1] for block in blocks]
    if not scores.has_rows:
        effects = [scores.values[of_first[block]] - scores.values[of_second[block]] for block in blocks]
        return estimate_over_blocks(np.array(effects), {}, 0, seeds, *spreads)
    per_block = np.empty(len(blocks))
    row_sets: list[pd.Index] = []
    draws: dict[int, Array] = {}
    for place, block in enumerate(blocks):
        (arm, seed), (other, _) = of_first[block], of_second[block]
        first, second = scores.scored([arm, other], [seed])
        per_block[place] = first.per_seed[0] - second.per_seed[0]
        rows = _rows_of(scores, of_first[block], of_second[block])
        number = next((n for n, known in enumerate(row_sets) if known is rows or known.equals(rows)), len(row_sets))
        if number == len(row_sets):
            row_sets.append(rows)
            draws[number] = np.zeros(len(first.draws))
        draws[number] += first.draws[:, 0] - second.draws[:, 0]
    return estimate_over_blocks(per_block, draws, sum(map(len, row_sets)), seeds, *spreads)


def _rows_of(scores: Scores, first: tuple[str, int], second: tuple[str, int]) -> pd.Index:
    """Return the rows that two runs of one block share."""
    return scores.shared_rows([first[0], second[0]], [first[1]])
