"""What else the numbers of a study support, each in one sentence: sizes, seeds, axes, benchmarks."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.statistics.correlation import FEWEST_ARMS
from analysis.statistics.effects import MOST_SEEDS, POWER, effect_size, rows_are_too_few, seeds_needed
from analysis.statistics.estimates import LEVEL
from analysis.statistics.variance import CHANCE, INTERACTIONS, SEED
from analysis.statistics.verdicts import Verdict
from analysis.study.comparison import Comparison
from analysis.study.metrics import Metric, format_differences

NOT_TOLD = (Verdict.INTERVAL_HOLDS_ZERO, Verdict.SEEDS_DISAGREE, Verdict.SEVERAL_COMPARISONS)
FEW = 3  # pairs, each with a sentence


def pair_findings(metric: Metric, comparisons: Sequence[Comparison]) -> list[str]:
    """Return what it would take to tell the first of `comparisons` from others that it is not separated from."""
    best = comparisons[0].first if comparisons else None
    pairs = [pair for pair in comparisons if pair.first == best and pair.verdict in NOT_TOLD]
    return [text for text in (_seeds(metric, pair) for pair in pairs[:FEW]) if text]


def findings(
    metric: Metric, goal: str, variance: pd.DataFrame, correlations: pd.DataFrame, iqm: pd.DataFrame
) -> list[str]:
    """Return the sentences on axes and benchmarks."""
    texts = [_axes(metric, variance), _iqm(iqm)]
    return [text for text in [*texts, *_correlations(correlations, metric.name if goal == "min" else None)] if text]


def _seeds(metric: Metric, pair: Comparison) -> str:
    """Say how many seeds, or blocks, would tell a pair apart that is not; nothing where no seed changes a run."""
    difference = pair.difference
    assert difference is not None, "a pair whose interval holds 0 has one"
    if difference.value == 0 or not difference.seed_freedom:
        return ""
    (size,) = format_differences(metric, [abs(difference.value)], difference.half_width)
    unit = f" {metric.difference_unit}" if metric.difference_unit else ""
    found = f"a difference of the size seen between {pair.first} and {pair.second} ({size}{unit}"
    g = effect_size(difference)
    found += ")" if math.isnan(g) else f", {abs(g):.2g} times what one {pair.unit_needed} changes)"
    units = f"{pair.unit_needed}s"
    needed = seeds_needed(difference, comparisons=pair.n_comparisons)
    if needed is None:
        if rows_are_too_few(difference, comparisons=pair.n_comparisons):
            return f"No number of {units} would tell {found}: that takes more held-out rows."
        return f"More than {MOST_SEEDS:,} {units} would be needed to tell {found}."
    several = f" among {pair.n_comparisons} comparisons" if pair.n_comparisons > 1 else ""
    return (
        f"About {max(needed, difference.n_units + 1):,} {units} would be needed to tell {found}{several}, with a "
        f"chance of {100 * POWER:.0f} %; the size is itself uncertain, and so is this number."
    )


def _axes(metric: Metric, variance: pd.DataFrame) -> str:
    """Say which axis matters, of two or more."""
    axes = variance[~variance["source"].isin([SEED, INTERACTIONS, CHANCE])]
    if len(axes) < 2:
        return ""
    shares = ", ".join(
        f"{100 * row['share']:.0f} %{_range(row['low'], row['high'])} with {_source(str(row['source']))}"
        for row in variance.to_dict("records")
    )
    text = f"Of the variance of {metric.name} between runs go {shares}"
    first, second = axes.iloc[0], axes.iloc[1]
    if math.isnan(first["low"]):
        return f"{text}; no run is left to tell this from chance."
    if first["low"] > second["high"]:
        return f"{text}: {first['source']} matters most of what was varied."
    if first["low"] > 0:
        return f"{text}: {first['source']} matters, but which axis matters most is not separated."
    return f"{text}: what matters most is not separated, also not from chance."


def _source(source: str) -> str:
    return {SEED: "the seed", CHANCE: "interactions and chance, which one seed cannot tell apart"}.get(source, source)


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" ({100 * low:.0f} to {100 * high:.0f} %)"


def _iqm(iqm: pd.DataFrame) -> str:
    if len(iqm) < 2:
        return ""
    first, second = iqm.iloc[0], iqm.iloc[1]
    head = f"Over {first['tasks']} benchmarks {first['arm']} has the highest interquartile mean, {first['iqm']:.3f}"
    if math.isnan(second["p"]):
        return f"{head}; without two shared seeds it is not separated from {second['arm']} ({second['iqm']:.3f})."
    apart = second["behind_low"] > 0 and second["p"] <= 1 - LEVEL
    return (
        f"{head} (95 % interval {first['low']:.3f} to {first['high']:.3f}); the next, {second['arm']}, is "
        f"{second['behind']:.3f} behind on their shared seeds ({second['behind_low']:.3f} to "
        f"{second['behind_high']:.3f}): {'separated' if apart else 'not separated'}."
    )


def _correlations(table: pd.DataFrame, lower_is_better: str | None) -> list[str]:
    """Say whether metrics put the same arms first, the strongest correlation first; of benchmarks more is better."""
    known = table[table["rho"].notna()]
    order = known["rho"].abs().sort_values(ascending=False, kind="stable").index
    return [correlation_sentence(row, lower_is_better) for row in known.loc[order].head(FEW).to_dict("records")]


def correlation_sentence(row: Mapping[Hashable, Any], lower_is_better: str | None = None) -> str:
    """Say whether two metrics put the same arms first.

    Args:
        row: of `correlate_metrics`.
        lower_is_better: the one metric of which less is better.
    """
    first, second = row["first"], row["second"]
    if math.isnan(row["rho"]):
        return (
            f"Whether {first} and {second} order arms alike cannot be said: {row['arms']} arms have both, which takes "
            f"{FEWEST_ARMS} that differ in each."
        )
    order_them = "order" if row["p_holm"] <= 1 - LEVEL else "are not shown to order"
    turned = lower_is_better in (first, second)
    alike = "alike" if (row["rho"] >= 0) != turned else "in opposite ways"
    alike += f" (lower {lower_is_better} is better)" if turned else ""
    rho = f"{row['rho']:.2f} (95 % interval {row['low']:.2f} to {row['high']:.2f})"
    return (
        f"{first} and {second} {order_them} the {row['arms']} arms {alike}: Spearman's rho {rho}, Kendall's tau "
        f"{row['tau']:.2f}."
    )
