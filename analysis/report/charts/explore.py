"""Every run against its cost, above parallel coordinates of what was varied."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.report.charts.chart import CONFIG, CONTAINER, Chart, records
from analysis.report.figures.settings import ordered
from analysis.report.figures.style import axis_label, look, scale_of
from analysis.report.overview import Overview
from analysis.study.metrics import describe

if TYPE_CHECKING:
    import altair as alt

MOST_TICKS = 12  # of an axis of parallel coordinates
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")


def explore_chart(overview: Overview) -> Chart | None:
    """Return the quality of every run against its cost above parallel coordinates; what is brushed shows in both.

    None where there is neither a cost nor a second setting.
    """
    if overview.runs.empty or not (overview.costs or len(overview.axes) > 1):
        return None
    import altair as alt

    runs, ticks, titles = _explore_data(overview)
    by = _by(overview)
    values = _values(overview)
    colours = alt.Scale(domain=values, range=[look(number).colour for number in range(len(values))])
    colour = alt.Color("by:N", title=by, scale=colours)
    pick = alt.selection_point(name="pick", fields=["by"], bind="legend")
    base = alt.Chart(alt.NamedData("runs"))
    if overview.costs:
        base = base.transform_calculate(cost="datum[chosen]")
    base = base.transform_calculate(within=_within(overview, list(titles)))
    views: list[Any] = []
    if overview.costs:
        views.append(_scatter(overview, base, colour, pick).add_params(pick))
    if len(overview.axes) > 1:
        lines = _lines(base, colour.legend(None) if views else colour, pick, titles, len(runs))
        views.append(lines if views else lines.add_params(pick))
    chart = alt.vconcat(*views, spacing=24).resolve_legend(color="independent", shape="independent")
    if overview.costs:
        labels = [axis_label(describe(cost)) for cost in overview.costs]
        keys = [f"c{number}" for number in range(len(labels))]
        choice = alt.binding_select(options=keys, labels=labels, name="cost: ") if len(keys) > 1 else alt.Undefined
        chart = chart.add_params(alt.param(name="chosen", value=keys[0], bind=choice))
    return Chart(chart.to_dict() | {"config": CONFIG}, {"runs": runs, "ticks": ticks})


def _by(overview: Overview) -> str:
    return overview.told_apart_by() or overview.axes[0]


def _values(overview: Overview) -> list[str]:
    return [str(value) for value in ordered(overview.runs[_by(overview)])]


def _within(overview: Overview, keys: Sequence[str]) -> str:
    """Return the expression that says whether a run is within what is brushed in both charts."""
    brushed = []
    if overview.costs:
        inside = "inrange(datum.cost, on_points.cost) && inrange(datum.y, on_points.y)"
        brushed.append(f"(!isValid(on_points.cost) || ({inside}))")
    if len(overview.axes) > 1:
        brushed += [
            f"(!isValid(on_lines.axis) || indexof(on_lines.axis, '{key}') < 0 || inrange(datum.{key}, on_lines.place))"
            for key in keys
        ]
    return " && ".join(brushed)


def _scatter(overview: Overview, base: "alt.Chart", colour: "alt.Color", pick: "alt.Parameter") -> "alt.Chart":
    import altair as alt

    metric, costs = axis_label(describe(overview.metric)), overview.costs
    values = _values(overview)
    shapes = alt.Scale(domain=values, range=[SHAPES[number % len(SHAPES)] for number in range(len(values))])
    tooltip = [
        alt.Tooltip("id:N", title="run"),
        alt.Tooltip("arm:N"),
        alt.Tooltip("seed:Q"),
        alt.Tooltip("y:Q", title=metric, format=".4~g"),
        alt.Tooltip("cost:Q", format=".4~g"),
    ]
    points = base.mark_point(filled=True, size=45).encode(
        x=alt.X(
            "cost:Q", scale=alt.Scale(zero=False), title=axis_label(describe(costs[0])) if len(costs) == 1 else "cost"
        ),
        y=alt.Y("y:Q", scale=alt.Scale(zero=False), title=metric),
        color=colour,
        shape=alt.Shape("by:N", title=_by(overview), scale=shapes),
        opacity=alt.when(pick, within=True).then(alt.value(0.9)).otherwise(alt.value(0.06)),
        tooltip=tooltip,
    )
    brush = alt.selection_interval(name="on_points")
    return points.add_params(brush).properties(width=CONTAINER, height=260)


def _lines(
    base: "alt.Chart", colour: "alt.Color", pick: "alt.Parameter", titles: Mapping[str, str], n_runs: int
) -> Any:
    """Return parallel coordinates; `titles` names the axes by their columns."""
    import altair as alt

    names = alt.Axis(
        orient="top", title=None, labelAngle=0, labelExpr=f"({json.dumps(dict(titles))})[datum.value]", grid=True
    )
    x = alt.X("axis:N", scale=alt.Scale(type="point", domain=list(titles), padding=0.2), axis=names)
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.06, 1.06], nice=False))
    strength = min(0.8, 0.15 + 20 / n_runs)
    lines = (
        base.transform_fold(list(titles), as_=["axis", "place"])
        .mark_line()
        .encode(
            x=x,
            y=y,
            detail="id:N",
            color=colour,
            opacity=alt.when(pick, within=True).then(alt.value(strength)).otherwise(alt.value(0.02)),
        )
        .add_params(alt.selection_interval(name="on_lines"))
    )
    texts = (
        alt.Chart(alt.NamedData("ticks"))
        .mark_text(align="left", dx=5, fontSize=11, fontWeight="bold")
        .encode(x=x, y=y, text="text:N")
    )
    return alt.layer(lines, texts).properties(width=CONTAINER, height=320)


def _explore_data(overview: Overview) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Return one row a run, the values to write on each axis of parallel coordinates, and the axes' names by key."""
    found, by = overview.runs, _by(overview)
    metric = describe(overview.metric)
    y = scale_of(metric) * found[overview.metric]
    frame = pd.DataFrame({"id": found["run_id"], "arm": found["arm"], "seed": found["seed"].astype(object), "y": y})
    frame["by"] = found[by].map(str)
    for number, cost in enumerate(overview.costs):
        frame[f"c{number}"] = scale_of(describe(cost)) * found[cost]
    beside = 0.03 * (2 * y.rank(pct=True) - 1)  # lines through one value lie side by side, the better together
    ticks, titles = [], {}
    for number, axis in enumerate(overview.axes):
        distinct = ordered(found[axis])
        spots = dict(zip(distinct, np.linspace(0, 1, len(distinct)), strict=True))
        titles[f"p{number}"] = axis
        frame[f"p{number}"] = found[axis].map(spots) + beside
        shown = distinct if len(distinct) <= MOST_TICKS else [distinct[0], distinct[-1]]
        ticks += [{"axis": f"p{number}", "place": spots[value], "text": str(value)} for value in shown]
    low, high = float(y.min()), float(y.max())
    last = f"p{len(overview.axes)}"
    titles[last] = axis_label(metric)
    frame[last] = (y - low) / (high - low) if high > low else 0.5
    ticks += [{"axis": last, "place": spot, "text": f"{low + spot * (high - low):.3g}"} for spot in (0.0, 0.5, 1.0)]
    return records(frame), ticks, titles
