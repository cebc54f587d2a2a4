"""Effect sizes, seeds needed, tasks taken together and rank correlations, against others' numbers and simulations."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from analysis.statistics.correlation import correlate_metrics, rank_correlation
from analysis.statistics.effects import MOST_SEEDS, effect_size, power_of_seeds, seeds_needed
from analysis.statistics.estimates import Estimate, estimate_over_seeds
from analysis.statistics.iqm import estimate_iqm, estimate_iqm_difference, interquartile_mean


def test_effect_size_is_hedges_g_by_hand() -> None:
    # mean 3, standard deviation 1; with 2 degrees of freedom the correction is Gamma(1) / Gamma(1/2) = 1 / sqrt(pi)
    assert effect_size(estimate_over_seeds([2.0, 3.0, 4.0])) == pytest.approx(3 / math.sqrt(math.pi))
    assert effect_size(estimate_over_seeds([-2.0, -3.0, -4.0])) < 0
    assert math.isnan(effect_size(estimate_over_seeds([2.0, 3.0]))), "one degree of freedom tells no spread"
    assert math.isnan(effect_size(estimate_over_seeds([2.0])))


def test_power_and_seeds_are_those_of_a_paired_t_test() -> None:
    difference = estimate_over_seeds([-0.6, 0.1, 1.2, 0.9])
    d = difference.value / math.sqrt(difference.seed_variance)
    for n_seeds in (3, 10):
        assert power_of_seeds(difference, n_seeds) == pytest.approx(TTestPower().power(d, n_seeds, 0.05), abs=1e-6)
    expected = math.ceil(TTestPower().solve_power(d, power=0.8, alpha=0.05))
    assert seeds_needed(difference) == expected
    corrected = math.ceil(TTestPower().solve_power(d, power=0.8, alpha=0.05 / 10))
    assert seeds_needed(difference, comparisons=10) == corrected > expected


def test_seeds_do_not_help_against_too_few_rows() -> None:
    few_rows = Estimate(
        0.1, -0.5, 0.7, 0.3, 9.0, (0.1, 0.11), 20, row_variance=0.09, seed_variance=1e-4, seed_freedom=1
    )
    assert power_of_seeds(few_rows, MOST_SEEDS) < 0.8
    assert seeds_needed(few_rows) is None
    assert seeds_needed(estimate_over_seeds([0.1])) is None, "one seed tells no spread"
    assert seeds_needed(estimate_over_seeds([0.1, -0.1])) is None, "a difference of nothing"


def test_interquartile_mean_is_the_trimmed_mean() -> None:
    scores = np.random.default_rng(0).random((3, 57))
    assert interquartile_mean(scores.ravel()) == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    assert interquartile_mean(np.array([0.0, 0.5, 0.7, 1.0])) == pytest.approx(0.6)
    assert estimate_iqm(scores).value == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))
    assert math.isnan(estimate_iqm(scores[:1]).low), "one seed tells no spread"


@pytest.mark.parametrize(("shared_luck", "tasks_share_runs"), [(1.0, True), (0.0, False)])
def test_intervals_over_tasks_hold_the_truth(shared_luck: float, tasks_share_runs: bool) -> None:
    random = np.random.default_rng(1)
    level = random.random(8)  # of each task, the same in both arms, which do not differ
    held = 0
    for study in range(200):
        luck = shared_luck * random.standard_normal((2, 3, 1)) + random.standard_normal((2, 3, 8))
        first, second = level + 0.1 * luck
        found = estimate_iqm_difference(first, second, tasks_share_runs=tasks_share_runs, draws=100, seed=study)
        held += found.low <= 0 <= found.high
    assert held / 200 >= 0.88


def test_luck_that_a_run_has_on_all_tasks_is_no_evidence_eight_times_over() -> None:
    scores = np.linspace(0.2, 0.9, 8) + np.array([[0.0], [0.05], [0.1]])
    together, apart = (estimate_iqm(scores, tasks_share_runs=shared) for shared in (True, False))
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_rank_correlation_is_that_of_scipy() -> None:
    random = np.random.default_rng(2)
    first = random.integers(0, 12, 20).astype(float)  # with ties
    second = first + 6 * random.random(20)
    found = rank_correlation([*first, math.nan], [*second, 1.0])
    assert found.n_arms == 20
    assert found.rho == pytest.approx(stats.spearmanr(first, second).statistic)
    assert found.tau == pytest.approx(stats.kendalltau(first, second).statistic)
    assert found.low < found.rho < found.high < 1


def test_the_p_value_of_few_arms_is_exact() -> None:
    # 5 arms in the same order: 2 of 120 orders are as extreme
    found = rank_correlation([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert (found.rho, found.tau, found.p_value) == pytest.approx((1, 1, 2 / 120))
    assert found.low < 0.9 and found.high < 1, "five arms do not prove a perfect order"
    for too_little in (rank_correlation([1, 2, 3], [1, 2, 3]), rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])):
        assert math.isnan(too_little.rho) and math.isnan(too_little.p_value)


def test_intervals_of_correlations_hold_the_truth() -> None:
    random = np.random.default_rng(3)
    truth = 6 / math.pi * math.asin(0.7 / 2)  # Spearman's rho of normal variables with correlation 0.7
    held = false = 0
    for study in range(120):
        x, noise = random.standard_normal((2, 10))
        found = rank_correlation(x, 0.7 * x + math.sqrt(1 - 0.49) * noise)
        held += found.low <= truth <= found.high
        if study < 40:
            false += rank_correlation(x, noise).p_value <= 0.05
    assert held / 120 >= 0.89
    assert false <= 6


def test_every_two_metrics_are_correlated_and_corrected() -> None:
    random = np.random.default_rng(4)
    arms = pd.DataFrame({"a": random.random(6)})
    arms = arms.assign(b=arms["a"] ** 3, c=random.random(6), d=[1.0, *[math.nan] * 5])
    table = correlate_metrics(arms, ["a", "b", "c", "d"])
    assert table[["first", "second"]].agg(" ".join, axis=1).tolist() == ["a b", "a c", "a d", "b c", "b d", "c d"]
    assert table["rho"].iloc[0] == pytest.approx(1) and table["arms"].tolist() == [6, 6, 1, 6, 1, 1]
    assert table["p_holm"].iloc[0] == pytest.approx(3 * 2 / 720)
    assert table["p_holm"].isna().sum() == 3
