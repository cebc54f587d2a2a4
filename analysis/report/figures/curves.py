"""A metric over the steps of training: one line a group, with a band over its seeds."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.report.figures.style import (
    LEGEND_LINE_INCHES,
    axis_label,
    legend_above,
    legend_columns,
    look,
    new_figure,
    styled,
)
from analysis.study.metrics import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING_SHARE = 0.05  # of the steps: the window of the running mean over noisy training losses
DRAWN_POINTS, MARKED_POINTS = 300, 8  # of a line


def run_curves(history: pd.DataFrame, run_ids: Collection[str], metric: str) -> tuple[pd.DataFrame, int]:
    """Return the smoothed curves of runs, one column a run indexed by step, and the window of the running mean.

    Between the steps that a run has logged its curve is interpolated; outside of them it is NaN.
    """
    if metric not in history:
        return pd.DataFrame(), 1
    logged = history.loc[history["run_id"].isin(list(run_ids)), ["run_id", "step", metric]].dropna()
    wide = logged.pivot(index="step", columns="run_id", values=metric).interpolate(method="index", limit_area="inside")
    wide = wide.loc[:, wide.notna().sum() > 1]
    window = max(1, round(SMOOTHING_SHARE * len(wide)))
    return wide.rolling(window, min_periods=1, center=True).mean().where(wide.notna()), window


def group_curves(curves: pd.DataFrame, groups: Mapping[str, str]) -> pd.DataFrame:
    """Return the curve of each group of runs over the steps that all of its runs have.

    Args:
        curves: of `run_curves`.
        groups: run id -> group, such as the configuration without its seed.

    Returns:
        One row a step of a group: `group`, `step`, `mean`, `low` and `high` (the lowest and the highest run), `seeds`.
    """
    frames = []
    for group in dict.fromkeys(groups.values()):
        runs = [run for run in curves.columns if groups.get(run) == group]
        whole = curves[runs].dropna()
        if runs and len(whole):
            numbers = {"mean": whole.mean(axis=1), "low": whole.min(axis=1), "high": whole.max(axis=1)}
            frames.append(pd.DataFrame({"group": group, "step": whole.index, **numbers, "seeds": len(runs)}))
    columns = ["group", "step", "mean", "low", "high", "seeds"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def thinned(points: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return at most so many of the rows, evenly apart, the first and the last among them."""
    if len(points) <= most:
        return points
    return points.iloc[np.linspace(0, len(points) - 1, most).round().astype(int)]


@styled()
def curve_figure(
    history: pd.DataFrame,
    groups: Mapping[str, str],
    metric: str = "train/loss",
    *,
    stopped: Collection[str] = (),
) -> "Figure | None":
    """Draw each group's mean over its runs, with a band from the lowest run to the highest.

    Args:
        history: from `load_history`.
        groups: run id -> group, in the order of the legend.
        stopped: runs that did not finish: in no mean, drawn as a thin line with a cross at its end.

    Returns:
        None where no run has logged the metric.
    """
    curves, window = run_curves(history, groups, metric)
    if curves.empty:
        return None
    drawn = [group for group in dict.fromkeys(groups.values()) if any(groups[run] == group for run in curves.columns)]
    lines = group_curves(curves[[run for run in curves.columns if run not in stopped]], groups)
    columns = legend_columns(drawn)
    figure, [axes] = new_figure(height=3.0 + LEGEND_LINE_INCHES * math.ceil(len(drawn) / columns))
    for number, group in enumerate(drawn):
        its, of_group = look(number), thinned(lines[lines["group"] == group], DRAWN_POINTS)
        if len(of_group) and of_group["seeds"].iloc[0] > 1:
            band = (of_group["low"].to_numpy(), of_group["high"].to_numpy())
            axes.fill_between(of_group["step"], *band, color=its.colour, alpha=0.2, linewidth=0)
        every = max(1, len(of_group) // MARKED_POINTS)
        marks = (number * every // max(1, len(drawn)), every)  # not at the same steps as the others'
        axes.plot(
            of_group["step"],
            of_group["mean"],
            color=its.colour,
            linestyle=its.dashes,
            marker=its.marker,
            markevery=marks,
            markersize=4.5,
            linewidth=1.5,
            label=group,
        )
        for run in stopped:
            if groups.get(run) == group and run in curves:
                points = thinned(curves[[run]].dropna(), DRAWN_POINTS)[run]
                axes.plot(points.index, points, color=its.colour, linewidth=0.7, linestyle=its.dashes)
                axes.plot(points.index[-1], points.iloc[-1], "x", color=its.colour, markersize=7, markeredgewidth=2)
    axes.grid(axis="y")
    axes.set_xlabel(f"optimizer step; running mean of {window} steps" if window > 1 else "optimizer step")
    axes.set_ylabel(axis_label(describe(metric)))
    legend_above(axes, columns)
    return figure
