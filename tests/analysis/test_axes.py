"""Values of an axis are compared inside blocks: against statsmodels, a brute-force bootstrap, and studies by hand."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols

from analysis.report.sections import method
from analysis.report.tables import axis_table
from analysis.report.terminal import block_line
from analysis.statistics.blocks import (
    OWN_BLOCKS,
    connected,
    estimate_over_blocks,
    level_values,
    pool_block_spread,
    pool_seeds_of_blocks,
)
from analysis.statistics.effects import seeds_needed
from analysis.statistics.estimates import estimate_over_seeds
from analysis.statistics.holm import holm
from analysis.statistics.verdicts import Verdict, judge
from analysis.study.answer import Answer, compare
from analysis.study.comparison import MOST_ARMS_PAIRED

METRIC = "eval/mmlu/test/5shot/acc"


def cells_of(random: np.random.Generator, n_values: int, n_blocks: int, missing: int = 0) -> pd.DataFrame:
    """Return values whose levels are 0.3 apart in blocks that are far apart."""
    level = 5 * random.standard_normal(n_blocks)
    rows = [
        (f"v{v}", block, level[block] + 0.3 * v + 0.1 * random.standard_normal())
        for v, block in itertools.product(range(n_values), range(n_blocks))
    ]
    kept = random.permutation(len(rows))[missing:]
    return pd.DataFrame([rows[place] for place in sorted(kept)], columns=["value", "block", "metric"])


def as_cells(frame: pd.DataFrame) -> dict[tuple[str, Any], float]:
    return dict(zip(zip(frame["value"], frame["block"], strict=True), frame["metric"], strict=True))


def test_levels_and_spread_are_those_of_a_linear_model_also_where_cells_are_missing() -> None:
    frame = cells_of(np.random.default_rng(0), 4, 6, missing=5)
    model = ols("metric ~ C(value) + C(block)", frame).fit()
    levels, spread = level_values(as_cells(frame)), pool_block_spread(as_cells(frame))
    for v in (1, 2, 3):
        assert levels[f"v{v}"] - levels["v0"] == pytest.approx(model.params[f"C(value)[T.v{v}]"])
    assert spread is not None
    assert (spread.variance, spread.degrees_of_freedom) == (pytest.approx(model.mse_resid), model.df_resid)


def test_of_few_blocks_the_interval_is_that_of_a_linear_model() -> None:
    random = np.random.default_rng(1)
    frame = cells_of(random, 6, 4)
    model = ols("metric ~ C(value) + C(block)", frame).fit()
    wide = frame.pivot(index="block", columns="value", values="metric")
    spread = pool_block_spread(as_cells(frame))
    quiet = min((f"v{v}" for v in range(1, 6)), key=lambda v: (wide[v] - wide["v0"]).var())  # than the pool
    found = estimate_over_blocks((wide[quiet] - wide["v0"]).to_numpy(), {}, 0, spread=spread)
    low, high = model.conf_int().loc[f"C(value)[T.{quiet}]"]
    assert (found.value, found.low, found.high) == pytest.approx((model.params[f"C(value)[T.{quiet}]"], low, high))
    assert found.p_value == pytest.approx(model.pvalues[f"C(value)[T.{quiet}]"])


def test_of_many_blocks_a_pair_tells_its_own_spread_as_a_bootstrap_of_whole_blocks_does() -> None:
    random = np.random.default_rng(2)
    frame = cells_of(random, 3, OWN_BLOCKS)
    wild = frame.assign(metric=frame["metric"] + 4 * (frame["value"] == "v2") * random.standard_normal(len(frame)))
    wide = wild.pivot(index="block", columns="value", values="metric")
    effects = (wide["v1"] - wide["v0"]).to_numpy()
    found = estimate_over_blocks(effects, {}, 0, spread=pool_block_spread(as_cells(wild)))
    theirs = stats.ttest_rel(wide["v1"], wide["v0"])
    assert found.p_value == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    resampled = random.choice(effects, (20_000, effects.size)).mean(axis=1).std()
    assert resampled * math.sqrt(effects.size / (effects.size - 1)) == pytest.approx(found.standard_error, rel=0.03)


def test_rows_that_blocks_share_do_not_average_out() -> None:
    random = np.random.default_rng(3)
    shared, n_blocks = random.standard_normal(4000), 20
    effects = 1 + 1e-6 * random.standard_normal(n_blocks)
    together = estimate_over_blocks(effects, {0: n_blocks * shared}, 64)
    apart = estimate_over_blocks(effects, {n: random.permutation(shared) for n in range(n_blocks)}, 64)
    assert together.standard_error == pytest.approx(shared.std(ddof=1), rel=1e-3)
    assert apart.standard_error == pytest.approx(shared.std(ddof=1) / math.sqrt(n_blocks), rel=1e-3)


def test_blocks_of_one_seed_are_no_more_than_its_one_draw_where_that_is_what_differs() -> None:
    draws, seeds = np.array([0.1, 0.3, 0.2]), [0, 1, 2] * 8
    effects = np.tile(draws, 8) + 1e-6 * np.random.default_rng(7).standard_normal(24)
    found = estimate_over_blocks(effects, {}, 0, seeds)
    theirs = stats.ttest_1samp(draws, 0)
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-3)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-3)
    assert found.n_seeds == 24, "still said of blocks"
    uneven = estimate_over_blocks(np.array([0.0, 0.1, 0.1, 0.2]), {}, 0, [0, 1, 1, 2])
    assert uneven.standard_error == pytest.approx(math.sqrt((0.1**2 + 0.1**2) * 3 / 2) / 4)


def test_seeds_pooled_over_values_are_those_of_a_linear_model_of_their_means() -> None:
    frame = cells_of(np.random.default_rng(8), 4, 6).assign(seed=lambda cells: cells["block"] % 3)
    model = ols("metric ~ C(value) + C(seed)", frame.groupby(["value", "seed"], as_index=False)["metric"].mean()).fit()
    spread = pool_seeds_of_blocks(as_cells(frame), {block: block % 3 for block in range(6)})
    assert spread is not None
    assert (spread.variance, spread.degrees_of_freedom) == (pytest.approx(model.mse_resid), model.df_resid)


def separated_wrongly(n_values: int, settings: int, seeds: int, of_seed: float) -> float:
    """Return the share of 150 studies of values that do not differ in which some pair of them is called separated.

    Args:
        of_seed: what a seed does for a value in all settings, beside noise of 1 in every run.
    """
    random, wrong = np.random.default_rng(9), 0
    block_seeds = dict(enumerate(list(range(seeds)) * settings))
    for _ in range(150):
        metric = random.standard_normal((n_values, settings * seeds))
        metric += of_seed * np.tile(random.standard_normal((n_values, seeds)), settings)
        cells = {(f"v{value}", block): float(found) for (value, block), found in np.ndenumerate(metric)}
        spreads = pool_block_spread(cells), pool_seeds_of_blocks(cells, block_seeds)
        found = [
            estimate_over_blocks(metric[one] - metric[other], {}, 0, [*block_seeds.values()], *spreads)
            for one, other in itertools.combinations(range(n_values), 2)
        ]
        adjusted = holm([estimate.p_value for estimate in found], len(found))
        verdicts = [judge(estimate, p) for estimate, p in zip(found, adjusted, strict=True)]
        wrong += Verdict.SEPARATED in verdicts
    return wrong / 150


@pytest.mark.parametrize(
    ("n_values", "settings", "seeds", "of_seed", "at_most"),
    [(2, 8, 2, 1.4, 0.17), (2, 8, 2, 0, 0.08), (4, 4, 2, 1.0, 0.08), (4, 4, 1, 0, 0.06)],
)
def test_values_that_do_not_differ_are_seldom_separated(
    n_values: int, settings: int, seeds: int, of_seed: float, at_most: float
) -> None:
    assert separated_wrongly(n_values, settings, seeds, of_seed) <= at_most


def test_values_are_connected_by_chains_of_blocks() -> None:
    cells = [("a", 0), ("b", 0), ("b", 1), ("c", 1), ("d", 2), ("e", 2), ("f", 3)]
    assert connected(cells) == [{"a", "b", "c"}, {"d", "e"}, {"f"}]


def study(values: Mapping[str, list[str]], metric_of: Any, seeds: int = 2, **options: Any) -> Answer:
    """Answer a study of every combination of the axes' values; `metric_of` gives None for a run that failed."""
    runs, places = [], {}
    for number, (*place, seed) in enumerate(itertools.product(*values.values(), range(seeds))):
        at = dict(zip(values, place, strict=True))
        found = metric_of(at, seed)
        if found is NotImplemented:  # not planned
            continue
        run_id = f"run{number}"
        places[run_id] = at | {"seed": str(seed)}
        state = "failed" if found is None else "finished"
        runs.append({"run_id": run_id, "seed": seed, "state": state, "folder": "/nowhere", METRIC: found or math.nan})
    frame = pd.DataFrame(runs).astype({"seed": "Int64"})
    return compare(frame, [*values, "seed"], METRIC, "max", arms=places, **options)


