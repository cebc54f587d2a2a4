"""The variance of runs, split by axis: against numbers worked out by hand, statsmodels, and simulated studies."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from analysis.statistics.variance import split_variance
from qlora_lab.errors import ConfigError


def runs_of(effects: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    rows = [(a, b, value) for (a, b), values in effects.items() for value in values]
    return pd.DataFrame(rows, columns=["data", "rank", "loss"])


def split(runs: pd.DataFrame, *axes: str) -> pd.DataFrame:
    return split_variance(runs, axes or ("data", "rank"), "loss").set_index("source")


def simulated(random: np.random.Generator, effect: float, seeds: int = 3) -> pd.DataFrame:
    """Return 4 data sets x 2 ranks: data has the variance `effect`, ranks have none, a seed has 1."""
    levels = math.sqrt(effect) * np.array([-1.0, -1.0, 1.0, 1.0])
    rows = [
        (f"d{data}", f"r{rank}", levels[data] + random.standard_normal())
        for data, rank, _ in itertools.product(range(4), range(2), range(seeds))
    ]
    return pd.DataFrame(rows, columns=["data", "rank", "loss"])


def test_a_balanced_study_by_hand() -> None:
    # data: +-2, rank: +-1, together: nothing; seeds: +-1, so that each arm has squares 2 and all four 8
    cells = {(a, b): [x + y - 1, x + y + 1] for (a, x) in (("p", -2), ("q", 2)) for (b, y) in (("4", -1), ("8", 1))}
    table = split(runs_of(cells))
    # squares 32, 8, 0 and 8; a seed's variance is 8 / 4 = 2, so data has (32 - 2) / 8 and rank (8 - 2) / 8
    total = 30 / 8 + 6 / 8 + 2
    assert table["share"].to_dict() == pytest.approx(
        {"data": 30 / 8 / total, "seed": 2 / total, "rank": 6 / 8 / total, "interactions": 0}
    )
    assert table["freedom"].to_dict() == {"data": 1, "seed": 4, "rank": 1, "interactions": 1}
    assert (table["overlap"] == 0).all()
    assert table.index.tolist()[0] == "data"


def test_p_values_are_those_of_an_analysis_of_variance() -> None:
    runs = simulated(np.random.default_rng(0), 0.5)
    table, theirs = split(runs), anova_lm(ols("loss ~ C(data) * C(rank)", runs).fit())
    for source, term in {"data": "C(data)", "rank": "C(rank)", "interactions": "C(data):C(rank)"}.items():
        assert table.loc[source, "p"] == pytest.approx(theirs.loc[term, "PR(>F)"])
    assert table["share"].sum() == pytest.approx(1)
    assert ((table["low"] <= table["share"] + 1e-9) & (table["share"] <= table["high"] + 1e-9)).all()


def test_missing_runs_make_shares_overlap_and_no_order_is_preferred() -> None:
    cells = {("p", "4"): [0.0, 1.0], ("q", "8"): [4.0, 5.0], ("p", "8"): [2.0]}
    runs = runs_of(cells)
    table = split(runs)
    first = anova_lm(ols("loss ~ C(data) + C(rank)", runs).fit())["sum_sq"]
    second = anova_lm(ols("loss ~ C(rank) + C(data)", runs).fit())["sum_sq"]
    noise = 1 / 2  # squares of the runs within arms, over 2 degrees of freedom
    expected = (first["C(data)"] + second["C(data)"]) / 2 - noise
    shares = table["share"] * ((runs["loss"].var(ddof=0) * 5 + noise) / 5)
    assert shares["data"] == pytest.approx(expected / 5)
    assert table.loc["data", "overlap"] == pytest.approx(
        abs(first["C(data)"] - second["C(data)"]) / (5 * runs["loss"].var(ddof=0))
    )
    more = runs_of(cells | {("q", "4"): [math.nan]})
    pd.testing.assert_frame_equal(split(more), table)


def test_axes_that_cannot_be_told_apart_are_one() -> None:
    runs = simulated(np.random.default_rng(1), 1.0).assign(size=lambda runs: runs["data"].map(len), one="same")
    runs["steps"] = runs["data"].map({"d0": 10, "d1": 20, "d2": 30, "d3": 40})
    assert set(split(runs, "data", "rank", "steps", "one").index) == {"data + steps", "rank", "interactions", "seed"}


def test_one_seed_cannot_tell_interactions_from_chance() -> None:
    table = split(simulated(np.random.default_rng(2), 4.0, seeds=1))
    assert set(table.index) == {"data", "rank", "interactions and chance"}
    assert table.loc["data", "low"] > 0
    two_runs = split(runs_of({("p", "4"): [1.0], ("q", "4"): [2.0]}))
    assert two_runs["share"].to_dict() == {"data": 1.0} and two_runs["low"].isna().all()
    assert split(runs_of({("p", "4"): [1.0], ("q", "8"): [1.0]})).empty, "nothing varies"


def test_nobody_asks_for_the_shares_of_nine_axes() -> None:
    runs = pd.DataFrame({f"a{n}": np.eye(10)[n] for n in range(9)} | {"loss": np.arange(10.0)})
    with pytest.raises(ConfigError, match="at most 8 axes; got 9: a0, a1"):
        split_variance(runs, [f"a{n}" for n in range(9)], "loss")


@pytest.mark.parametrize("effect", [0.0, 1.0, 8.0])
def test_intervals_hold_the_truth_and_chance_has_no_share(effect: float) -> None:
    random = np.random.default_rng(3)
    truth, studies = effect / (effect + 1), 50
    held = seed_held = 0
    shares = []
    for _ in range(studies):
        table = split(simulated(random, effect))
        held += table.loc["data", "low"] <= truth <= table.loc["data", "high"]
        seed_held += table.loc["seed", "low"] <= 1 - truth <= table.loc["seed", "high"]
        shares.append(table.loc["data", "share"])
    assert min(held, seed_held) / studies >= 0.86
    assert abs(float(np.mean(shares)) - truth) < 0.12


def nested(random: np.random.Generator) -> pd.DataFrame:
    """Return two placements with ranks of their own, two data sets, three seeds."""
    levels = {("all", "8"): 0.0, ("all", "16"): 0.4, ("query", "42"): 2.0, ("query", "84"): 2.6}
    rows = [
        (placement, rank, f"alpha{rank}", data, level + 0.3 * (data == "b") + 0.1 * random.standard_normal())
        for ((placement, rank), level), data, _ in itertools.product(levels.items(), "ab", range(3))
    ]
    return pd.DataFrame(rows, columns=["placement", "rank", "alpha", "data", "loss"])


def test_nested_axes_are_split_as_in_a_nested_analysis_of_variance() -> None:
    runs = nested(np.random.default_rng(4))
    table = split(runs, "placement", "rank", "alpha", "data")
    within = "rank + alpha within placement"
    assert set(table.index) == {"placement", within, "data", "interactions", "seed"}
    terms = ("1", "C(placement)", "C(rank)", "C(rank) + C(data)", "C(rank) * C(data)")  # a rank tells its placement
    left = [ols(f"loss ~ {term}", runs).fit().ssr for term in terms]
    noise = left[-1] / 16
    variances = table["share"] * noise / table.loc["seed", "share"]
    for source, number, freedom in (("placement", 0, 1), (within, 1, 2), ("data", 2, 1)):
        squares = left[number] - left[number + 1]
        assert variances[source] == pytest.approx((squares - freedom * noise) / len(runs))
    assert table["freedom"].to_dict() == {"placement": 1, within: 2, "data": 1, "interactions": 3, "seed": 16}
    assert (table["overlap"] == 0).all()


def test_an_axis_that_earlier_ones_determine_is_no_source() -> None:
    runs = simulated(np.random.default_rng(5), 2.0)
    runs["rate"] = runs["data"].map({"d0": 1, "d1": 1, "d2": 2, "d3": 2})  # a recipe of the data
    runs["steps"] = runs["data"].str.len() * runs["rate"] + runs["rank"].map({"r0": 0, "r1": 5})  # of both
    pd.testing.assert_frame_equal(split(runs, "data", "rank", "rate", "steps"), split(runs))
