"""Comparisons as sentences: each says no more than its numbers support, and why it says no more."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.statistics.estimates import Estimate
from analysis.statistics.verdicts import Verdict
from analysis.study.comparison import Comparison
from analysis.study.metrics import Metric, format_differences, format_value

FEW = 4  # arms named one by one
TOO_FEW_SEEDS = (Verdict.ONE_SEED, Verdict.NO_SHARED_SEED)
REFUSED = (Verdict.OTHER_TOKENS, Verdict.OTHER_TARGETS)


def sentence(metric: Metric, goal: str, table: pd.DataFrame, comparisons: Sequence[Comparison]) -> str:
    """Return the answer in one sentence.

    Args:
        table: as in `Answer.table`, one row an arm, the best first.
        comparisons: those of the best arm with every other that has finished runs, at least; the better arm first.
    """
    with_runs = list(table["arm"][table["n"] > 0])
    if not with_runs:
        return f"No run has finished with a finite {metric.name}, so there is nothing to compare."
    if len(table) == 1:
        return _one_arm(metric, table.iloc[0]) + "."
    if len(with_runs) == 1:
        others = f"; the other {len(table) - 1} of {len(table)} arms have none"
        return f"Only {with_runs[0]} has finished runs, so there is nothing to compare it with{others}."
    more_planned = bool((table["planned"] > 1).any())
    if len(with_runs) == 2:
        return _two_arms(metric, goal, comparisons[0], more_planned=more_planned) + "."
    return _best_of_several(metric, goal, with_runs, comparisons, more_planned=more_planned) + "."


def _one_arm(metric: Metric, row: "pd.Series[float]") -> str:
    mean, low, high = (float(row[f"{metric.name} {part}"]) for part in ("mean", "low", "high"))
    unit = f" {metric.unit}" if metric.unit and metric.kind == "number" else ""
    evidence = _seeds(int(row["n"]))
    if not math.isnan(low):
        evidence = f"95 % interval {format_value(metric, low)} to {format_value(metric, high)}, {evidence}"
    return (
        f"There is one arm, {row['arm']}, and nothing to compare it with: its {metric.name} is "
        f"{format_value(metric, mean)}{unit} ({evidence})"
    )


def _two_arms(metric: Metric, goal: str, pair: Comparison, *, more_planned: bool) -> str:
    said = describe_pair(metric, pair, more_planned=more_planned)
    if _other_way_round(pair, goal) and pair.verdict not in REFUSED:
        return f"{said}; the means in the table, over all finished seeds, are the other way round"
    return said


def describe_pair(metric: Metric, pair: Comparison, *, more_planned: bool = False) -> str:
    """Say how far two arms are apart and whether the runs separate them; without a full stop.

    Args:
        more_planned: whether the study has more seeds than one, so that one is left where others did not finish.
    """
    difference = pair.difference
    if difference is None:
        what = "no held-out row" if pair.rows_left_out else "no seed that finished in both"
        return f"{pair.first} and {pair.second} have {what} in common, so they cannot be compared"
    if pair.verdict in REFUSED:
        return f"{pair.first} and {pair.second} cannot be compared in {metric.name}: {_refusal(metric, pair.verdict)}"
    if not any(difference.per_seed):
        return f"{pair.first} and {pair.second} have the same {metric.name} ({_evidence(difference)})"
    if difference.value == 0:
        return (
            f"The runs do not separate {pair.first} and {pair.second}: their seeds differ in {metric.name}, "
            f"but the mean difference is {_amount(metric, difference)}, and {_reason(pair)}"
        )
    if pair.separated:
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, difference)}, in {_every_seed(pair)}"
        )
    if pair.verdict is Verdict.ONE_SEED:
        why = (
            f"too few seeds are shared: only seed {pair.seeds[0]} can be compared, and one seed cannot separate arms"
            if more_planned
            else "one seed cannot separate arms: run more seeds"
        )
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, difference)}, but {why}"
        )
    return (
        f"The runs do not separate {pair.first} and {pair.second}: {metric.name} is {_direction(difference)} for the "
        f"first by {_amount(metric, difference)}, and {_reason(pair)}"
    )


def _best_of_several(
    metric: Metric, goal: str, with_runs: Sequence[str], comparisons: Sequence[Comparison], *, more_planned: bool
) -> str:
    best = with_runs[0]
    against = [pair for pair in comparisons if pair.first == best]
    separated = [pair for pair in against if pair.separated]
    beaten = [pair for pair in separated if pair.favours_first(goal)]
    better = [pair for pair in separated if not pair.favours_first(goal)]
    few = [pair for pair in against if pair.verdict in TOO_FEW_SEEDS]
    refused = [pair for pair in against if pair.verdict in REFUSED]
    rest = [pair for pair in against if not (pair.separated or pair in few or pair in refused)]
    extreme = "lowest" if goal == "min" else "highest"
    place = f"{best} has the {extreme} {metric.name} of {len(with_runs)} arms"
    if len(beaten) == len(against):
        nearest = beaten[0]
        return (
            f"{place}, separated from every other: from the next, {nearest.second}, by "
            f"{_amount(metric, _known(nearest))}, in {_every_seed(nearest)}"
        )
    if len(few) == len(against):
        if not more_planned:
            return f"{place}, but with one seed no arm can be separated from another: run more seeds"
        return f"{place}, but it has too few finished seeds in common with the others to be separated from any"
    if len(rest) == len(against):
        others = sum(pair.separated for pair in comparisons)
        elsewhere = f" ({others} of the other pairs are separated)" if others else ""
        return f"{place}, but the runs do not separate it from any other{elsewhere}"
    if len(beaten) + len(rest) == len(against):
        return f"{place}, separated from {_names(beaten)} but not from {_names(rest)}"
    parts = [
        f"{text} {_names(pairs)}{after}"
        for text, pairs, after in (
            ("separated from", beaten, ""),
            ("not separated from", rest, ""),
            ("but worse than", better, " on the seeds that both finished"),
            ("too few shared seeds to compare it with", few, ""),
            ("not comparable with", refused, f" ({_refusal(metric, refused[0].verdict)})" if refused else ""),
        )
        if pairs
    ]
    return f"{place}: {'; '.join(parts)}"


def _other_way_round(pair: Comparison, goal: str) -> bool:
    """Say whether the shared seeds put the arm second that the table puts first."""
    return pair.difference is not None and pair.difference.value != 0 and not pair.favours_first(goal)


def _refusal(metric: Metric, verdict: Verdict) -> str:
    if verdict is Verdict.OTHER_TARGETS:
        return f"{verdict.value}, so {metric.name} is not over the same text"
    names = metric.name.split("/")
    return f"{verdict.value}; compare {'/'.join([*names[:-1], 'bits_per_byte'])} instead"


def _known(pair: Comparison) -> Estimate:
    assert pair.difference is not None, "a separated pair has a difference"
    return pair.difference


def _names(pairs: Sequence[Comparison]) -> str:
    names = [pair.second for pair in pairs]
    if len(names) > FEW:
        return f"{len(names)} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _direction(difference: Estimate) -> str:
    return "lower" if difference.value < 0 else "higher"


def _amount(metric: Metric, difference: Estimate) -> str:
    """Write the size, its interval (turned so that the size is positive) and what stands behind it."""
    sign = -1 if difference.value < 0 else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    size, low_text, high_text = format_differences(metric, [abs(difference.value), low, high], difference.half_width)
    unit = f" {metric.difference_unit}" if metric.difference_unit else ""
    if math.isnan(difference.half_width):
        return f"{size}{unit} ({_evidence(difference)})"
    over_rows = " over rows only" if difference.n_seeds == 1 else ""
    return f"{size}{unit} (95 % interval{over_rows} {low_text} to {high_text}, {_evidence(difference)})"


def _evidence(difference: Estimate) -> str:
    seeds = _seeds(difference.n_seeds)
    return f"{seeds}, {difference.n_rows:,} rows" if difference.n_rows else seeds


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _every_seed(pair: Comparison) -> str:
    if not pair.seeded:
        return "one run each, since nothing is trained"
    shared = "shared " if pair.seeds_left_out else ""
    effects = _known(pair).per_seed
    agree = sum((effect > 0) == (_known(pair).value > 0) for effect in effects)
    if agree < len(effects):
        return f"{agree} of {len(effects)} {shared}seeds"
    return f"both {shared}seeds" if len(pair.seeds) == 2 else f"every {shared}seed"


def _reason(pair: Comparison) -> str:
    if pair.verdict is Verdict.SEVERAL_COMPARISONS:
        return f"that does not survive Holm's correction for {pair.n_comparisons:,} comparisons"
    return pair.verdict.value
