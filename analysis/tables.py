"""Tables as text for a terminal, as CSV and as HTML."""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import page
from analysis.answer import Answer, secondary_metrics
from analysis.comparison import Comparison
from analysis.metrics import describe, format_differences, format_value
from qlora_lab.runs.files import write_atomic

WIDTH = 100
GAP = "  "
SHORTEST_FIRST_COLUMN = 24


def arm_table(answer: Answer) -> pd.DataFrame:
    """Return the answer's table as people read it: text cells, one row an arm, short headings."""
    metric = describe(answer.metric)
    shown = pd.DataFrame({"arm": answer.table["arm"]})
    for heading, part in ((answer.metric, "mean"), ("std", "std")):
        shown[heading] = [format_value(metric, value) for value in answer.table[f"{answer.metric} {part}"]]
    shown["seeds"] = [
        str(n) if n == planned else f"{n} of {planned}"
        for n, planned in zip(answer.table["n"], answer.table["planned"], strict=True)
    ]
    for name in secondary_metrics(answer.table, answer.metric):
        other = describe(name)
        shown[name if name == "eval/loss" else other.short] = [
            format_value(other, value) for value in answer.table[name]
        ]
    return shown


def comparison_table(answer: Answer) -> pd.DataFrame:
    """Return one row a pair of arms: the difference, its interval, each seed's, and the verdict."""
    metric = describe(answer.metric)
    any_p = any(_shows_p(pair) for pair in answer.comparisons)
    rows = []
    for pair in answer.comparisons:
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
        row["verdict"] = "separated" if pair.separated else f"not separated: {pair.verdict.value}"
        rows.append(row)
    return pd.DataFrame(rows)


def _shows_p(pair: Comparison) -> bool:
    """Say whether a p-value is shown: with two seeds it would look more exact than it is."""
    return pair.difference is not None and pair.difference.n_seeds > 2


def _signed(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else f"+{text}"


def to_text(table: pd.DataFrame, width: int = WIDTH) -> str:
    """Align a table for a terminal: the first column to the left, the others to the right.

    Where the lines would be wider than `width`, the first column is shortened in its middle, and then the last
    columns are left out; a line below says which.
    """
    columns = list(table.columns)
    widths = {name: max([len(name), *(len(cell) for cell in table[name])]) for name in columns}
    first, others = columns[0], columns[1:]

    def total(names: Sequence[str], first_width: int) -> int:
        return first_width + sum(len(GAP) + widths[name] for name in names)

    shown = list(others)
    while shown and total(shown, min(widths[first], SHORTEST_FIRST_COLUMN)) > width:
        shown.pop()
    first_width = min(widths[first], width - total(shown, 0))
    lines = []
    for row in [{name: name for name in columns}, *_cells(table)]:
        numbers = [row[name].rjust(widths[name]) for name in shown]
        lines.append(GAP.join([_shortened(row[first], first_width).ljust(first_width), *numbers]))
    left_out = [name for name in others if name not in shown]
    if left_out:
        lines.append(f"(not shown: {', '.join(left_out)})")
    return "\n".join(line.rstrip() for line in lines)


def _cells(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def to_html(table: pd.DataFrame, *, text_columns: Sequence[str] = ()) -> str:
    """Return an HTML table; the first column and `text_columns` are set to the left, numbers to the right."""
    columns = [str(name) for name in table.columns]
    rows = [[html.escape(row[name]) for name in columns] for row in _cells(table)]
    return page.table(columns, rows, left={columns[0], *text_columns})


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write the unrounded numbers; what is missing stays empty."""
    write_atomic(path, table.to_csv(index=False))
