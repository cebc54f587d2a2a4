"""A metric by what was varied, from frames with one row a finished run and columns of settings, metrics and costs."""

import math
import re
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.report.figures.style import (
    COLOURS,
    FAINT,
    INK,
    LABEL_CHARACTERS,
    LEGEND_LINE_INCHES,
    PAPER,
    RASTER_MARKS,
    RASTER_POINTS,
    axis_label,
    legend_above,
    legend_columns,
    look,
    new_figure,
    scale_of,
    styled,
)
from analysis.statistics.blocks import level_values
from analysis.statistics.estimates import estimate_over_seeds
from analysis.study.metrics import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_VALUES = 12  # of a setting, with labels that can be read side by side
DODGE = 0.62  # of the space between two values that the series share
TICK_CHARACTERS = 14
SIZE = re.compile(r"(?:^|[_-])(\d+(?:\.\d+)?)([kmb])$", re.IGNORECASE)  # 80M, llama_7b
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


def ordered(values: "pd.Series[Any]") -> list[Any]:
    """Return the distinct values of a setting: by size where all are numbers or end in one (llama_7b), else by name."""
    distinct = values.dropna().unique().tolist()
    sizes = [_size(str(value)) for value in distinct]
    if None in sizes:
        return sorted(distinct, key=str)
    return [value for _, value in sorted(zip(sizes, distinct, strict=True), key=lambda pair: pair[0] or 0)]


