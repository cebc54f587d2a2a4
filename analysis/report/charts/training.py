"""The training curve of each arm."""

import pandas as pd

from analysis.report.charts.chart import CONFIG, CONTAINER, Chart, records
from analysis.report.figures.curves import group_curves, run_curves, thinned
from analysis.report.figures.style import axis_label, look
from analysis.report.overview import TrainingCurves
from analysis.study.metrics import describe

CURVE_POINTS = 80  # of a group
VEGA_DASHES = ([1, 0], [6, 3], [2, 3], [8, 3, 2, 3], [4, 2, 1, 2])  # as figures.style.DASHES


def training_chart(curves: TrainingCurves | None) -> Chart | None:
    """Return the curve of each arm with its band; a click in the legend leaves one arm, or several with Shift."""
    if curves is None:
        return None
    finished = [run_id for run_id in curves.groups if run_id not in curves.stopped]
    smooth, window = run_curves(curves.history, finished, curves.metric)
    lines = group_curves(smooth, curves.groups)
    if lines.empty:
        return None
    import altair as alt

    groups = list(dict.fromkeys(lines["group"]))
    looks = [look(number) for number in range(len(groups))]
    colour = alt.Color(
        "group:N",
        scale=alt.Scale(domain=groups, range=[its.colour for its in looks]),
        legend=alt.Legend(title=None, symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
    )
    dashes = alt.StrokeDash(
        "group:N",
        title=None,
        scale=alt.Scale(domain=groups, range=[VEGA_DASHES[n % len(VEGA_DASHES)] for n in range(len(groups))]),
    )
    pick = alt.selection_point(name="picked", fields=["group"], bind="legend")
    seen = alt.when(pick)
    base = alt.Chart(alt.NamedData("curves")).encode(
        x=alt.X("step:Q", axis=alt.Axis(tickCount=8), title=f"optimizer step; running mean of {window} steps")
    )
    title = axis_label(describe(curves.metric))
    band = base.mark_area().encode(
        y=alt.Y("low:Q", title=title, scale=alt.Scale(zero=False)),
        y2="high:Q",
        color=colour,
        opacity=seen.then(alt.value(0.2)).otherwise(alt.value(0.02)),
    )
    line = base.mark_line(strokeWidth=2).encode(
        y="mean:Q",
        color=colour,
        strokeDash=dashes,
        opacity=seen.then(alt.value(1)).otherwise(alt.value(0.08)),
    )
    numbers = [alt.Tooltip(f"{name}:Q", format=".4~g") for name in ("mean", "low", "high")]
    points = base.mark_point(opacity=0, size=60).encode(
        y="mean:Q", tooltip=[alt.Tooltip("group:N"), alt.Tooltip("step:Q"), *numbers]
    )
    chart = alt.layer(band, line.add_params(pick), points).properties(width=CONTAINER, height=300)
    kept = pd.concat([thinned(of_group, CURVE_POINTS) for _, of_group in lines.groupby("group", sort=False)])
    return Chart(chart.to_dict() | {"config": CONFIG}, {"curves": records(kept)})
