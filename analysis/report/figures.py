"""Figures of an answer, drawn without a display; a page shows them as inline SVG in its own colours.

matplotlib is imported where a figure is drawn, so that tables and sentences never wait for it.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.study.answer import Answer
from analysis.study.comparison import Comparison
from analysis.study.metrics import Metric, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Tol's "bright" scheme: told apart with any colour vision, on white and on black
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
INK, FAINT, PAPER = "#1f2428", "#9aa4ad", "#fffffe"  # become the page's own colours in SVG
DASHES = ("-", "--", ":", "-.")
WIDTH_INCHES = 7.6
MOST_ARMS = 12  # with curves that can be told apart
MOST_ARM_LINES = 40  # one below the other
LEGEND_LINE_INCHES = 0.22
LABEL_CHARACTERS = 36  # longer ones are wrapped, or get a line of a legend for themselves
RASTER_POINTS = 5_000  # more points than this are drawn as an image inside the SVG, which stays small
SMOOTHING_SHARE = 0.05  # of the steps: the window of the running mean over noisy training losses
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.dpi": 100,
}


@contextmanager
def _styled() -> Iterator[None]:
    """Draw in STYLE, whatever the user's own matplotlib settings are."""
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def colour_of(answer: Answer, arm: str) -> str:
    return COLOURS[answer.arms.index(arm) % len(COLOURS)]


