"""A metric against the number of parameters."""

import math
from typing import TYPE_CHECKING

import pandas as pd

from analysis.report.figures.settings import dots_and_interval, ordered
from analysis.report.figures.style import (
    LEGEND_LINE_INCHES,
    RASTER_MARKS,
    axis_label,
    legend_above,
    legend_columns,
    look,
    new_figure,
    scale_of,
    styled,
)
from analysis.study.metrics import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 1.35  # sizes less far apart have one label


@styled()
def scaling_figure(
    runs: pd.DataFrame, metric: str, *, size: str = "total_parameters", by: str | None = None
) -> "Figure":
    """Draw the metric against the number of parameters on a logarithmic axis: means, 95 % t intervals, every run.

    Args:
        runs: one row a finished run.
        size: the column of the number of parameters.
        by: a column with one line for each of its values; None: one line.
    """
    described = describe(metric)
    series = ordered(runs[by]) if by else [None]
    columns = legend_columns([str(name) for name in series])
    figure, [axes] = new_figure(height=3.4 + (LEGEND_LINE_INCHES * math.ceil(len(series) / columns) if by else 0))
    for number, name in enumerate(series):
        its, of_series = look(number), runs if by is None else runs[runs[by] == name]
        found = of_series.dropna(subset=[size, metric]).groupby(size)[metric]
        shift = 1.02 ** (number - (len(series) - 1) / 2)  # so that intervals lie side by side
        means = []
        for parameters, values in ((float(str(key)), values) for key, values in found):
            points = scale_of(described) * values.to_numpy(dtype=float)
            dots_and_interval(axes, parameters * shift, points, its.colour, its.marker, raster=len(runs) > RASTER_MARKS)
            means.append((parameters * shift, points.mean()))
        line = {"color": its.colour, "linestyle": its.dashes, "marker": its.marker, "linewidth": 1.3, "label": name}
        axes.plot([place for place, _ in means], [mean for _, mean in means], **line)
    axes.set_xscale("log")
    sizes = sorted(float(parameters) for parameters in runs[size].dropna().unique())
    named = [n for n, parameters in enumerate(sizes) if n == 0 or parameters >= NEAR * sizes[n - 1]]
    axes.set_xticks([sizes[n] for n in named], [_size_text(sizes[n]) for n in named])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.grid(axis="y")
    axes.set_xlabel("parameters of the model")
    axes.set_ylabel(axis_label(described))
    if by:
        legend_above(axes, columns)
    return figure


def _size_text(parameters: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return f"{parameters:g}"
