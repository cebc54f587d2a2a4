"""The estimates against numbers worked out by hand, and against simulated studies whose truth is known."""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import rows
from analysis.statistics.estimates import Estimate, estimate_arm, estimate_difference, estimate_over_seeds
from analysis.statistics.holm import holm
from analysis.statistics.rows import DRAWS, Ratios, Scored, score
from analysis.statistics.seeds import SeedSpread, pool_seed_spread, summarize
from analysis.statistics.verdicts import Verdict, judge

T_975_DF1 = 12.706204736  # Student's t, from any table


def arm_of(sets: Sequence[Ratios], draws: int = DRAWS) -> Estimate:
    return estimate_arm(score(sets, 0, draws))


def difference_of(first: Sequence[Ratios], second: Sequence[Ratios], draws: int = DRAWS, seed: int = 0) -> Estimate:
    return estimate_difference(score(first, seed, draws), score(second, seed, draws))


def ratios(numerator: list[list[float]], denominator: list[list[float]]) -> Ratios:
    return Ratios(np.array(numerator), np.array(denominator))


def test_summary_uses_the_sample_deviation_and_leaves_missing_values_out() -> None:
    summary = summarize([1.0, 2.0, math.nan, 6.0])
    assert (summary.mean, summary.n) == (3.0, 3)
    assert summary.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(summarize([4.0]).std)
    assert math.isnan(summarize([math.nan]).mean)


def test_the_difference_is_that_of_the_reported_metric() -> None:
    # loss sums 2 + 8 over 4 + 4 tokens is 1.25; 3 + 3 over 4 + 8 is 0.5: not the mean of the rows' own losses
    first = ratios([[2.0, 8.0]], [[4.0, 4.0]])
    second = ratios([[3.0, 3.0]], [[4.0, 8.0]])
    assert difference_of([first], [second]).value == pytest.approx(0.75)


def test_several_sets_weigh_the_same_however_many_rows_they_have() -> None:
    small = ratios([[1.0, 1.0]], [[1.0, 1.0]])
    large = ratios([[3.0] * 50], [[1.0] * 50])
    estimate = arm_of([small, large])
    assert estimate.value == 2.0
    assert estimate.n_rows == 52


def test_the_variance_of_a_mean_over_sets_is_the_sum_over_the_square_of_their_number() -> None:
    random = np.random.default_rng(9)
    sets = [Ratios(random.gamma(2, 1, (1, 50)), np.ones((1, 50))) for _ in range(2)]
    alone = [arm_of([one], draws=8000).standard_error for one in sets]
    together = arm_of(sets, draws=8000).standard_error
    assert together == pytest.approx(math.hypot(*alone) / 2, rel=0.05)  # 8,000 draws: 0.8 % standard error each


def test_seeds_alone_give_the_paired_t_test() -> None:
    effects = [0.2, 0.4]
    estimate = estimate_over_seeds(effects)
    # mean 0.3, deviation sqrt(0.02), standard error 0.1
    assert estimate.standard_error == pytest.approx(0.1)
    assert estimate.half_width == pytest.approx(T_975_DF1 * 0.1)
    assert estimate.p_value == pytest.approx(stats.ttest_1samp(effects, 0).pvalue)


def test_seeds_that_agree_on_equal_rows_leave_the_variance_of_the_seeds() -> None:
    # every row differs by 0.2 for the first seed and by 0.4 for the second: resampling rows changes nothing
    tokens = [[1.0, 2.0, 3.0]] * 2
    first = ratios([[1.2, 2.4, 3.6], [1.4, 2.8, 4.2]], tokens)
    second = ratios([[1.0, 2.0, 3.0]] * 2, tokens)
    estimate = difference_of([first], [second])
    assert estimate.value == pytest.approx(0.3)
    assert estimate.per_seed == pytest.approx((0.2, 0.4))
    assert estimate.standard_error == pytest.approx(0.1)
    assert estimate.half_width == pytest.approx(T_975_DF1 * 0.1)


