"""Comparisons as sentences: each says no more than its numbers support, and why it says no more."""

import math
from collections.abc import Sequence

from analysis.comparison import Comparison
from analysis.metrics import Metric, format_differences
from analysis.statistics import Estimate, Verdict

FEW = 4  # arms named one by one


def sentence(
    metric: Metric, goal: str, arms: Sequence[str], with_runs: Sequence[str], comparisons: Sequence[Comparison]
) -> str:
    """Return the answer in one sentence.

    Args:
        arms: every arm of the study.
        with_runs: those with at least one finished run, the best first.
        comparisons: every pair of `with_runs`, the better arm first.
    """
    if not with_runs:
        return f"No run has finished with {metric.name}, so there is nothing to compare."
    if len(with_runs) == 1:
        others = f"; the other {len(arms) - 1} of {len(arms)} arms have none" if len(arms) > 1 else ""
        return f"Only {with_runs[0]} has finished runs, so there is nothing to compare it with{others}."
    if len(with_runs) == 2:
        return describe_pair(metric, comparisons[0]) + "."
    return _best_of_several(metric, goal, with_runs, comparisons) + "."


def describe_pair(metric: Metric, pair: Comparison) -> str:
    """Say how far two arms are apart and whether the runs separate them; without a full stop."""
    difference = pair.difference
    if difference is None:
        what = "no held-out row" if pair.rows_left_out else "no seed that finished in both"
        return f"{pair.first} and {pair.second} have {what} in common, so they cannot be compared"
    if difference.value == 0:
        return f"{pair.first} and {pair.second} have the same {metric.name} ({_evidence(difference)})"
    if pair.separated:
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, difference)}, in {_every_seed(difference)}"
        )
    if pair.verdict is Verdict.ONE_SEED:
        return (
            f"{pair.first} has a {_direction(difference)} {metric.name} than {pair.second} by "
            f"{_amount(metric, difference)}, but one seed cannot separate arms: run more seeds"
        )
    return (
        f"The runs do not separate {pair.first} and {pair.second}: {metric.name} is {_direction(difference)} for the "
        f"first by {_amount(metric, difference)}, and {_reason(pair)}"
    )


def _best_of_several(metric: Metric, goal: str, with_runs: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    best = with_runs[0]
    against = [pair for pair in comparisons if pair.first == best]
    beaten = [pair for pair in against if pair.separated]
    rest = [pair for pair in against if not pair.separated]
    extreme = "lowest" if goal == "min" else "highest"
    place = f"{best} has the {extreme} {metric.name} of {len(with_runs)} arms"
    if not beaten:
        others = sum(pair.separated for pair in comparisons)
        elsewhere = f" ({others} of the other pairs are separated)" if others else ""
        if all(pair.verdict is Verdict.ONE_SEED for pair in rest):
            return f"{place}, but with one seed no arm can be separated from another: run more seeds"
        return f"{place}, but the runs do not separate it from any other{elsewhere}"
    nearest = beaten[0]
    if not rest:
        return (
            f"{place}, separated from every other: from the next, {nearest.second}, by "
            f"{_amount(metric, _known(nearest))}, in {_every_seed(_known(nearest))}"
        )
    return f"{place}, separated from {_names(beaten)} but not from {_names(rest)}"


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
    seeds = "1 seed" if difference.n_seeds == 1 else f"{difference.n_seeds} seeds"
    return f"{seeds}, {difference.n_rows:,} rows" if difference.n_rows else seeds


def _every_seed(difference: Estimate) -> str:
    return "both seeds" if difference.n_seeds == 2 else "every seed"


def _reason(pair: Comparison) -> str:
    if pair.verdict is Verdict.SEVERAL_COMPARISONS:
        return f"that does not survive Holm's correction for {pair.n_comparisons} comparisons"
    return pair.verdict.value
