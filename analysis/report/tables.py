"""Tables as text for a terminal, as Markdown, LaTeX, CSV and HTML: all of one frame of text cells."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd

from analysis.report import page
from analysis.statistics.effects import effect_size, seeds_needed
from analysis.study.answer import Answer, secondary_metrics
from analysis.study.audit import what_is_missing
from analysis.study.comparison import Comparison
from analysis.study.metrics import describe, format_differences, format_value
from analysis.study.wording import count_of
from qlora_lab.runs.files import write_atomic

WIDTH = 100
GAP = "  "
CONTINUED = "  "
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
}


def arm_table(answer: Answer) -> pd.DataFrame:
    """Return the answer's table as people read it: text cells, one row an arm, short headings."""
    metric = describe(answer.metric)
    shown = pd.DataFrame({"arm": answer.table["arm"]})
    mean, low, high = (
        [format_value(metric, value) for value in answer.table[f"{answer.metric} {part}"]]
        for part in ("mean", "low", "high")
    )
    shown[answer.metric] = mean
    shown["95 % interval"] = ["–" if a == "–" else f"{a} to {b}" for a, b in zip(low, high, strict=True)]
    shown["seeds"] = [
        str(n) if n == planned else f"{n} of {planned}"
        for n, planned in zip(answer.table["n"], answer.table["planned"], strict=True)
    ]
    if len(answer.not_counted):
        shown["not counted"] = [missing or "–" for missing in answer.table["not counted"]]
    for label, printed in answer.published.groupby("beside", sort=False):
        by_arm = printed.set_index("arm")
        shown[f"paper: {label!s}" if label else "paper"] = [
            _printed(by_arm.loc[a]) if a in by_arm.index else "–" for a in shown["arm"]
        ]
    for name in secondary_metrics(answer.table, answer.metric):
        other = describe(name)
        shown[name if name == "eval/loss" else other.short] = [
            format_value(other, value) for value in answer.table[name]
        ]
    return shown


def _printed(number: "pd.Series[Any]") -> str:
    value, at_most = float(number["value"]), float(number["at_most"])
    return f"{value:g}" if at_most == value else f"{value:g} to {at_most:g}"


def comparison_table(answer: Answer, pairs: Sequence[Comparison]) -> pd.DataFrame:
    """Return one row a pair of arms: the difference, its interval, each seed's, and the verdict."""
    metric = describe(answer.metric)
    any_p = any(_shows_p(pair) for pair in pairs)
    rows = []
    for pair in pairs:
        estimate = pair.difference
        row = {"arms": f"{pair.first} − {pair.second}", "difference": "–", "95 % interval": "–", "each seed": "–"}
        if estimate is not None:
            numbers = [estimate.value, estimate.low, estimate.high, *estimate.per_seed]
            value, low, high, *seeds = (_signed(t) for t in format_differences(metric, numbers, estimate.half_width))
            row |= {"difference": value, "each seed": ", ".join(seeds)}
            row["95 % interval"] = "–" if "nan" in low else f"{low} to {high}"
        row["rows"] = f"{estimate.n_rows:,}" if estimate is not None and estimate.n_rows else "–"
        if any_p:
            row["p (Holm)"] = f"{pair.adjusted_p:.2g}" if _shows_p(pair) else "–"
        row["verdict"] = "separated" if pair.separated else f"not separated: {pair.reason}"
        rows.append(row)
    return pd.DataFrame(rows)


def axis_table(answer: Answer, pairs: Sequence[Comparison]) -> pd.DataFrame:
    """Return one row a pair of an axis's values: the difference over their shared blocks, its size, and the verdict."""
    metric = describe(answer.metric)
    rows = []
    for pair in pairs:
        shared, either = len(pair.seeds), len({block for of_value in pair.finished for block in of_value})
        row = {"values": f"{pair.first} − {pair.second}", "verdict": "not comparable"}
        row |= dict.fromkeys(("difference", "95 % interval", "same sign"), "–")
        row |= {"blocks": f"{shared} of {either}"} | dict.fromkeys(("effect size", "p (Holm)", "needed"), "–")
        estimate = None if pair.refused else pair.difference
        if estimate is not None:
            numbers = [estimate.value, estimate.low, estimate.high]
            value, low, high = (_signed(text) for text in format_differences(metric, numbers, estimate.half_width))
            size = effect_size(estimate)
            agree = sum((effect > 0) == (estimate.value > 0) for effect in estimate.per_seed)
            row |= {"difference": value, "95 % interval": "–" if "nan" in low else f"{low} to {high}"}
            row |= {
                "same sign": f"{agree} of {shared}",
                "effect size": "–" if math.isnan(size) else _signed(f"{size:.2g}"),
            }
            row |= {"p (Holm)": "–" if math.isnan(pair.adjusted_p) else f"{pair.adjusted_p:.2g}"}
            row |= {"verdict": "separated" if pair.separated else "not separated", "needed": _needed(pair)}
        rows.append(row | {"because": "–" if pair.separated else pair.reason})
    return pd.DataFrame(rows)


def _needed(pair: Comparison) -> str:
    """Return how many blocks, or seeds, would tell a pair apart that is not; a dash where nothing says so."""
    if pair.separated or pair.difference is None:
        return "–"
    needed = seeds_needed(pair.difference, comparisons=pair.n_comparisons)
    return "–" if needed is None else count_of(max(needed, pair.difference.n_units + 1), pair.unit_needed)


def _shows_p(pair: Comparison) -> bool:
    """Say whether a p-value is shown: with two seeds it would look more exact than it is."""
    return pair.difference is not None and pair.difference.n_seeds > 2