def test_the_bootstrap_of_rows_has_the_error_of_a_ratio() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(1, 12, 200).astype(float)
    nats = tokens * random.gamma(2, 0.3, 200)
    ratio = nats.sum() / tokens.sum()
    # linearised variance of a ratio: the sum of squared residuals over the squared denominator
    expected = math.sqrt(200 / 199 * ((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    estimate = arm_of([Ratios(nats[None], tokens[None])], draws=4000)
    assert estimate.standard_error == pytest.approx(expected, rel=0.05)  # 4,000 draws: 1.1 % standard error


def test_rows_are_the_same_for_every_seed_so_more_seeds_do_not_shrink_their_error() -> None:
    random = np.random.default_rng(2)
    nats, tokens = random.gamma(2, 1, (1, 60)), np.ones((1, 60))
    one = arm_of([Ratios(nats, tokens)])
    four = arm_of([Ratios(np.repeat(nats, 4, axis=0), np.repeat(tokens, 4, axis=0))])
    assert four.standard_error == pytest.approx(one.standard_error)


def test_pairing_removes_what_the_rows_have_in_common() -> None:
    random = np.random.default_rng(3)
    hard = random.gamma(2, 1, 100)
    first, second = (Ratios((hard + shift)[None], np.ones((1, 100))) for shift in (0.0, 0.1))
    assert difference_of([first], [second]).standard_error < 1e-6
    assert arm_of([first]).standard_error > 0.1


def test_freedom_goes_from_that_of_the_seeds_to_that_of_the_rows() -> None:
    few = estimate_over_seeds([0.1, 0.3, 0.2])
    assert few.degrees_of_freedom == pytest.approx(2)
    random = np.random.default_rng(4)
    rows = Ratios(np.repeat(random.gamma(2, 1, (1, 50)), 3, axis=0), np.ones((3, 50)))
    assert arm_of([rows]).degrees_of_freedom == pytest.approx(49)


def test_the_same_seed_gives_the_same_interval_also_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    arm = Ratios(random.gamma(2, 1, (2, 40)), np.ones((2, 40)))
    whole = arm_of([arm])
    assert arm_of([arm]) == whole
    monkeypatch.setattr(rows, "COUNTS_IN_MEMORY", 1000)
    assert arm_of([arm]).low == pytest.approx(whole.low)


def test_one_row_says_nothing_about_other_rows() -> None:
    row = ratios([[1.0], [2.0]], [[1.0], [1.0]])
    estimate = difference_of([row], [ratios([[0.5], [0.5]], [[1.0], [1.0]])])
    assert estimate.value == 1.0
    assert math.isnan(estimate.low)
    assert judge(estimate, math.nan) is Verdict.TOO_FEW_ROWS


def test_equal_arms_are_not_separated() -> None:
    arm = ratios([[1.0, 2.0], [1.5, 2.5]], [[1.0, 1.0], [1.0, 1.0]])
    estimate = difference_of([arm], [arm])
    assert (estimate.value, estimate.low, estimate.high, estimate.p_value) == (0, 0, 0, 1)
    assert judge(estimate, 1.0) is Verdict.INTERVAL_HOLDS_ZERO


def test_holm_by_hand() -> None:
    # sorted: .01 x 4, .02 x 3, .03 x 2 (raised to .06), .2 x 1
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_missing = holm([0.03, math.nan])
    assert with_missing[0] == 0.03
    assert math.isnan(with_missing[1])
    assert holm([]) == []


def test_holm_counts_comparisons_that_are_not_made() -> None:
    assert holm([0.02, 0.01], 5) == pytest.approx([0.08, 0.05])


def cells(table: list[list[float]]) -> dict[tuple[str, int], float]:
    """Return the metric by (arm, seed); NaN is a run that is missing."""
    return {
        (f"arm{arm}", seed): value
        for arm, row in enumerate(table)
        for seed, value in enumerate(row)
        if not math.isnan(value)
    }


def test_seed_spread_is_pooled_over_arms_by_hand() -> None:
    # arm means 2 and 4, seed means 2, 4 and 3, mean 3: residuals 0, -1, 1 and 0, 1, -1; 2 degrees of freedom
    spread = pool_seed_spread(cells([[1.0, 2.0, 3.0], [3.0, 6.0, 3.0]]))
    assert spread is not None
    assert spread.degrees_of_freedom == 2
    assert spread.variance == pytest.approx(4 / 2)
    assert spread.of_difference(3) == pytest.approx(2 * 2 / 3)
    # two arms: the variance of the seeds' effects over their number, as a paired t-test has it
    assert spread.of_difference(3) == pytest.approx(np.var([-2.0, -4.0, 0.0], ddof=1) / 3)


def test_seed_spread_is_that_of_a_two_way_table() -> None:
    table = np.random.default_rng(9).standard_normal((6, 4))
    table += np.arange(6)[:, None] + np.arange(4)
    residuals = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    spread = pool_seed_spread(cells(table.tolist()))
    assert spread is not None
    assert spread.degrees_of_freedom == 15
    assert spread.variance == pytest.approx((residuals**2).sum() / 15)


def test_seed_spread_with_missing_runs_is_that_of_least_squares() -> None:
    nan = math.nan
    table = [[1.0, 2.5, nan], [3.0, nan, 3.5], [2.0, 2.0, 4.5], [nan, nan, 9.0]]
    spread = pool_seed_spread(cells(table))
    design, metric = [], []
    for (arm, seed), value in cells(table).items():
        design.append([float(arm == f"arm{a}") for a in range(4)] + [float(seed == s) for s in (1, 2)])
        metric.append(value)
    _, residual, rank, _ = np.linalg.lstsq(np.array(design), np.array(metric), rcond=None)
    assert spread is not None
    assert spread.degrees_of_freedom == len(metric) - rank == 2
    assert spread.variance == pytest.approx(float(residual[0]) / 2)


@pytest.mark.parametrize("table", [[[1.0], [2.0]], [[1.0, math.nan], [math.nan, 2.0]], [[1.0, 2.0, 3.0]]])
def test_one_seed_or_one_arm_has_no_spread_to_pool(table: list[list[float]]) -> None:
    assert pool_seed_spread(cells(table)) is None


def test_a_noisy_pair_does_not_hide_behind_quiet_arms() -> None:
    quiet = SeedSpread(variance=1e-6, degrees_of_freedom=10)
    estimate = estimate_over_seeds([0.2, 0.4], quiet)
    assert estimate.standard_error == pytest.approx(0.1)  # that of its own two effects
    loud = SeedSpread(variance=1.0, degrees_of_freedom=10)
    assert estimate_over_seeds([0.2, 0.4], loud).standard_error == pytest.approx(1.0)
    assert estimate_over_seeds([0.2, 0.4], loud).degrees_of_freedom == pytest.approx(10)


def estimate_of(low: float, high: float, per_seed: tuple[float, ...]) -> Estimate:
    return Estimate((low + high) / 2, low, high, 0.1, 3.0, per_seed, n_rows=128)


@pytest.mark.parametrize(
    ("difference", "adjusted_p", "verdict"),
    [
        (estimate_of(0.1, 0.5, (0.2, 0.4)), 0.01, Verdict.SEPARATED),
        (estimate_of(-0.5, -0.1, (-0.2, -0.4)), 0.05, Verdict.SEPARATED),
        (None, math.nan, Verdict.NO_SHARED_SEED),
        (estimate_of(0.1, 0.5, (0.3,)), math.nan, Verdict.ONE_SEED),
        (estimate_of(-0.1, 0.5, (0.2, 0.4)), 0.01, Verdict.INTERVAL_HOLDS_ZERO),
        (estimate_of(0.1, 0.5, (0.6, 0.3, -0.01)), 0.01, Verdict.SEEDS_DISAGREE),
        (estimate_of(0.1, 0.5, (0.6, 0.3, 0.0)), 0.01, Verdict.SEEDS_DISAGREE),
        (estimate_of(0.1, 0.5, (0.6, 0.3, 0.5, 0.4, 0.5, -0.01)), 0.01, Verdict.SEPARATED),  # one of many differs
        (estimate_of(0.1, 0.5, (0.2, 0.4)), 0.06, Verdict.SEVERAL_COMPARISONS),
    ],
)
def test_the_verdict_needs_every_condition(difference: Estimate | None, adjusted_p: float, verdict: Verdict) -> None:
    assert judge(difference, adjusted_p) is verdict


def simulated(n_seeds: int, seed_noise: float, effect: float, random: np.random.Generator) -> tuple[Ratios, Ratios]:
    """Return two arms on 64 rows: rows with their own difficulty and difference, seeds with their own luck.

    `seed_noise` is the standard error of the seeds' mean, in units of that of the rows.
    """
    n_rows = 64
    tokens = np.broadcast_to(random.integers(2, 12, n_rows).astype(float), (n_seeds, n_rows))
    luck = seed_noise * math.sqrt(n_seeds / n_rows) * random.standard_normal((n_seeds, 1))
    own = random.standard_normal((1, n_rows)) + 0.5 * random.standard_normal((n_seeds, n_rows))
    hard = random.gamma(2, 1, (1, n_rows))
    return Ratios(tokens * (hard + own + luck + effect), tokens), Ratios(tokens * hard, tokens)


def estimate_simulated(n_seeds: int, seed_noise: float, effect: float, random: np.random.Generator) -> Estimate:
    first, second = simulated(n_seeds, seed_noise, effect, random)
    return difference_of([first], [second], draws=150, seed=int(random.integers(2**31)))


@pytest.mark.parametrize(
    ("n_seeds", "seed_noise", "least_coverage", "most_false"),
    [
        (2, 0.0, 0.92, 0.08),
        (2, 1.0, 0.89, 0.11),
        (2, 10.0, 0.82, 0.18),  # the worst case: two seeds, and hardly anything but their noise
        (3, 1.0, 0.91, 0.09),
        (5, 10.0, 0.91, 0.09),
        (6, 3.0, 0.91, 0.09),  # whose signs need not agree
    ],
)
def test_intervals_hold_the_truth_and_nothing_is_found_where_nothing_is(
    n_seeds: int, seed_noise: float, least_coverage: float, most_false: float
) -> None:
    random = np.random.default_rng(6)
    held = separated = 0
    studies = 400
    for _ in range(studies):
        estimate = estimate_simulated(n_seeds, seed_noise, 0, random)
        held += estimate.low <= 0 <= estimate.high
        separated += judge(estimate, estimate.p_value) is Verdict.SEPARATED
    assert held / studies >= least_coverage
    assert separated / studies <= most_false


def arms_that_do_not_differ(n_arms: int, n_seeds: int, seed_noise: float, random: np.random.Generator) -> list[Scored]:
    """Return arms on 64 rows, the best first; each has luck of its own on every row and with every seed."""
    n_rows = 64
    tokens = np.broadcast_to(random.integers(2, 12, n_rows).astype(float), (n_seeds, n_rows))
    hard = random.gamma(2, 1, (1, n_rows))
    bootstrap_seed = int(random.integers(2**31))  # the same rows for all arms
    scored = []
    for _ in range(n_arms):
        luck = seed_noise * math.sqrt(n_seeds / n_rows) * random.standard_normal((n_seeds, 1))
        own = random.standard_normal((1, n_rows)) + 0.5 * random.standard_normal((n_seeds, n_rows))
        scored.append(score([Ratios(tokens * (hard + own + luck), tokens)], bootstrap_seed, draws=100))
    return sorted(scored, key=lambda arm: float(arm.per_seed.mean()))


def finds_something(arms: Sequence[Scored], spread: SeedSpread | None) -> bool:
    """Say whether any pair of the study is called separated."""
    estimates = [estimate_difference(first, second, spread) for first, second in combinations(arms, 2)]
    adjusted = holm([estimate.p_value for estimate in estimates])
    return any(judge(e, p) is Verdict.SEPARATED for e, p in zip(estimates, adjusted, strict=True))


def test_six_arms_with_two_seeds_that_do_not_differ_are_rarely_separated() -> None:
    """Each pair's own two seeds would call one of the fifteen pairs separated in half of the studies."""
    random = np.random.default_rng(10)
    studies, alone, pooled = 120, 0, 0
    for _ in range(studies):
        arms = arms_that_do_not_differ(6, 2, 3.0, random)
        spread = pool_seed_spread(cells([arm.per_seed.tolist() for arm in arms]))
        alone += finds_something(arms, None)
        pooled += finds_something(arms, spread)
    assert pooled / studies <= 0.10  # measured with 600 studies: 0.03
    assert alone / studies >= 0.25  # 0.45


def test_percentiles_of_a_two_level_bootstrap_would_find_differences_that_are_not_there() -> None:
    """Why the interval is not the plain one: with two seeds and their noise alone it is wrong two times in five."""
    random = np.random.default_rng(7)
    found = 0
    studies = 200
    for _ in range(studies):
        first, second = simulated(2, 10.0, 0, random)
        effects = first.per_seed() - second.per_seed()
        rows = random.multinomial(64, np.full(64, 1 / 64), size=200).astype(float)
        seeds = random.multinomial(2, [0.5, 0.5], size=200) / 2
        draws = (seeds * (first.resampled(rows) - second.resampled(rows))).sum(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        found += (low > 0 or high < 0) and np.sign(effects[0]) == np.sign(effects[1])
    assert found / studies > 0.3


def test_a_real_difference_is_found() -> None:
    random = np.random.default_rng(8)
    verdicts = []
    for _ in range(50):
        estimate = estimate_simulated(2, 0.5, 1.0, random)
        verdicts.append(judge(estimate, estimate.p_value))
    assert verdicts.count(Verdict.SEPARATED) >= 45
