"""The sections of a report about what was varied: the metric by setting, what matters, costs, and training."""

import pandas as pd

from analysis.report.axis_sections import by_axis
from analysis.report.figures.curves import curve_figure
from analysis.report.figures.scaling import scaling_figure
from analysis.report.figures.settings import MOST_VALUES, cost_figure, heat_map, parallel_figure
from analysis.report.figures.style import to_svg
from analysis.report.overview import MODEL, MOST_ARMS, Overview, TrainingCurves, with_sizes
from analysis.report.page import figure, paragraph, section
from analysis.report.tables import to_html
from analysis.study.answer import Answer

MOST_SERIES = 6


def settings(answer: Answer, overview: Overview) -> str:
    """Show the metric by each setting; where only one varies the arms' figure does, and sizes alone are drawn."""
    metric, runs = overview.metric, overview.runs
    few = [axis for axis in overview.axes if runs[axis].nunique() <= MOST_VALUES]
    content = [by_axis(answer, overview), _scaling(answer, overview)]
    if len(few) > 1:
        row, column = sorted(few, key=lambda axis: runs[axis].nunique())[-2:]
        drawn = heat_map(runs, row, column, metric, goal=overview.goal)
        caption = (
            "A mean over whatever else varies: where not all combinations have finished, cells differ in that too."
        )
        content.append(figure(to_svg(drawn, f"{metric} by {row} and {column}"), caption))
    return section("By setting", *content)


def _scaling(answer: Answer, overview: Overview) -> str:
    """Draw the metric against the models' sizes, where three or more were tried."""
    sized = with_sizes(overview, answer)
    if sized is None:
        return ""
    others = [axis for axis in overview.axes if axis != MODEL]
    asked = [axis for compared in answer.by_axis if compared.axis.asked for axis in compared.axis.keys]
    by = next((axis for axis in [*asked, *others] if axis != MODEL and 1 < sized[axis].nunique() <= MOST_SERIES), None)
    drawn = scaling_figure(sized, overview.metric, by=by)
    mixed = [
        axis
        for axis in others
        if axis != by and sized.groupby([MODEL, *([by] if by else [])])[axis].nunique().max() > 1
    ]
    over = f"runs, which also differ in {', '.join(mixed)}" if mixed else "seeds"
    caption = f"Every run against the parameters of its model; lines join means, bars are 95 % t intervals over {over}."
    return figure(to_svg(drawn, f"{overview.metric} by the number of parameters"), caption)


def variance(answer: Answer) -> str:
    """Say how much of the spread between runs goes with each setting, with the seed, and with the rest."""
    parts = answer.variance
    if parts.empty:
        return ""
    shown = pd.DataFrame(
        {
            "source": parts["source"],
            "share of the variance": [f"{share:.1%}" for share in parts["share"]],
            "95 % interval": _intervals(parts, "{:.1%} to {:.1%}"),
            "p": ["–" if pd.isna(p) else f"{p:.2g}" for p in parts["p"]],
        }
    )
    note = (
        f"The variance of {answer.metric} between the counted runs, by what goes with it: main effects of the "
        "settings, what they do only together, and the seed."
    )
    if (parts["overlap"] > 0.01).any():
        note += " Not all combinations have as many runs, so the settings overlap: their shares are means over orders."
    return section("What matters", to_html(shown), paragraph(note, "soft"))


def benchmarks(answer: Answer) -> str:
    """Show all benchmarks together, arm by arm, and whether they agree; nothing where there are too few."""
    content = []
    if len(answer.iqm):
        rows = answer.iqm
        shown = pd.DataFrame(
            {
                "arm": rows["arm"],
                "interquartile mean": [f"{value:.3f}" for value in rows["iqm"]],
                "95 % interval": _intervals(rows, "{:.3f} to {:.3f}"),
                "behind the first": _intervals(rows, "{:.3f} to {:.3f}", "behind_low", "behind_high"),
                "seeds": rows["n"],
                "benchmarks": rows["tasks"],
            }
        )
        content.append(to_html(shown))
        note = (
            "The mean of the middle half of all scores; one benchmark cannot decide it. How far an arm is behind the "
            "first is a 95 % interval of the difference, paired by seed and benchmark."
        )
        content.append(paragraph(note, "soft"))
    if len(answer.correlations):
        content.append(to_html(answer.correlations.round(3), text_columns=list(answer.correlations.columns[:2])))
        content.append(paragraph("Rank correlations over arms: does one benchmark say what another says?", "soft"))
    return section("Benchmarks together", *content)


def _intervals(rows: pd.DataFrame, form: str, lowest: str = "low", highest: str = "high") -> list[str]:
    pairs = zip(rows[lowest], rows[highest], strict=True)
    return ["–" if pd.isna(low) else form.format(low, high) for low, high in pairs]


def explore(overview: Overview) -> str:
    """Draw quality against cost, and parallel coordinates of the arms; the chart `explore` may take their place."""
    pictures = []
    if overview.runs.empty:
        return ""
    if overview.costs:
        drawn = cost_figure(overview.runs, overview.costs[0], overview.metric, by=overview.told_apart_by())
        pictures.append(to_svg(drawn, f"{overview.metric} of every run against {overview.costs[0]}"))
    if len(overview.axes) > 1:
        drawn = parallel_figure(overview.arms(), overview.axes, overview.metric, goal=overview.goal)
        pictures.append(to_svg(drawn, f"Parallel coordinates of the settings and {overview.metric}"))
    if not pictures:
        return ""
    caption = "Every counted run against what it cost." if overview.costs else ""
    caption += " One line an arm through its settings to its mean." if len(overview.axes) > 1 else ""
    return section("Quality and cost", figure("\n".join(pictures), caption.strip(), name="explore"))


def training(answer: Answer, curves: TrainingCurves | None) -> str:
    if curves is None:
        return ""
    drawn = curve_figure(curves.history, curves.groups, curves.metric, stopped=curves.stopped)
    if drawn is None:
        return ""
    caption = (
        "The mean of each arm's finished runs, with a band from the lowest to the highest; thin lines with a cross are "
        "runs that did not finish. Each arm is trained on its own rows, so these losses cannot be compared between "
        "arms as the held-out ones can."
    )
    if len(answer.arms) > MOST_ARMS:
        caption += f" Of {len(answer.arms)} arms the best {MOST_ARMS} are drawn."
    if curves.damaged_lines:
        caption += f" {curves.damaged_lines} damaged lines of metrics.jsonl are left out (a killed run leaves one)."
    return section("Training", figure(to_svg(drawn, "Training loss over the steps"), caption, name="curves"))