def _signed(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def to_text(table: pd.DataFrame, width: int = WIDTH) -> str:
    """Align a table for a terminal: the first column to the left, the others to the right.

    Where the lines would be wider than `width`, the first column is wrapped between its words, and if that is not
    enough the last columns are left out; a line below says which.
    """
    cells = [{str(name): str(name) for name in table.columns}, *_cells(table)]
    first, *others = cells[0]
    widths = {name: max(len(row[name]) for row in cells) for name in cells[0]}
    longest_word = max(len(word) for row in cells for word in row[first].split(" ")) + len(CONTINUED)

    def left_for_first(shown: Sequence[str]) -> int:
        return width - sum(len(GAP) + widths[name] for name in shown)

    shown = list(others)
    while shown and left_for_first(shown) < min(widths[first], longest_word):
        shown.pop()
    first_width = min(widths[first], left_for_first(shown))
    lines = []
    for row in cells:
        label, *more = wrap(row[first], first_width, subsequent_indent=CONTINUED, break_on_hyphens=False) or [""]
        lines += [GAP.join([label.ljust(first_width), *(row[name].rjust(widths[name]) for name in shown)]), *more]
    if len(shown) < len(others):
        lines.append(f"(not shown: {', '.join(others[len(shown) :])})")
    return "\n".join(line.rstrip() for line in lines)


def _cells(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def to_html(table: pd.DataFrame, *, text_columns: Sequence[str] = ()) -> str:
    """Return an HTML table; the first column and `text_columns` are set to the left, numbers to the right."""
    columns = [str(name) for name in table.columns]
    rows = [[html.escape(row[name]) for name in columns] for row in _cells(table)]
    return page.table(columns, rows, left={columns[0], *text_columns})


def to_markdown(table: pd.DataFrame) -> str:
    """Return a table in GitHub's Markdown: the first column to the left, the others to the right."""
    first, *others = (str(name) for name in table.columns)
    lines = [[first, *others], [":--", *("--:" for _ in others)], *(list(row.values()) for row in _cells(table))]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def to_latex(table: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """Return a table for LaTeX, which needs `\\usepackage{booktabs}`; all text is escaped."""
    columns = [str(name) for name in table.columns]
    rows = [" & ".join(map(latex_escaped, row)) + r" \\" for row in [columns, *(r.values() for r in _cells(table))]]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{latex_escaped(caption)}}}"] if caption else []),
            *([rf"\label{{{label}}}"] if label else []),
            rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex_escaped(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def write_tables(answer: Answer, title: str | None, folder: Path) -> Path:
    """Write the table of arms: table.csv (unrounded), table.md and table.tex, with what is not in its means.

    Returns:
        The path of table.csv.
    """
    shown = arm_table(answer)
    said = [answer.sentence, *answer.findings, *_missing(answer), *answer.notes]
    heading = f"# {title}\n\n" if title else ""
    write_atomic(folder / "table.md", f"{heading}{to_markdown(shown)}\n" + "".join(f"- {line}\n" for line in said))
    comments = "".join(f"% {' '.join(line.split())}\n" for line in said)
    write_atomic(
        folder / "table.tex", comments + to_latex(shown, " ".join([*([title] if title else []), answer.sentence]))
    )
    path = folder / "table.csv"
    write_csv(_with_published(answer), path)
    if answer.by_axis:
        write_csv(axis_numbers(answer), folder / "axes.csv")
    return path


def axis_numbers(answer: Answer) -> pd.DataFrame:
    """Return every pair of every axis's values, unrounded: `low` and `high` are the 95 % interval of `difference`.

    `effect_size` is in standard deviations of what `effect_size_of` names, a block or a seed.
    """
    rows = []
    for compared in answer.by_axis:
        for pair in compared.pairs:
            estimate = None if pair.refused else pair.difference
            numbers = {
                "difference": estimate.value if estimate else math.nan,
                "low": estimate.low if estimate else math.nan,
                "high": estimate.high if estimate else math.nan,
                "effect_size": effect_size(estimate) if estimate else math.nan,
                "effect_size_of": pair.unit_needed,
            }
            blocks = {
                "blocks": len(pair.seeds),
                "left_out": len({b for own in pair.finished for b in own}) - len(pair.seeds),
            }
            verdict = {"p_holm": pair.adjusted_p, "verdict": "separated" if pair.separated else pair.reason}
            rows.append(
                {"axis": compared.axis.name, "first": pair.first, "second": pair.second, **numbers, **blocks, **verdict}
            )
    return pd.DataFrame(rows)


def _missing(answer: Answer) -> list[str]:
    if answer.not_counted.empty:
        return []
    what = what_is_missing(answer.not_counted["state"].tolist())
    return [f"{len(answer.not_counted)} of {len(answer.runs)} runs are in no mean: {what}."]


def _with_published(answer: Answer) -> pd.DataFrame:
    """Return the unrounded table, with the printed numbers, their source and how sure they are."""
    table = answer.table
    for label, printed in answer.published.groupby("beside", sort=False):
        name = f"paper {label}".rstrip()
        by_arm = printed.set_index("arm")
        is_range = (by_arm["at_most"] > by_arm["value"]).any()
        parts = {f"{name} at least": "value", f"{name} at most": "at_most"} if is_range else {name: "value"}
        parts |= {f"{name} source": "source", f"{name} certainty": "certainty"}
        for column, part in parts.items():
            table = table.assign(**{column: table["arm"].map(by_arm[part])})
    return table


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the unrounded numbers; what is missing stays empty."""
    write_atomic(path, table.to_csv(index=False))
