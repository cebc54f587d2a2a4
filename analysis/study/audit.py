"""What is odd about a set of runs, in sentences: each says which runs, how many, and by which rule they are treated.

What did not finish or cannot be read is not repeated here: those runs are listed beside every table.
"""

import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass

import pandas as pd

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, unknown_name
from qlora_lab.sweep.listing import listed

FEW = 5  # named one by one
STUDY = "config.study.name"
NO_METRIC = ("config.", "environment.", "data.")  # columns that begin so


def audit(runs: pd.DataFrame, metric: str, *, planned: bool = True) -> list[str]:
    """Return one sentence for each thing that a reader must know about the runs before their numbers.

    Args:
        runs: as `load_runs` gives them.
        metric: that the study is decided by.
        planned: the runs are those of a plan; otherwise they are whatever lies in a folder or a W&B project.
    """
    return [
        *_copies(runs),
        *_older(runs),
        *_two_names(runs, metric),
        *([] if planned else _studies(runs)),
    ]


def _copies(runs: pd.DataFrame) -> Iterator[str]:
    if "also_in" not in runs:
        return
    copied = runs[runs["also_in"].notna()]
    if len(copied):
        where = [
            f"{run_id} from {folder}, not from {', '.join(json.loads(others))}"
            for run_id, folder, others in zip(copied["run_id"], copied["folder"], copied["also_in"], strict=True)
        ]
        yield (
            f"{_runs(len(copied))} in several places, and counted once, from the folder that is named by the id or "
            f"else from the place given first: {'; '.join(listed(where, FEW, 'more'))}."
        )


def _older(runs: pd.DataFrame) -> Iterator[str]:
    """Name runs that lack settings which every run of today has, and others here do have."""
    written = runs[runs["seed"].notna()]
    lacking: dict[str, list[str]] = {}
    for column in (f"config.{key}" for key in _settings_of_every_run()):
        if column in written and written[column].notna().any():
            for run_id in written.loc[written[column].isna(), "run_id"]:
                lacking.setdefault(run_id, []).append(column.removeprefix("config."))
    if lacking:
        keys = list(dict.fromkeys(key for missing in lacking.values() for key in missing))
        yield (
            f"{_runs(len(lacking))} of an older version, without settings that others have "
            f"({', '.join(listed(keys, FEW, 'more'))}): {', '.join(listed(list(lacking), FEW, 'more'))}. They are "
            "kept; what they lack stays missing, so they share no arm with runs that differ from them in nothing else."
        )


@functools.cache
def _settings_of_every_run() -> tuple[str, ...]:
    """Return the dotted keys of a configuration that have a value in every run."""
    return tuple(_required(RunConfig, ""))


def _required(schema: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _required(kind, f"{prefix}{field.name}.")
        elif not isinstance(kind, types.UnionType) and typing.get_origin(kind) is not dict:
            yield f"{prefix}{field.name}"


def _two_names(runs: pd.DataFrame, metric: str) -> Iterator[str]:
    alike: dict[str, list[str]] = {}
    for name in runs.columns:
        if pd.api.types.is_numeric_dtype(runs[name]) and not name.startswith(NO_METRIC):
            alike.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            there = {name: int(runs[name].count()) for name in names}
            names.sort(key=lambda name: (name != metric, -there[name]))
            counts = " and ".join(f"{name} ({there[name]} runs)" for name in names)
            yield (
                f"{counts} look like one metric under two names. They are kept apart: a run without {names[0]} is not "
                f"in its means. load_runs(..., aliases={{'{names[1]}': '{names[0]}'}}) takes them together."
            )


def _studies(runs: pd.DataFrame) -> Iterator[str]:
    if STUDY not in runs:
        return
    counts = runs[STUDY].value_counts()
    if len(counts) > 1:
        named = [f"{name} ({count})" for name, count in counts.items()]
        yield (
            f"Runs of {len(counts)} studies are together here: {', '.join(listed(named, FEW, 'more'))}. All are kept; "
            "arms are told apart by what differs in their configurations. `--study NAME` reports one of them alone."
        )


def of_study(runs: pd.DataFrame, study: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of one study, and a sentence about those that do not say of which study they are.

    Raises:
        ConfigError: none is of that study.
    """
    names = runs[STUDY] if STUDY in runs else pd.Series(pd.NA, index=runs.index, dtype=object)
    if study not in (known := sorted(names.dropna().unique())):
        raise ConfigError(unknown_name("--study", study, known) if known else "the runs are of no study; drop --study")
    unknown = runs.loc[names.isna(), "run_id"].tolist()
    told = (
        f"{_runs(len(unknown))} of no study that can be read, and left out: {', '.join(listed(unknown, FEW, 'more'))}."
    )
    return runs[names == study], [told] if unknown else []


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count} runs are"


def what_is_missing(states: Sequence[str]) -> str:
    """Return "1 failed, 2 missing" for the states of runs that are in no mean; an empty text for none."""
    counts = pd.Series(list(states), dtype=object).value_counts(sort=False)
    return ", ".join(
        f"{count} {'without a value' if state == 'finished' else str(state).replace('_', ' ')}"
        for state, count in counts.items()
    )
