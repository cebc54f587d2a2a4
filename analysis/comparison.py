"""Every pair of arms, compared on the seeds and rows that both have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

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


@dataclass(frozen=True)
class Pair:
    """Two arms and what their shared runs say: `difference` is first minus second; None without a shared seed."""

    first: str
    second: str
    difference: Estimate | None
    rows_left_out: bool  # some of their runs have rows that others have not

    @property
    def p_value(self) -> float:
        """NaN where the pair cannot be separated whatever its numbers: Holm's correction does not count it."""
        return self.difference.p_value if self.difference is not None and self.difference.n_seeds > 1 else math.nan


@dataclass(frozen=True)
class Comparison(Pair):
    """A pair with its verdict among all comparisons of the study."""

    adjusted_p: float
    n_comparisons: int
    verdict: Verdict

    @property
    def separated(self) -> bool:
        return self.verdict is Verdict.SEPARATED


def compare_pairs(scores: Scores, arms: Sequence[str]) -> list[Comparison]:
    """Compare every two of `arms`, first minus second in their order, with Holm's correction over all of them."""
    pairs = [_pair(scores, first, second) for first, second in combinations(arms, 2)]
    adjusted = holm([pair.p_value for pair in pairs])
    return [
        Comparison(**vars(pair), adjusted_p=p, n_comparisons=len(pairs), verdict=judge(pair.difference, p))
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def _pair(scores: Scores, first: str, second: str) -> Pair:
    seeds = scores.shared_seeds(first, second)
    if not seeds:
        return Pair(first, second, None, rows_left_out=False)
    if not scores.has_rows:
        effects = [scores.values[first, seed] - scores.values[second, seed] for seed in seeds]
        return Pair(first, second, estimate_over_seeds(effects), rows_left_out=False)
    scored = scores.scored([first, second], seeds)
    if not scored:
        return Pair(first, second, None, rows_left_out=True)
    return Pair(first, second, estimate_difference(*scored), scores.leaves_rows_out([first, second], seeds))


def estimate_of_arm(scores: Scores, arm: str) -> Estimate | None:
    """Estimate one arm's metric over its seeds and rows; None where no run of it can be used."""
    seeds = scores.seeds(arm)
    if not seeds:
        return None
    if not scores.has_rows:
        return estimate_over_seeds([scores.values[arm, seed] for seed in seeds])
    scored = scores.scored([arm], seeds)
    return estimate_arm(scored[0]) if scored else None
