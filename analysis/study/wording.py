"""Comparisons as sentences: each says no more than its numbers support, and why it says no more."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.statistics.estimates import Estimate
from analysis.statistics.verdicts import Verdict
from analysis.study.axes import Axis, AxisComparison
from analysis.study.comparison import Comparison
from analysis.study.metrics import Metric, format_differences, format_value

FEW = 4  # arms named one by one
TOO_FEW_SEEDS = (Verdict.ONE_SEED, Verdict.NO_SHARED_SEED)
REFUSED = (Verdict.OTHER_ROWS, Verdict.OTHER_TOKENS, Verdict.OTHER_TARGETS)


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
    against = [pair for pair in comparisons if pair.first == with_runs[0]]
    return _best_of_several(metric, goal, with_runs, against, comparisons, more_planned=more_planned) + "."


def _one_arm(metric: Metric, row: "pd.Series[float]") -> str:
    mean, low, high = (float(row[f"{metric.name} {part}"]) for part in ("mean", "low", "high"))
    unit = f" {metric.unit}" if metric.unit and metric.kind == "number" else ""
    evidence = count_of(int(row["n"]), "seed")
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
    if pair.verdict in REFUSED:
        return f"{pair.first} and {pair.second} cannot be compared in {metric.name}: {_refusal(metric, pair.verdict)}"
    if difference is None:
        what = f"no {pair.unit} that finished in both"
        return f"{pair.first} and {pair.second} have {what} in common, so they cannot be compared"
    if not any(difference.per_seed):
        return f"{pair.first} and {pair.second} have the same {metric.name} ({_evidence(pair)})"
    if difference.value == 0:
        return (
            f"The runs do not separate {pair.first} and {pair.second}: their {pair.unit}s differ in {metric.name}, "
            f"but the mean difference is {_amount(metric, pair)}, and {_reason(pair)}"
        )
    if pair.separated:
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, pair)}, in {_every_seed(pair)}"
        )
    if pair.verdict is Verdict.ONE_SEED:
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, pair)}, but {_why_one(pair, more_planned=more_planned)}"
        )
    return (
        f"The runs do not separate {pair.first} and {pair.second}: {metric.name} is {_direction(difference)} for the "
        f"first by {_amount(metric, pair)}, and {_reason(pair)}"
    )


def _why_one(pair: Comparison, *, more_planned: bool) -> str:
    if pair.unit != "seed":
        return f"only one {pair.unit} has both, and one cannot separate them: run more seeds"
    if more_planned:
        return f"too few seeds are shared: only seed {pair.seeds[0]} can be compared, and one seed cannot separate arms"
    return "one seed cannot separate arms: run more seeds"


def axis_sentence(metric: Metric, goal: str, compared: AxisComparison) -> str:
    """Say what the values of an axis do at equal other settings, in one sentence; some of them must be comparable."""
    axis, levels = compared.axis, list(compared.levels)
    if len(compared.pairs) == 1:
        said = describe_pair(metric, compared.pairs[0])
    else:
        what = f"values of {axis.name} in {count_of(compared.blocks, 'block')}"
        said = _best_of_several(metric, goal, levels, compared.of_the_best, compared.pairs, what)
    said = f"the runs{said.removeprefix('The runs')}" if said.startswith("The runs") else said
    # of one seed the runs of all blocks have one draw of the data and of the adapters' first values
    only = f", of seed {compared.seeds[0]} only" if len(compared.seeds) == 1 and compared.pairs[0].seeded else ""
    return f"{equal_settings(axis)}{only}: {said}."


def equal_settings(axis: Axis) -> str:
    """Say what the runs of a block share, and what is not held equal."""
    return f"At equal {block_words(axis)}"


def block_words(axis: Axis) -> str:
    """Name what makes a block, and what changes inside it."""
    what = _listed([*axis.others, *(["seed"] if axis.cells["seed"].nunique() > 1 else [])])
    return what + (f" ({following(axis)})" if axis.follow else "")


def following(axis: Axis) -> str:
    """Say what is not held equal when the values of an axis are compared."""
    return f"{_listed(axis.follow)} {'changes' if len(axis.follow) == 1 else 'change'} with {axis.name}"


def _best_of_several(
    metric: Metric,
    goal: str,
    with_runs: Sequence[str],
    against: Sequence[Comparison],
    comparisons: Sequence[Comparison],
    what: str = "arms",
    *,
    more_planned: bool = True,
) -> str:
    """Say what the first of several is separated from; `against` are its comparisons, `comparisons` all."""
    best, unit = with_runs[0], against[0].unit
    separated = [pair for pair in against if pair.separated]
    beaten = [pair for pair in separated if pair.favours_first(goal)]
    better = [pair for pair in separated if not pair.favours_first(goal)]
    few = [pair for pair in against if pair.verdict in TOO_FEW_SEEDS]
    refused = [pair for pair in against if pair.verdict in REFUSED]
    rest = [pair for pair in against if not (pair.separated or pair in few or pair in refused)]
    extreme = "lowest" if goal == "min" else "highest"
    place = f"{best} has the {extreme} {metric.name} of {len(with_runs)} {what}"
    if len(beaten) == len(against):
        nearest = beaten[0]
        return (
            f"{place}, separated from every other: from the next, {nearest.second}, by "
            f"{_amount(metric, nearest)}, in {_every_seed(nearest)}"
        )
    if len(few) == len(against):
        if not more_planned:
            return f"{place}, but with one seed no arm can be separated from another: run more seeds"
        return f"{place}, but it has too few finished {unit}s in common with the others to be separated from any"
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
            ("but worse than", better, f" on the {unit}s that both finished"),
            (f"too few shared {unit}s to compare it with", few, ""),
            ("not comparable with", refused, f" ({_refusal(metric, refused[0].verdict)})" if refused else ""),
        )
        if pairs
    ]
    return f"{place}: {'; '.join(parts)}"


def _other_way_round(pair: Comparison, goal: str) -> bool:
    """Say whether the shared seeds put the arm second that the table puts first."""
    return pair.difference is not None and pair.difference.value != 0 and not pair.favours_first(goal)


def _refusal(metric: Metric, verdict: Verdict) -> str:
    if verdict is Verdict.OTHER_ROWS:
        return verdict.value
    if verdict is Verdict.OTHER_TARGETS:
        return f"{verdict.value}, so {metric.name} is not over the same text"
    names = metric.name.split("/")
    return f"{verdict.value}; compare {'/'.join([*names[:-1], 'bits_per_byte'])} instead"


def _known(pair: Comparison) -> Estimate:
    assert pair.difference is not None, "a pair that is described by its difference has one"
    return pair.difference


def _names(pairs: Sequence[Comparison]) -> str:
    return f"{len(pairs)} others" if len(pairs) > FEW else _listed([pair.second for pair in pairs])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _direction(difference: Estimate) -> str:
    return "lower" if difference.value < 0 else "higher"


def _amount(metric: Metric, pair: Comparison) -> str:
    """Write the size, its interval (turned so that the size is positive) and what stands behind it."""
    difference = _known(pair)
    sign = -1 if difference.value < 0 else 1
    low, high = sorted((sign * difference.low, sign * difference.high))
    size, low_text, high_text = format_differences(metric, [abs(difference.value), low, high], difference.half_width)
    unit = f" {metric.difference_unit}" if metric.difference_unit else ""
    if math.isnan(difference.half_width):
        return f"{size}{unit} ({_evidence(pair)})"
    over_rows = " over rows only" if difference.n_seeds == 1 else ""
    return f"{size}{unit} (95 % interval{over_rows} {low_text} to {high_text}, {_evidence(pair)})"


def _evidence(pair: Comparison) -> str:
    difference = _known(pair)
    units = count_of(difference.n_seeds, pair.unit)
    return f"{units}, {difference.n_rows:,} rows" if difference.n_rows else units


def count_of(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def _every_seed(pair: Comparison) -> str:
    effects = _known(pair).per_seed
    if not pair.seeded and pair.unit == "seed":
        return "one run each, since nothing is trained"
    shared = "shared " if pair.seeds_left_out else ""
    agree = sum((effect > 0) == (_known(pair).value > 0) for effect in effects)
    if agree < len(effects):
        return f"{agree} of {len(effects)} {shared}{pair.unit}s"
    return f"both {shared}{pair.unit}s" if len(effects) == 2 else f"every {shared}{pair.unit}"


def _reason(pair: Comparison) -> str:
    if pair.verdict is Verdict.SEVERAL_COMPARISONS:
        return f"that does not survive Holm's correction for {pair.n_comparisons:,} comparisons"
    return pair.reason
