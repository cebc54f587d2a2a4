"""An answer drawn: its arms, and their differences row by row."""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from analysis.report.figures.style import (
    FAINT,
    INK,
    LABEL_CHARACTERS,
    PAPER,
    RASTER_POINTS,
    axis_label,
    legend_above,
    look,
    new_figure,
    scale_of,
    styled,
)
from analysis.study.answer import Answer
from analysis.study.comparison import Comparison
from analysis.study.metrics import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ARM_LINES = 40  # one below the other


def colour_of(answer: Answer, arm: str) -> str:
    return look(answer.arms.index(arm)).colour


@styled()
def arm_figure(answer: Answer) -> "Figure":
    """Draw the metric of each arm: its mean, the 95 % interval over rows and seeds, and every seed as a dot.

    Of many arms the best MOST_ARM_LINES are drawn.
    """
    table = answer.table[answer.table["n"] > 0].head(MOST_ARM_LINES)
    metric = describe(answer.metric)
    scale = scale_of(metric)
    figure, [axes] = new_figure(height=0.9 + 0.5 * len(table))
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


@styled()
def row_difference_figure(answer: Answer, pairs: Sequence[Comparison]) -> "Figure | None":
    """Draw, for each pair, the difference on every held-out row, sorted; None where no pair has rows."""
    on_rows = [(pair, answer.scores.row_differences(pair.first, pair.second)) for pair in pairs]
    on_rows = [(pair, differences) for pair, differences in on_rows if differences.size]
    if not on_rows:
        return None
    metric = describe(answer.metric)
    scale = scale_of(metric)
    figure, panels = new_figure(height=3.2 * len(on_rows) + 0.3, panels=len(on_rows))
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
        legend_above(axes)
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
