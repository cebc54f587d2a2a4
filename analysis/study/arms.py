"""Which runs are one arm: the same configuration, whatever the seed."""

from collections.abc import Hashable, Mapping, Sequence

import pandas as pd

SEED = "seed"
IDENTITY_GROUPS = ("model", "quant", "adapter", "data", "optim", "trainer", "evaluation")
AxisValues = Mapping[str, object]


def axes_without_seed(axes: Sequence[str]) -> list[str]:
    return [axis for axis in axes if axis != SEED]


def varying_axes(runs: pd.DataFrame) -> list[str]:
    """Find what tells the arms of unplanned runs apart: the fewest `GROUP.KEY` of the configuration, names first.

    A key that adds nothing (data.source.template where data.name differs too) is left out, and a name stands for its
    whole group, as an axis `data`.
    """
    partition = pd.Series("", index=runs.index)
    axes: list[str] = []
    for group in IDENTITY_GROUPS:
        prefix = f"config.{group}."
        columns = sorted((c for c in runs.columns if c.startswith(prefix)), key=lambda c: (c != f"{prefix}name", c))
        for column in columns:
            refined = partition + "|" + runs[column].map(str)
            if refined.nunique() > max(partition.nunique(), 1):
                partition = refined
                axes.append(group if column == f"{prefix}name" else column.removeprefix("config."))
    return axes


def arms_of_runs(runs: pd.DataFrame, axes: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return each run's place on `axes`, read from its configuration: for a group, its name or what differs in it."""
    places: dict[str, dict[str, object]] = {}
    columns = {axis: _columns_of(runs, axis) for axis in axes_without_seed(axes)}
    for run in runs.to_dict("records"):
        places[str(run["run_id"])] = {axis: _value_of(run, axis, columns[axis]) for axis in columns}
    return places


def _columns_of(runs: pd.DataFrame, axis: str) -> list[str]:
    for column in (f"config.{axis}", f"config.{axis}.name"):
        if column in runs.columns:
            return [column]
    return [c for c in runs.columns if c.startswith(f"config.{axis}.") and runs[c].map(str).nunique() > 1]


def _value_of(run: Mapping[Hashable, object], axis: str, columns: list[str]) -> object:
    if pd.isna(run["seed"]):  # type: ignore[call-overload]  # no configuration could be read
        return "unknown"
    if len(columns) == 1:
        return "none" if pd.isna(run[columns[0]]) else run[columns[0]]  # type: ignore[call-overload]
    return " ".join(f"{column.removeprefix(f'config.{axis}.')}={run[column]}" for column in columns)


def label_arms(places: Mapping[str, AxisValues]) -> dict[str, str]:
    """Return each run's arm as a short name: the values of the axes that vary, without the seed.

    A group's value stands alone (`procedural_clean_128`), another key keeps its last name (`rank=16`), or its whole
    name where two axes end alike.

    Example:
        >>> label_arms({"a": {"quant": "nf4", "adapter.rank": 4}, "b": {"quant": "nf4", "adapter.rank": 16}})
        {'a': 'rank=4', 'b': 'rank=16'}
    """
    axes = axes_without_seed(list(dict.fromkeys(axis for place in places.values() for axis in place)))
    varying = [axis for axis in axes if len({str(place.get(axis)) for place in places.values()}) > 1] or axes
    last_names = [axis.rsplit(".", 1)[-1] for axis in varying]

    def part(axis: str, value: object) -> str:
        last = axis.rsplit(".", 1)[-1]
        if "." not in axis:
            return str(value)
        return f"{last if last_names.count(last) == 1 else axis}={value}"

    return {
        run_id: ", ".join(part(axis, place[axis]) for axis in varying if axis in place) or "all runs"
        for run_id, place in places.items()
    }
