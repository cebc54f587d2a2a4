"""Pairs of arms, compared on the seeds and rows that both have."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from analysis.statistics.estimates import Estimate, estimate_arm, estimate_difference, estimate_over_seeds
from analysis.statistics.holm import holm
from analysis.statistics.seeds import SeedSpread, pool_seed_spread
from analysis.statistics.verdicts import Verdict, judge
from analysis.study.scores import Scores

MOST_ARMS_PAIRED = 20  # 190 pairs; of more arms, each is compared with the best alone
Spreads = Mapping[str, SeedSpread | None]  # by arm


@dataclass(frozen=True)
class Pair:
    """Two arms, or two values of an axis, and what their shared runs say.

    Attributes:
        difference: first minus second; None without a shared seed or row.
        seeds: those that both can be compared on; of values of an axis, the blocks.
        finished: the seeds behind the mean of each in the table.
        rows_left_out: some of their runs have rows that others have not.
        refused: why a difference, though both have finished runs, compares nothing.
        seeded: whether the runs trained, so that a seed can change them.
        unit: what each effect of the difference is of, `seed` or `block`.
    """

    first: str
    second: str
    difference: Estimate | None
    seeds: tuple[int, ...]
    finished: tuple[tuple[int, ...], tuple[int, ...]]
    rows_left_out: bool = False
    refused: Verdict | None = None
    seeded: bool = True
    unit: str = "seed"

    @property
    def p_value(self) -> float:
        """NaN where the pair cannot be separated whatever its numbers: Holm's correction does not count it."""
        if self.difference is None or self.difference.n_seeds < 1 + self.seeded or self.refused is not None:
            return math.nan
        return self.difference.p_value

    @property
    def seeds_left_out(self) -> bool:
        """Whether the table's mean of one of the arms has seeds that this comparison has not."""
        return any(of_arm != self.seeds for of_arm in self.finished)


@dataclass(frozen=True)
class Comparison(Pair):
    """A pair with its verdict among all comparisons of the study."""

    adjusted_p: float = math.nan
    n_comparisons: int = 1  # that the correction counts
    verdict: Verdict = Verdict.NO_SHARED_SEED

    @property
    def separated(self) -> bool:
        return self.verdict is Verdict.SEPARATED

    @property
    def reason(self) -> str:
        """The verdict in words, in the pair's own unit."""
        return self.verdict.value.replace("seed", self.unit)

    @property
    def unit_needed(self) -> str:
        """What more of would tell it apart, and what its effect size is measured by: blocks are no help where the
        draws of the seeds limit it."""
        return "seed" if self.difference is not None and self.difference.limiting_seeds else self.unit

    def favours_first(self, goal: str) -> bool:
        """Say whether the first arm did better on the seeds and rows that both have."""
        return self.difference is not None and (self.difference.value < 0) == (goal == "min")


def compare_pairs(scores: Scores, arms: Sequence[str]) -> list[Comparison]:
    """Compare every two of `arms`, the best first, with Holm's correction over all of them.

    Of more than MOST_ARMS_PAIRED arms only the first is compared, with each of the others. The correction counts all
    pairs even then, because the best of many arms was found by looking at all of them: in simulated studies of 24
    arms that do not differ, counting only the pairs that are made calls one of them separated in 20 %, this in 3 %.
    """
    spreads = _pooled_spreads(scores, arms)
    return judged([_pair(scores, first, second, spreads) for first, second in pairs_to_compare(arms)], len(arms))


def judged(pairs: Sequence[Pair], n_compared: int) -> list[Comparison]:
    """Return each pair's verdict, with Holm's correction over every two of `n_compared`, made or not."""
    n_comparisons = math.comb(n_compared, 2) - sum(math.isnan(pair.p_value) for pair in pairs)
    adjusted = holm([pair.p_value for pair in pairs], n_comparisons)
    return [
        Comparison(
            **vars(pair),
            adjusted_p=p,
            n_comparisons=n_comparisons,
            verdict=judge(pair.difference, p, pair.refused, seeded=pair.seeded),
        )
        for pair, p in zip(pairs, adjusted, strict=True)
    ]


def pairs_to_compare(ordered: Sequence[str]) -> list[tuple[str, str]]:
    """Return every two of them, the better first; of more than MOST_ARMS_PAIRED the best with each of the others."""
    if len(ordered) <= MOST_ARMS_PAIRED:
        return list(combinations(ordered, 2))
    return [(ordered[0], other) for other in ordered[1:]]


def _pooled_spreads(scores: Scores, arms: Sequence[str]) -> Spreads:
    """Pool the seeds' spread over the arms whose targets are counted alike: nats a token have a size of their own."""
    groups: list[list[str]] = []
    for arm in arms:
        alike = (group for group in groups if not scores.other_counts(group[0], arm))
        group = next(alike, None)
        if group is None:
            groups.append([arm])
        else:
            group.append(arm)
    of_group = [
        pool_seed_spread({(arm, seed): scores.compared[arm, seed] for arm in group for seed in scores.seeds(arm)})
        for group in groups
    ]
    return {arm: spread for group, spread in zip(groups, of_group, strict=True) for arm in group}


def _pair(scores: Scores, first: str, second: str, spreads: Spreads) -> Pair:
    seeds = tuple(scores.shared_seeds(first, second))
    finished = scores.finished_seeds(first), scores.finished_seeds(second)
    pair = Pair(first, second, None, seeds, finished, seeded=scores.seeded)
    if not seeds:
        return pair
    if not scores.has_rows:
        effects = [scores.values[first, seed] - scores.values[second, seed] for seed in seeds]
        return replace(pair, difference=estimate_over_seeds(effects, spreads[first]))
    scored = scores.scored([first, second], seeds)
    if not scored:
        return replace(pair, refused=Verdict.OTHER_ROWS)
    refused = refusal(scores.other_counts(first, second))
    return replace(
        pair,
        # arms that are refused have no spread in common
        difference=estimate_difference(scored[0], scored[1], None if refused else spreads[first]),
        rows_left_out=scores.leaves_rows_out([first, second], seeds),
        refused=refused,
    )


def refusal(other_counts: frozenset[str]) -> Verdict | None:
    """Say why a metric does not mean the same in two arms whose targets differ in these counts."""
    if "target_bytes" in other_counts:
        return Verdict.OTHER_TARGETS
    return Verdict.OTHER_TOKENS if other_counts else None


def estimate_of_arm(scores: Scores, arm: str) -> Estimate | None:
    """Estimate one arm's metric over its seeds and rows; None where no run of it can be used."""
    seeds = scores.seeds(arm)
    if not seeds:
        return None
    if not scores.has_rows:
        return estimate_over_seeds([scores.values[arm, seed] for seed in seeds])
    scored = scores.scored([arm], seeds)
    return estimate_arm(scored[0]) if scored else None
