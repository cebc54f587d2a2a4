"""What the original study printed, beside our arms: the tables of sweeps/paper/, joined as a study file says.

study:
  paper:
    file: mmlu_5shot_test.csv
    value: accuracy_percent
    match: {data: data}          # our axis: the paper's column
    names: {oasst1_slice: oasst1}  # what the paper calls a value of ours, where it calls it otherwise
    where: {table: 5}            # other rows are left out; null takes back what an included file asks
    beside: model                # each of its values is a column beside our arms
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qlora_lab.errors import ConfigError, DataError, unknown_name

SOURCES = {"table": "Table", "figure": "Figure", "section": "section", "place": "the"}
COLUMNS = ("arm", "beside", "value", "at_most", "source", "certainty")
AT_LEAST, AT_MOST = "_at_least", "_at_most"  # endings of two columns: the range in which a point of a plot lies
CERTAINTY = {
    "two": "two public transcriptions agree",
    "one": "one transcription",
    "remembered": "quoted from memory",
}


def published(file: str, value: str = "value") -> pd.DataFrame:
    """Read a table of sweeps/paper/, the user's own folder of that name first.

    Returns:
        Its rows with `value` (a number), `source` ("Table 5") and `certainty` (how many transcriptions agree), and its
        other columns as text. Where `value` is the lower end of a range, `at_most` is the upper one.

    Raises:
        ConfigError: there is no such file, or it has no such column.
        DataError: the column holds something else than numbers.
    """
    from qlora_lab.config.command import shipped  # Hydra, which takes longer to import than all the rest

    folders = [Path.cwd() / "sweeps" / "paper", shipped("sweeps") / "paper"]
    path = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if path is None:
        known = sorted(found.name for folder in folders for found in folder.glob("*.csv"))
        raise ConfigError(unknown_name("study.paper.file", file, known))
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if value not in table:
        raise ConfigError(unknown_name("study.paper.value", value, list(table.columns)))
    place = next((name for name in SOURCES if name in table), None)
    sources = table["source"] if "source" in table else SOURCES[place] + " " + table[place] if place else ""
    certainty = table["certainty"] if "certainty" in table else table.get("sure", "")
    if is_range(value):
        table = table.assign(at_most=_numbers(table, f"{value.removesuffix(AT_LEAST)}{AT_MOST}", path))
    return table.assign(value=_numbers(table, value, path), source=sources, certainty=certainty)


def is_range(value: str) -> bool:
    """Whether a column of numbers has the lower ends of ranges."""
    return value.endswith(AT_LEAST)


def _numbers(table: pd.DataFrame, column: str, path: Path) -> "pd.Series[float]":
    numbers = pd.to_numeric(table[column], errors="coerce")
    if numbers.isna().any():
        line = int(numbers.isna().to_numpy().argmax()) + 2
        raise DataError(f"{path}, line {line}: {column} must be a number; got '{table[column].iloc[line - 2]}'")
    return numbers


def beside_arms(paper: Mapping[str, Any], arms: pd.DataFrame) -> pd.DataFrame:
    """Join published numbers with arms, by the axes that a study names.

    Args:
        paper: `study.paper` of a plan.
        arms: one row an arm, with `arm` and its place on each axis.

    Returns:
        One row a printed number: COLUMNS, where `beside` says what else tells it from others of the arm (a model).

    Raises:
        ConfigError: it names no file, column or axis there is, or several printed numbers have one place.
    """
    table = published(paper["file"], paper.get("value") or "value")
    if "at_most" not in table:
        table = table.assign(at_most=table["value"])
    beside = paper.get("beside")
    where = {column: str(wanted) for column, wanted in paper.get("where", {}).items() if wanted is not None}
    columns = [*paper["match"].values(), *where, *([beside] if beside else [])]
    for column in columns:
        if column not in table:
            raise ConfigError(unknown_name("a column of study.paper", column, list(table.columns)))
    for axis in paper["match"]:
        if axis not in arms:
            raise ConfigError(unknown_name("an axis of study.paper.match", axis, list(arms.columns[1:])))
    for column, wanted in where.items():
        table = table[table[column] == wanted]
    names = paper.get("names", {})
    rows = []
    for place in arms.to_dict("records"):
        found = table
        for axis, column in paper["match"].items():
            found = found[found[column] == str(names.get(str(place[axis]), place[axis]))]
        labels = found[beside] if beside else pd.Series("", index=found.index)
        if labels.duplicated().any():
            raise ConfigError(
                f"{paper['file']} has several numbers for {place['arm']}"
                f"{f' and {labels[labels.duplicated()].iloc[0]}' if beside else ''}; tell them apart with "
                "study.paper.where or study.paper.beside"
            )
        rows += [
            (place["arm"], label, *of_row)
            for label, *of_row in zip(labels, *(found[column] for column in COLUMNS[2:]), strict=True)
        ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def published_note(numbers: pd.DataFrame, paper: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Say what the columns of published numbers are, and what they are not."""
    if numbers.empty:
        return f"None of the arms has a number in {paper['file']} of the original study."
    sources = ", ".join(dict.fromkeys(numbers["source"]))
    sure = ", ".join(CERTAINTY.get(each, each) for each in dict.fromkeys(numbers["certainty"]) if each)
    missing = len(set(arms) - set(numbers["arm"]))
    lacking = f" It has none for {missing} of the {len(arms)} arms." if missing else ""
    what = paper.get("value") or "value"
    told = f"{what} as the original study printed it"
    if is_range(what):
        told = (
            f"{what.removesuffix(AT_LEAST)} as far as it can be read off a plot of the original study, two numbers "
            "where only a range is known"
        )
    return (
        f"Columns that begin with 'paper' are {told} ({sources}{f'; {sure}' if sure else ''}): of that study's models "
        f"and settings. Where ours are others, the order may be compared, the size may not.{lacking}"
    )