FORMATS = {"quant": ["nf4", "fp4", "int4"], "model": [f"m{n}" for n in range(8)]}


def hidden(random: np.random.Generator) -> Any:
    """Return a metric in which formats are 0.02 apart, models 0.1 and more, and seeds 0.01."""
    levels = {"nf4": 0.04, "fp4": 0.02, "int4": 0.0}
    models = {f"m{n}": 0.3 + 0.1 * n for n in range(8)}
    return lambda at, seed: levels[at["quant"]] + models[at["model"]] + 0.01 * random.standard_normal()


def test_an_effect_that_the_spread_of_blocks_hides_is_found_inside_blocks() -> None:
    answer = study(FORMATS, hidden(np.random.default_rng(4)), seeds=4)
    runs = answer.runs.assign(quant=answer.runs["arm"].str.split(",").str[0])
    by_format = [runs.loc[runs["quant"] == name, METRIC] for name in FORMATS["quant"]]
    assert stats.f_oneway(*by_format).pvalue > 0.5, "not blocked, nothing is seen"
    pair = answer.by_axis[0].pairs[0]
    assert (pair.first, pair.second, pair.verdict) == ("nf4", "fp4", Verdict.SEPARATED)
    assert answer.sentence.startswith(
        f"At equal model and seed: nf4 has the highest {METRIC} of 3 values of quant in 32 blocks, separated from "
        "every other: from the next, fp4, by 0.0"
    )
    blocked = ols(
        f"Q('{METRIC}') ~ C(quant) + C(block)", runs.assign(block=runs["arm"].str[-2:] + runs["seed"].map(str))
    )
    theirs = blocked.fit().params
    assert pair.difference is not None
    assert pair.difference.value == pytest.approx(theirs["C(quant)[T.nf4]"])  # against fp4, the first by name