def _size(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        found = SIZE.search(text)
        return float(found[1]) * UNITS[found[2].lower()] if found else None


@styled()
def axis_figure(
    runs: pd.DataFrame,
    axis: str,
    metric: str,
    *,
    by: str | None = None,
    blocks: str | None = None,
    label: str | None = None,
) -> "Figure":
    """Draw the metric against the values of one setting: the mean over runs, its 95 % t interval, every run as a dot.

    Within blocks there is no interval: that of a mean says little of differences between values in the same blocks, and
    of blocks that lack values it would be too narrow. `difference_figure` has intervals of differences.

    Args:
        axis: a column; its values are put side by side, numbers in their order.
        by: a column with one series for each of its values; None: one series of all runs.
        blocks: a column; the levels of its values are taken out of runs and means (`within_blocks`). Without it runs
            should differ in nothing else but the seed: an interval over other settings says nothing.
        label: what the axis is called; None: the column's name.
    """
    if blocks is not None:
        runs = within_blocks(runs, axis, metric, blocks)
    described = describe(metric)
    scale, values = scale_of(described), ordered(runs[axis])
    in_order = all(_size(str(value)) is not None for value in values)  # only then does a line between them mean much
    series = ordered(runs[by]) if by else [None]
    columns = legend_columns([str(name) for name in series])
    figure, [axes] = new_figure(height=3.2 + (LEGEND_LINE_INCHES * math.ceil(len(series) / columns) if by else 0))
    for number, name in enumerate(series):
        its, of_series = look(number), runs if by is None else runs[runs[by] == name]
        shift = DODGE * ((number + 0.5) / len(series) - 0.5)
        places, means = [], []
        for place, value in enumerate(values):
            points = scale * of_series.loc[of_series[axis] == value, metric].dropna().to_numpy(dtype=float)
            if not points.size:
                continue
            raster = len(runs) > RASTER_MARKS
            dots_and_interval(
                axes, place + shift, points, its.colour, its.marker, raster=raster, interval=blocks is None
            )
            places.append(place + shift)
            means.append(points.mean())
        axes.plot(
            places, means, color=its.colour, linestyle=its.dashes if in_order else "none", marker=its.marker, label=name
        )
    axes.set_xticks(range(len(values)), [fill(str(value), TICK_CHARACTERS) for value in values])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xlabel(label or axis)
    axes.set_ylabel(axis_label(described) + ("\nwithin blocks" if blocks is not None else ""))
    axes.grid(axis="y")
    if by:
        legend_above(axes, columns, title=by, alignment="left")
    return figure


def within_blocks(runs: pd.DataFrame, axis: str, metric: str, blocks: str) -> pd.DataFrame:
    """Return the runs with the level of each one's block replaced by the mean level, so that the axis remains.

    A block with one value only says nothing of the axis; its runs are left out.
    """
    runs = runs[np.isfinite(runs[metric].to_numpy(dtype=float))]
    runs = runs[runs.groupby(blocks)[axis].transform("nunique") > 1]
    cells = dict(zip(zip(runs[axis].map(str), runs[blocks], strict=True), runs[metric].astype(float), strict=True))
    without_axis = runs[metric] - runs[axis].map(str).map(level_values(cells))
    of_block = without_axis.groupby(runs[blocks]).transform("mean")
    return runs.assign(**{metric: runs[metric] - of_block + of_block.mean()})


def dots_and_interval(
    axes: "Axes",
    place: float,
    points: "np.ndarray[Any, Any]",
    colour: str,
    marker: str,
    *,
    raster: bool,
    interval: bool = True,
) -> None:
    estimate = estimate_over_seeds(points)
    if interval and math.isfinite(estimate.low):
        axes.plot([place] * 2, [estimate.low, estimate.high], color=colour, linewidth=6, alpha=0.25)
    dots: dict[str, Any] = {
        "color": colour,
        "marker": marker,
        "markersize": 3.5,
        "markerfacecolor": "none",
        "linestyle": "none",
    }
    axes.plot(np.full(points.size, place), points, rasterized=raster, **dots)


@styled()
def heat_map(runs: pd.DataFrame, row: str, column: str, metric: str, *, goal: str = "min") -> "Figure":
    """Draw the mean of the metric for every pair of values of two settings, the better the darker, with its number.

    A pair without a run stays empty.
    """
    from matplotlib.colors import LinearSegmentedColormap

    described = describe(metric)
    means = scale_of(described) * runs.pivot_table(index=row, columns=column, values=metric, aggfunc="mean")
    means = means.reindex(index=ordered(runs[row]), columns=ordered(runs[column]))
    counts = runs.pivot_table(index=row, columns=column, values=metric, aggfunc="count").reindex_like(means)
    table = means.to_numpy(dtype=float)
    low, high = np.nanmin(table), np.nanmax(table)
    shade = (table - low) / (high - low) if high > low else np.full_like(table, 0.5)
    shade = 1 - shade if goal == "min" else shade
    figure, [axes] = new_figure(height=1.4 + 0.5 * len(means))
    colours = LinearSegmentedColormap.from_list("better", ["#e8eef5", COLOURS[0], "#16304d"])
    axes.pcolormesh(shade, cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=2)
    decimals = _decimals(high - low)
    for (y, x), value in np.ndenumerate(table):
        if math.isfinite(value):
            ink = "#1f2429" if shade[y, x] < 0.5 else "#ffffff"  # on the cell's colour, whatever the page's
            text = f"{value:.{decimals}f}"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=ink)
        else:
            axes.text(x + 0.5, y + 0.5, "no run", ha="center", va="center", color=FAINT, fontsize=9)
    axes.set_xticks(np.arange(len(means.columns)) + 0.5, [fill(str(v), TICK_CHARACTERS) for v in means.columns])
    axes.set_yticks(np.arange(len(means)) + 0.5, [fill(str(v), LABEL_CHARACTERS) for v in means.index])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel(column)
    axes.set_ylabel(row)
    few, many = int(np.nanmin(counts.to_numpy(dtype=float))), int(np.nanmax(counts.to_numpy(dtype=float)))
    seeds = f"{few} to {many} runs" if few != many else "1 run" if few == 1 else f"{few} runs"
    better = "lower" if goal == "min" else "higher"
    title = f"{axis_label(described)}, mean of {seeds}; {better} is better and darker"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def _decimals(spread: float) -> int:
    """Return the decimals that show three digits of a spread."""
    return min(6, max(0, 2 - math.floor(math.log10(spread)))) if spread > 0 else 3