def dashes_of(answer: Answer, arm: str) -> str:
    """Return a line style that tells arms of the same colour apart."""
    return DASHES[answer.arms.index(arm) // len(COLOURS) % len(DASHES)]


@_styled()
def arm_figure(answer: Answer) -> "Figure":
    """Draw the metric of each arm: its mean, the 95 % interval over rows and seeds, and every seed as a dot.

    Of many arms the best MOST_ARM_LINES are drawn.
    """
    table = answer.table[answer.table["n"] > 0].head(MOST_ARM_LINES)
    metric = describe(answer.metric)
    scale = _scale(metric)
    figure, axes = _figure(height=0.9 + 0.5 * len(table))
    for place, (_, row) in enumerate(table.iterrows()):
        colour = colour_of(answer, row["arm"])
        mean, low, high = (scale * float(row[f"{answer.metric} {part}"]) for part in ("mean", "low", "high"))
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color=colour, linewidth=7, alpha=0.25, solid_capstyle="round")
        axes.plot(mean, place, "|", color=colour, markersize=18, markeredgewidth=2.5)
        seeds = scale * answer.counted_runs(row["arm"])[answer.metric].to_numpy(dtype=float)
        axes.plot(seeds, np.full(seeds.size, place), "o", color=colour, markersize=6, markeredgecolor=PAPER)
    axes.set_yticks(range(len(table)), [fill(arm, LABEL_CHARACTERS, break_on_hyphens=False) for arm in table["arm"]])
    axes.set_ylim(len(table) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(f"{axis_label(metric)}; {'lower' if answer.goal == 'min' else 'higher'} is better")
    return figure


@_styled()
def curve_figure(answer: Answer, histories: dict[str, pd.DataFrame], column: str = "train/loss") -> "Figure | None":
    """Draw a metric over the steps, one thin line a run in its arm's colour; None where no run has logged it.

    Of many arms the best MOST_ARMS are drawn.

    Args:
        histories: run id -> `read_history` of the run; runs that did not finish may be among them.
    """
    lines = [
        (run["arm"], run["state"], history[["step", column]].dropna())
        for run in answer.runs[answer.runs["arm"].isin(answer.arms[:MOST_ARMS])].to_dict("records")
        if (history := histories.get(run["run_id"])) is not None and column in history
    ]
    lines = [line for line in lines if len(line[2]) > 1]
    if not lines:
        return None
    drawn = [arm for arm in answer.arms if any(arm == name for name, _, _ in lines)]
    columns = 2 if max(map(len, drawn)) <= LABEL_CHARACTERS else 1
    figure, axes = _figure(height=3.0 + LEGEND_LINE_INCHES * math.ceil(len(drawn) / columns))
    window = max(1, round(SMOOTHING_SHARE * max(len(points) for _, _, points in lines)))
    raster = sum(len(points) for _, _, points in lines) > RASTER_POINTS
    for arm, state, points in lines:
        smooth = points[column].rolling(window, min_periods=1, center=True).mean()
        colour, dashes = colour_of(answer, arm), dashes_of(answer, arm)
        axes.plot(points["step"], smooth, dashes, color=colour, linewidth=1.1, alpha=0.85, rasterized=raster)
        if state != "finished":
            axes.plot(points["step"].iloc[-1], smooth.iloc[-1], "x", color=colour, markersize=7, markeredgewidth=2)
    for arm in drawn:
        axes.plot([], [], dashes_of(answer, arm), color=colour_of(answer, arm), linewidth=2.5, label=arm)
    axes.grid(axis="y")
    axes.set_xlabel(f"optimizer step; running mean of {window} steps" if window > 1 else "optimizer step")
    axes.set_ylabel(axis_label(describe(column)))
    _legend_above(axes, columns)
    return figure


@_styled()
def row_difference_figure(answer: Answer, pairs: Sequence[Comparison]) -> "Figure | None":
    """Draw, for each pair, the difference on every held-out row, sorted; None where no pair has rows."""
    on_rows = [(pair, answer.scores.row_differences(pair.first, pair.second)) for pair in pairs]
    on_rows = [(pair, differences) for pair, differences in on_rows if differences.size]
    if not on_rows:
        return None
    metric = describe(answer.metric)
    scale = _scale(metric)
    figure, panels = _figure(height=3.2 * len(on_rows) + 0.3, panels=len(on_rows), many=True)
    for axes, (pair, differences) in zip(panels, on_rows, strict=True):
        assert pair.difference is not None, "a pair with row differences has a difference"
        sorted_rows = scale * np.sort(differences[np.isfinite(differences)])
        _two_colours(axes, sorted_rows, answer, pair)
        value, low, high = (scale * x for x in (pair.difference.value, pair.difference.low, pair.difference.high))
        if np.isfinite(low):
            axes.axhspan(low, high, color=INK, alpha=0.13, linewidth=0)
        axes.axhline(value, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label="all rows, 95 % interval in grey")
        axes.axhline(0, color=FAINT, linewidth=1)
        axes.set_xlim(0, sorted_rows.size)
        unit = metric.difference_unit or metric.unit
        axes.set_ylabel(f"difference in {metric.short}" + (f"\n({unit})" if unit else ""))
        axes.grid(axis="y")
        _legend_above(axes)
    panels[-1].set_xlabel("held-out rows, sorted by their difference")
    return figure


def _two_colours(axes: "Axes", sorted_rows: np.ndarray, answer: Answer, pair: Comparison) -> None:
    """Fill the sorted differences in the colour of the arm that does better on each row."""
    better = sorted_rows < 0 if answer.goal == "min" else sorted_rows > 0
    worse = ~better & (sorted_rows != 0)
    edges = np.repeat(np.arange(sorted_rows.size + 1), 2)[1:-1]
    for arm, chosen in ((pair.first, better), (pair.second, worse)):
        axes.fill_between(
            edges,
            np.repeat(np.where(chosen, sorted_rows, 0), 2),
            color=colour_of(answer, arm),
            alpha=0.8,
            linewidth=0,
            rasterized=edges.size > RASTER_POINTS,
            label=f"{arm} is better on {chosen.sum():,} of {sorted_rows.size:,} rows",
        )


def axis_label(metric: Metric) -> str:
    unit = "% of rows" if metric.kind == "share" else metric.unit
    return f"{metric.name} ({unit})" if unit else metric.name


def _scale(metric: Metric) -> float:
    return 100.0 if metric.kind == "share" else 1.0


def _figure(height: float, panels: int = 1, *, many: bool = False) -> Any:
    """Return a figure without pyplot's global state, and its axes (a list for several panels)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    return figure, axes if many else axes[0]


def _legend_above(axes: "Axes", columns: int = 1) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4)


@_styled()
def to_svg(figure: "Figure", description: str) -> str:
    """Return the figure as inline SVG: as wide as its place, text as text, ink in the page's colours.

    Args:
        description: what a reader who cannot see it is told.
    """
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = description  # the same figure is the same text; no id is there twice
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = re.sub(r"^.*?<svg", "<svg", buffer.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    # the browser's own font; matplotlib's is not on every machine
    svg = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace(PAPER, "var(--page)")
