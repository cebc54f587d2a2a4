"""Every pair of arms, compared on the seeds and rows that both have."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from analysis.scores import Scores
from analysis.statistics import (
    Estimate,
    Verdict,
    estimate_arm,
    estimate_difference,
    estimate_over_seeds,
    holm,
    judge,
)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two arms and what their shared runs say: `difference` is first minus second; None without a shared seed."""

    first: str
    second: str
    difference: Estimate | None
    row_differences: Array  # (rows,) on each row alone, mean over seeds; empty where the metric has no rows
    rows_left_out: bool

    @property
    def p_value(self) -> float:
        """NaN where the pair cannot be separated whatever its numbers: Holm's correction does not count it."""
        return self.difference.p_value if self.difference is not None and self.difference.n_seeds > 1 else np.nan


@dataclass(frozen=True)
class Comparison(Pair):
    """A pair with its verdict among all comparisons of the study."""

    adjusted_p: float
    n_comparisons: int
    verdict: Verdict

    @property
    def separated(self) -> bool:
        return self.verdict is Verdict.SEPARATED


def compare_pairs(scores: Scores, arms: Sequence[str], rng: np.random.Generator, draws: int) -> list[Comparison]:
    """Compare every two of `arms`, first minus second in their order, with Holm's correction over all of them."""
    pairs = [_pair(scores, first, second, rng, draws) for first, second in combinations(arms, 2)]
    adjusted = holm([pair.p_value for pair in pairs])
    return [
        Comparison(**vars(pair), adjusted_p=p, n_comparisons=len(pairs), verdict=judge(pair.difference, p))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def _pair(scores: Scores, first: str, second: str, rng: np.random.Generator, draws: int) -> Pair:
    seeds = [seed for seed in scores.seeds(first) if seed in scores.seeds(second)]
    no_rows = np.empty(0)
    if not seeds:
        return Pair(first, second, None, no_rows, rows_left_out=False)
    if not scores.has_rows:
        effects = [scores.values[first, seed] - scores.values[second, seed] for seed in seeds]
        return Pair(first, second, estimate_over_seeds(effects), no_rows, rows_left_out=False)
    lined_up = scores.line_up([first, second], seeds)
    if lined_up.n_rows == 0:
        return Pair(first, second, None, no_rows, rows_left_out=True)
    one, other = lined_up.arms
    difference = estimate_difference(one, other, rng, draws)
    return Pair(first, second, difference, lined_up.row_differences(), lined_up.rows_left_out)


def estimate_of_arm(scores: Scores, arm: str, rng: np.random.Generator, draws: int) -> Estimate | None:
    """Estimate one arm's metric over its seeds and rows; None where no run of it can be used."""
    seeds = scores.seeds(arm)
    if not seeds:
        return None
    if not scores.has_rows:
        return estimate_over_seeds([scores.values[arm, seed] for seed in seeds])
    lined_up = scores.line_up([arm], seeds)
    return estimate_arm(lined_up.arms[0], rng, draws) if lined_up.n_rows else None