def test_what_one_draw_of_the_data_does_is_not_counted_once_a_setting() -> None:
    random = np.random.default_rng(10)
    values = {"quant": ["nf4", "fp4"], "model": [f"m{n}" for n in range(8)]}
    draws = {("nf4", 0): 0.02, ("nf4", 1): 0.10}

    def metric(at: Mapping[str, str], seed: int) -> Any:
        return 0.3 + draws.get((at["quant"], seed), 0.0) + 0.001 * random.standard_normal()

    answer = study(values, metric)
    pair = answer.by_axis[0].pairs[0]
    assert pair.verdict is Verdict.INTERVAL_HOLDS_ZERO
    assert pair.difference is not None
    by_seed = estimate_over_seeds(np.reshape(pair.difference.per_seed, (8, 2)).mean(axis=0))
    needed = seeds_needed(by_seed)
    assert needed is not None and needed == seeds_needed(pair.difference), "more models do not help"
    assert answer.findings[0].startswith(f"About {needed} seeds would be needed to tell a difference")
    assert axis_table(answer, [pair])["needed"].tolist() == [f"{needed} seeds"]
    one = study(values, metric, seeds=1)
    assert one.by_axis[0].pairs[0].separated, "one seed cannot tell"
    assert one.sentence.startswith("At equal model, of seed 0 only: nf4 has a higher")


def test_no_effect_is_not_separated_and_the_blocks_needed_are_said() -> None:
    random = np.random.default_rng(5)
    answer = study(
        {"quant": ["nf4", "fp4"], "model": ["m0", "m1", "m2"]},
        lambda at, seed: int(at["model"][1]) + 0.1 * random.standard_normal(),
    )
    assert answer.sentence.startswith("At equal model and seed: the runs do not separate ")
    assert answer.sentence.endswith("6 blocks), and the interval holds 0.")
    assert "blocks would be needed to tell a difference of the size seen" in answer.findings[0]


