"""When two arms are called separated, and how often that is wrong.

In simulations of arms that do not differ, with the seeds' standard error 0, 1, 3, 5, 7 and 10 times that of the rows:

    2 arms, 2 seeds   4, 7, 12, 13, 12, 11 %   Satterthwaite's approximation is at its weakest; worst 13 %
    2 arms, 3 seeds   4, 6,  8,  7,  7,  7 %
    2 arms, 5 seeds   5, 5,  5,  4,  4,  4 %
    3 arms, 2 seeds      5,  6,  7,      4 %   at least one of 3 pairs
    6 arms, 2 seeds   3, 2,  3,  4,  2,  3 %   at least one of 15 pairs; each pair's own seeds alone: 25 to 60 %
    6 arms, one ten times as noisy as the others: 15 % with 2 seeds, 6 % with 3

The percentiles of a plain two-level bootstrap exclude 0 with two agreeing seeds in 44 % of such studies of two arms.
tests/analysis/test_analysis_statistics.py repeats the simulations, smaller.
"""

import math
from enum import Enum

from analysis.statistics.estimates import LEVEL, Estimate

FEW_SEEDS = 6  # fewer must all agree on the sign (of 6 that do by chance: 3 %); of more, some differ by chance

# Measured on simulated studies in which no arm differs (seeds' standard error 0 to 10 times that of the rows); a
# sentence for people who read an answer.
FALSE_POSITIVES = (
    "How often this is wrong: in simulated studies of two arms that do not differ, they are called separated in at "
    "most 13 % with two seeds (4 % where the noise is that of the held-out rows, 13 % where it is mostly that of the "
    "seeds), in 8 % with three and in 5 % with five. Several arms tell more about the seeds: with two seeds at least "
    "one pair is called separated wrongly in 7 % with three arms and in 4 % with six; where one of six is ten "
    "times as noisy as the others, in 15 % with two seeds and in 6 % with three."
)


class Verdict(Enum):
    """Whether two arms are separated; every other member says why not, in the order in which it is checked."""

    SEPARATED = "separated"
    NO_SHARED_SEED = "the arms share no seed that finished in both"
    OTHER_ROWS = "they were scored on other held-out rows, such as those of another task"
    OTHER_TOKENS = "their targets are counted in different tokens"
    OTHER_TARGETS = "their targets were cut at different lengths"
    ONE_SEED = "one seed cannot separate arms"
    TOO_FEW_ROWS = "there are fewer than two rows to compare"
    INTERVAL_HOLDS_ZERO = "the interval holds 0"
    SEEDS_DISAGREE = "the seeds disagree on the sign"
    SEVERAL_COMPARISONS = "it does not survive Holm's correction for several comparisons"


def judge(
    difference: Estimate | None, adjusted_p: float, refused: Verdict | None = None, *, seeded: bool = True
) -> Verdict:
    """Call two arms separated only if the runs bear it.

    All must hold: at least two shared seeds; the 95 % interval excludes 0; fewer than FEW_SEEDS seeds agree on the
    sign of the difference, every one of them; and the p-value, corrected by Holm for all comparisons of the study, is
    at most 0.05. That the sign agrees is no condition with more seeds: of many, some differ by chance alone, and the
    more seeds there were, the less could be separated.

    Args:
        refused: what keeps the two metrics from meaning the same, whatever the numbers.
        seeded: whether a seed can change the runs; of those that train nothing, one says all that there is to say.
    """
    if refused is not None:
        return refused
    if difference is None or difference.n_seeds == 0:
        return Verdict.NO_SHARED_SEED
    if difference.n_seeds == 1 and seeded:
        return Verdict.ONE_SEED
    if math.isnan(difference.standard_error):
        return Verdict.TOO_FEW_ROWS
    if difference.low <= 0 <= difference.high:
        return Verdict.INTERVAL_HOLDS_ZERO
    if (
        difference.n_seeds < FEW_SEEDS
        and len({math.copysign(1, effect) if effect else 0 for effect in difference.per_seed}) > 1
    ):
        return Verdict.SEEDS_DISAGREE
    if not adjusted_p <= 1 - LEVEL:
        return Verdict.SEVERAL_COMPARISONS
    return Verdict.SEPARATED
