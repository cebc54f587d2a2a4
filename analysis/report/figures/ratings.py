"""Ratings of systems with their intervals."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.report.figures.style import COLOURS, FAINT, PAPER, legend_above, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled()
def ratings_figure(told: Mapping[str, Any]) -> "Figure":
    """Draw each system's Bradley-Terry rating with its 95 % interval over questions, and its Elo beside it.

    Args:
        told: what `python -m qlora_lab.tournament --json` writes. Elo's bar is two standard deviations over the
            questions to each side: that over orders of the matches alone would be much shorter, and says nothing
            about other questions.
    """
    systems = told["systems"]
    figure, [axes] = new_figure(height=1.5 + 0.42 * len(systems))
    for place, row in enumerate(systems):
        axes.plot(
            [row["rating_low"], row["rating_high"]],
            [place - 0.13] * 2,
            color=COLOURS[0],
            linewidth=7,
            alpha=0.3,
            solid_capstyle="butt",
        )
        spread = 2 * row["elo_question_std"]
        axes.plot([row["elo"] - spread, row["elo"] + spread], [place + 0.2] * 2, color=COLOURS[1], linewidth=1.4)
    rows = range(len(systems))
    label = f"Bradley-Terry, 95 % over {told['questions']} questions"
    axes.plot(
        [row["rating"] for row in systems],
        [place - 0.13 for place in rows],
        "o",
        color=COLOURS[0],
        markeredgecolor=PAPER,
        markersize=8,
        label=label,
    )
    settings = told["settings"]
    label = f"Elo, K {settings['k']:g}, mean of {settings['orders']:,} orders; 2 std over questions"
    axes.plot(
        [row["elo"] for row in systems],
        [place + 0.2 for place in rows],
        "D",
        color=COLOURS[1],
        markerfacecolor=PAPER,
        markersize=5,
        label=label,
    )
    axes.set_yticks(rows, [row["system"] for row in systems])
    axes.set_ylim(len(systems) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.axvline(settings["start"], color=FAINT, linewidth=1)
    axes.grid(axis="x")
    axes.set_xlabel(f"rating in points, judged by {told['judge']}; 400 points are odds of 10 to 1")
    legend_above(axes, handlelength=1.2)
    return figure