@styled()
def parallel_figure(groups: pd.DataFrame, axes_names: Sequence[str], metric: str, *, goal: str = "min") -> "Figure":
    """Draw one line a group through its settings to its metric; the better, the stronger the line.

    Args:
        groups: one row a group (a configuration without its seed), with its settings and its mean metric.
        axes_names: the columns of the settings, from left to right.
    """
    from matplotlib.colors import LinearSegmentedColormap

    described = describe(metric)
    values = scale_of(described) * groups[metric].to_numpy(dtype=float)
    rank = pd.Series(values if goal == "max" else -values).rank(pct=True).to_numpy()
    figure, [axes] = new_figure(height=3.6)
    places = np.empty((len(groups), len(axes_names) + 1))
    for number, name in enumerate(axes_names):
        distinct = ordered(groups[name])
        spots = np.linspace(0, 1, len(distinct)) if len(distinct) > 1 else np.array([0.5])
        places[:, number] = [spots[distinct.index(value)] for value in groups[name]]
        for spot, value in zip(spots, distinct, strict=True):
            if len(distinct) <= MOST_VALUES or value in (distinct[0], distinct[-1]):
                _on_axis(axes, number, spot, fill(str(value), TICK_CHARACTERS), "right")
    low, high = np.nanmin(values), np.nanmax(values)
    places[:, -1] = (values - low) / (high - low) if high > low else 0.5
    decimals = _decimals(high - low)
    for spot in (0.0, 0.25, 0.5, 0.75, 1.0) if high > low else (0.5,):
        _on_axis(axes, len(axes_names), spot, f"{low + spot * (high - low):.{decimals}f}", "left")
    spread = 0.05 * (np.linspace(-1, 1, len(groups)) if len(groups) > 1 else np.zeros(1))  # lines side by side
    places[:, :-1] += spread[np.argsort(np.argsort(rank)), None]
    colours = LinearSegmentedColormap.from_list("better", [FAINT, COLOURS[0]])
    for at in np.argsort(rank):
        strength = rank[at] ** 3
        line: dict[str, Any] = {
            "color": colours(strength),
            "alpha": 0.3 + 0.7 * strength,
            "linewidth": 0.5 + 1.7 * strength,
        }
        axes.plot(range(places.shape[1]), places[at], rasterized=places.size > RASTER_POINTS, **line)
    for number in range(places.shape[1]):
        axes.axvline(number, color=INK, linewidth=0.8)
    axes.set_xticks(range(places.shape[1]), [*axes_names, axis_label(described)])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.25, places.shape[1] - 0.75)
    return figure


def _on_axis(axes: "Axes", place: float, height: float, text: str, side: str) -> None:
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8}
    shift = -0.02 if side == "right" else 0.02
    axes.text(place + shift, height, text, ha=side, va="center", fontsize=9, bbox=box, zorder=3)


@styled()
def cost_figure(runs: pd.DataFrame, cost: str, metric: str, *, by: str | None = None) -> "Figure":
    """Draw the metric of every run against what it cost, such as seconds or bytes.

    Args:
        by: a column whose values have looks of their own.
    """
    from matplotlib.ticker import LogLocator

    its_metric, its_cost = describe(metric), describe(cost)
    series = ordered(runs[by]) if by else [None]
    columns = legend_columns([str(name) for name in series])
    figure, [axes] = new_figure(height=3.2 + (LEGEND_LINE_INCHES * math.ceil(len(series) / columns) if by else 0))
    for number, name in enumerate(series):
        its, of_series = look(number), runs if by is None else runs[runs[by] == name]
        axes.plot(
            scale_of(its_cost) * of_series[cost],
            scale_of(its_metric) * of_series[metric],
            its.marker,
            color=its.colour,
            markersize=6,
            markeredgecolor=PAPER,
            label=name,
            rasterized=len(runs) > RASTER_MARKS,
        )
    if (spread := runs[cost].max() / max(runs[cost].min(), 1e-12)) > 20 and math.isfinite(spread):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.grid()
    axes.set_xlabel(axis_label(its_cost))
    axes.set_ylabel(axis_label(its_metric))
    if by:
        legend_above(axes, columns, handlelength=1.2)
    return figure
