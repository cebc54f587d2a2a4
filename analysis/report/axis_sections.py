"""The section of a report about axes: the values of each, compared at equal other settings."""

from collections.abc import Sequence

from analysis.report.figures.axes import MOST_LINES, difference_figure, drawable
from analysis.report.figures.settings import MOST_VALUES, axis_figure
from analysis.report.figures.style import to_svg
from analysis.report.overview import Overview
from analysis.report.page import details, figure, paragraph, subsection
from analysis.report.tables import axis_table, to_html
from analysis.report.terminal import block_line
from analysis.study.answer import Answer
from analysis.study.axes import AxisComparison
from analysis.study.comparison import Comparison
from analysis.study.wording import block_words, equal_settings

MOST_AXES_DRAWN, MOST_PAIRS_SHOWN, MOST_PAIRS_LISTED = 3, 20, 200


def by_axis(answer: Answer, overview: Overview) -> str:
    """Compare the values of each axis; nothing where arms say as much."""
    drawn = [compared for compared in answer.by_axis if compared.levels]
    return "".join(
        subsection(
            f"{compared.axis.name}: {_lowered(equal_settings(compared.axis))}",
            *_of_axis(answer, overview, compared, draw=n < MOST_AXES_DRAWN),
        )
        for n, compared in enumerate(drawn)
    )


def _of_axis(answer: Answer, overview: Overview, compared: AxisComparison, *, draw: bool) -> list[str]:
    axis, pairs = compared.axis, compared.pairs
    if not compared.comparable:
        reasons = ", ".join(dict.fromkeys(pair.reason for pair in pairs))
        return [paragraph(f"No two values of {axis.name} can be compared: {reasons}.")]
    content = _pictures(answer, overview, compared) if draw else []
    shown = [pair for pair in compared.of_the_best if pair.seeds][:MOST_PAIRS_SHOWN] or pairs[:MOST_PAIRS_SHOWN]
    others = [pair for pair in pairs if pair not in shown]
    content.append(_table(answer, shown))
    content.append(paragraph(block_line(answer, compared), "soft"))
    if others:
        first = f", the first {MOST_PAIRS_LISTED} of them" if len(others) > MOST_PAIRS_LISTED else ""
        hidden = _table(answer, others[:MOST_PAIRS_LISTED])
        content.append(details(f"More pairs of values of {axis.name}: {len(others):,}{first}", hidden))
    return content


def _table(answer: Answer, pairs: Sequence[Comparison]) -> str:
    """Return the table of pairs, without columns that say nothing of any of them."""
    table = axis_table(answer, pairs)
    return to_html(table.loc[:, (table != "–").any()], text_columns=["verdict", "because"])


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _pictures(answer: Answer, overview: Overview, compared: AxisComparison) -> list[str]:
    axis, content = compared.axis, []
    if axis.connected and not compared.apart and len(compared.levels) <= MOST_VALUES:
        cells = axis.cells.set_index(["arm", "seed"])[["value", "block"]]
        placed = overview.runs.join(cells, on=["arm", "seed"])
        column = axis.name if len(axis.keys) == 1 else "value"
        drawn = axis_figure(placed, column, answer.metric, blocks="block", label=axis.name)
        caption = (
            "Every run as a small mark and the mean as a large one, with the level of its block taken out: runs of one "
            f"block have the same {block_words(axis)}. Blocks with one value only are left out; whether two values are "
            "separated is said below."
        )
        content.append(figure(to_svg(drawn, f"{answer.metric} by {axis.name}, within blocks"), caption))
    differences = difference_figure(answer, compared)
    if differences is not None:
        caption = (
            "Each value minus the best one: the difference over the blocks that both have (large mark), its 95 % "
            "interval, and each block as a dot. Filled marks are separated after Holm's correction, hollow ones not."
        )
        if (known := len(drawable(compared))) > MOST_LINES:
            caption += f" Of {known} differences the first {MOST_LINES} are drawn."
        content.append(figure(to_svg(differences, f"Differences between values of {axis.name}"), caption))
    return content