def test_blocks_that_lack_a_value_are_left_out_and_counted() -> None:
    random = np.random.default_rng(6)
    metric = hidden(random)
    answer = study(
        FORMATS, lambda at, seed: None if (at["quant"], at["model"]) == ("fp4", "m3") else metric(at, seed), seeds=1
    )
    pair = answer.by_axis[0].pairs[0]
    assert len(pair.seeds) == 7 and pair.seeds_left_out
    assert {len(finished) for finished in pair.finished} == {7, 8}
    # m3 is an easy block for none: a plain mean of fp4 would gain or lose by lacking it
    found = answer.by_axis[0].levels
    assert found["nf4"] - found["fp4"] == pytest.approx(0.02, abs=0.015)
    assert "in every shared block" in answer.sentence or "shared blocks" in answer.sentence


def test_the_question_may_be_about_several_axes_together() -> None:
    def metric(at: Mapping[str, str], seed: int) -> Any:
        if at["adapter"] == "none" and at["quant"] != "none":
            return NotImplemented
        return 0.5 + 0.1 * (at["task"] == "qnli") + 0.001 * seed * len(at["adapter"])

    values = {"task": ["cola", "qnli", "sst2"], "quant": ["none", "nf4"], "adapter": ["none", "all_linear"]}
    answer = study(values, metric, question=["quant", "adapter"])
    asked = answer.by_axis[0].axis
    assert (asked.name, asked.others) == ("quant + adapter", ("task",))
    assert sorted(asked.values) == ["nf4, all_linear", "none, all_linear", "none, none"]
    assert answer.sentence.startswith("At equal task and seed: ")
    assert study(values, metric).by_axis[0].axis.name == "task", "the first axis, where the study names none"


def test_axes_that_change_with_another_are_said_and_are_no_blocks_of_their_own() -> None:
    steps = {"oasst1": "1875", "alpaca": "10000", "flan": "10000"}
    rates = {"7b": "2e-4", "65b": "1e-4"}

    def metric(at: Mapping[str, str], seed: int) -> Any:
        if steps[at["data"]] != at["steps"] or rates[at["model"]] != at["rate"]:
            return NotImplemented
        return 0.4 + 0.1 * (at["data"] == "flan") + 0.2 * (at["model"] == "65b") + 0.001 * seed * len(at["data"])

    values = {"model": ["7b", "65b"], "data": [*steps], "rate": ["2e-4", "1e-4"], "steps": ["1875", "10000"]}
    answer = study(values, metric, question=["data"])
    assert answer.sentence.startswith("At equal model and seed (steps changes with data): flan has the highest")
    assert [compared.axis.name for compared in answer.by_axis] == ["data", "model"]
    assert answer.by_axis[1].axis.follow == ("rate",)
    assert block_line(answer, answer.by_axis[0]).endswith("have the same model and seed (steps changes with data).")
    assert "the seed in common (but steps changes with data; rate changes with model)." in method(answer)


def test_where_no_chain_of_blocks_orders_the_values_arms_are_compared() -> None:
    ranks = {"all": {"8", "64"}, "query": {"42", "64"}, "up": {"9"}, "down": {"9"}}

    def metric(at: Mapping[str, str], seed: int) -> Any:
        return (
            0.5 + 0.01 * len(at["placement"]) + 0.001 * seed if at["rank"] in ranks[at["placement"]] else NotImplemented
        )

    answer = study({"placement": [*ranks], "rank": ["8", "42", "64", "9"]}, metric)
    assert not answer.by_axis[0].axis.connected and answer.answering is None
    assert "of 6 arms" in answer.sentence


def test_one_axis_alone_is_compared_as_arms() -> None:
    answer = study({"quant": ["nf4", "fp4"]}, lambda at, seed: 0.5 + 0.1 * (at["quant"] == "nf4") + 0.01 * seed)
    assert answer.by_axis == [] and answer.sentence.startswith("nf4 has a higher ")


def test_an_axis_of_many_values_is_compared_if_the_question_is_about_it_and_named_if_not() -> None:
    values = {"quant": ["nf4", "fp4"], "data": [f"d{n:02}" for n in range(MOST_ARMS_PAIRED + 1)]}

    def metric(at: Mapping[str, str], seed: int) -> Any:
        return 0.5 + 0.01 * int(at["data"][1:]) + 0.001 * seed * (at["quant"] == "nf4")

    def noted(answer: Answer) -> list[str]:
        return [note for note in answer.notes if note.startswith("The 21 values of data are not compared")]

    answer = study(values, metric)
    assert [compared.axis.name for compared in answer.by_axis] == ["quant"] and len(noted(answer)) == 1
    answer = study(values, metric, question=["data"])
    assert [compared.axis.name for compared in answer.by_axis] == ["data", "quant"] and noted(answer) == []
