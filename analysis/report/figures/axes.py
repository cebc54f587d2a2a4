"""Values of an axis, each as its difference from the best, block by block."""

import math
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.report.figures.style import (
    COLOURS,
    FAINT,
    LABEL_CHARACTERS,
    PAPER,
    RASTER_MARKS,
    new_figure,
    scale_of,
    styled,
)
from analysis.study.answer import Answer
from analysis.study.axes import AxisComparison
from analysis.study.comparison import Comparison
from analysis.study.metrics import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 40


def drawable(compared: AxisComparison) -> list[Comparison]:
    """Return the pairs of the best value that have a difference which means something."""
    return [pair for pair in compared.of_the_best if pair.difference is not None and pair.refused is None]


@styled()
def difference_figure(answer: Answer, compared: AxisComparison) -> "Figure | None":
    """Draw each value minus the best: the mean over shared blocks, its 95 % interval, every block as a dot.

    Returns:
        None where the best value has no difference from another that means something.
    """
    pairs = drawable(compared)[:MOST_LINES]
    if not pairs:
        return None
    metric = describe(answer.metric)
    scale = -scale_of(metric)  # pairs are the best minus another
    figure, [axes] = new_figure(height=1.0 + 0.42 * len(pairs))
    dots = sum(len(pair.seeds) for pair in pairs)
    for place, pair in enumerate(pairs):
        found = pair.difference
        assert found is not None, "pairs without one are left out"
        effects = scale * np.array(found.per_seed)
        lift = np.linspace(-0.17, 0.17, effects.size) if effects.size > 1 else np.zeros(1)
        axes.plot(effects, place + lift, "o", color=FAINT, markersize=3, rasterized=dots > RASTER_MARKS)
        if math.isfinite(found.low):
            bounds = [scale * found.low, scale * found.high]
            axes.plot(bounds, [place] * 2, color=COLOURS[0], linewidth=2.2, solid_capstyle="butt")
        fill_colour = COLOURS[0] if pair.separated else PAPER
        mark: dict[str, Any] = {
            "color": COLOURS[0],
            "markersize": 8,
            "markerfacecolor": fill_colour,
            "markeredgewidth": 1.6,
        }
        axes.plot(scale * found.value, place, "D", **mark)
    axes.axvline(0, color=FAINT, linewidth=1)
    labels = [f"{pair.second} ({len(pair.seeds)})" for pair in pairs]
    axes.set_yticks(range(len(pairs)), [fill(text, LABEL_CHARACTERS, break_on_hyphens=False) for text in labels])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    unit = metric.difference_unit
    worse = "to the right" if answer.goal == "min" else "to the left"
    what = f"{metric.short} minus that of {pairs[0].first}{f' ({unit})' if unit else ''}"
    axes.set_xlabel(fill(f"{what}; worse {worse}; blocks in brackets", 90))
    return figure
