"""Axes that advance together: study.zip pairs the values of axes, study.combinations lists them."""

import itertools
from dataclasses import replace
from typing import Any

from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import Axes, axis_override, point_values, texts
from qlora_lab.sweep.dotted import Point

Rows = list[tuple[str, ...]]


def combination_axes(combinations: list[dict[str, Any]], params: dict[str, Any]) -> list[str]:
    """Return the axes that study.combinations stand for, as overrides in Hydra's sweep syntax.

    Args:
        combinations: of study.combinations.
        params: the study's axes that are multiplied.

    Raises:
        ConfigError: a combination that sets other keys than the first, or a key that is an axis already.
    """
    if not combinations:
        return []
    keys = list(combinations[0])
    for number, combination in enumerate(combinations):
        if set(combination) != set(keys) or not keys:
            raise ConfigError(
                f"each of study.combinations must set the same keys ({', '.join(keys) or 'none'}); "
                f"number {number + 1} sets {', '.join(combination) or 'none'}"
            )
    for key in keys:
        if key in params:
            raise ConfigError(f"{key} is set in study.combinations and in hydra.sweeper.params; remove one of the two")
    listed = {key: dict.fromkeys(v for row in combinations for v in texts(row[key])) for key in keys}
    return [axis_override(key, ",".join(values)) for key, values in listed.items()]


def join(axes: Axes, zips: list[list[str]], combinations: list[dict[str, Any]]) -> Axes:
    """Let axes advance together.

    Where the command line narrows one of them, the rows with its values stay; where it gives all of a zip, they are
    paired anew.

    Args:
        axes: with the axes of `combination_axes` among them.
        zips: study.zip, lists of axes of the same length.
        combinations: study.combinations; a list of values in one stands for each of them.

    Raises:
        ConfigError: axes that cannot be paired, or a combination that is listed twice.
    """
    together: dict[tuple[str, ...], Rows] = {}
    for names in zips:
        keys = _distinct(names, axes, [key for group in together for key in group])
        together[keys] = _zipped(keys, axes)
    if combinations:
        keys = tuple(combinations[0])
        taken = [key for group in together for key in group if key in keys]
        if taken:
            raise ConfigError(f"{taken[0]} is set in study.combinations and in study.zip; remove one of the two")
        together[keys] = _rows_left(keys, _listed(keys, combinations), axes, "study.combinations")
    values = {
        key: next((_column(key, group, rows) for group, rows in together.items() if key in group), own)
        for key, own in axes.values.items()
    }
    return replace(axes, values=values, together=together)


def disagrees(point: Point, axes: Axes) -> bool:
    """Say whether a point of the whole product is none of the axes that advance together."""
    return any(
        tuple(point[key] for key in keys) not in rows
        for keys, rows in axes.together.items()
        if all(key in point for key in keys)
    )


def _distinct(names: list[str], axes: Axes, taken: list[str]) -> tuple[str, ...]:
    for name in names:
        if name not in axes.values:
            raise ConfigError(f"study.zip names '{name}', which is no axis; the axes are {', '.join(axes.values)}")
        if name in taken or names.count(name) > 1:
            raise ConfigError(f"study.zip names '{name}' twice; an axis advances with one group of others")
    if len(names) < 2:
        raise ConfigError(f"each list of study.zip must name two axes or more; got [{', '.join(names)}]")
    return tuple(names)


def _zipped(keys: tuple[str, ...], axes: Axes) -> Rows:
    changed = [key for key in keys if axes.values[key] != axes.narrowed.get(key)]
    source = axes.values if len(changed) in (0, len(keys)) else axes.narrowed
    columns = [source.get(key, axes.values[key]) for key in keys]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{key} has {len(column)}" for key, column in zip(keys, columns, strict=True))
        raise ConfigError(f"study.zip pairs {' and '.join(keys)}, which needs as many values of each; {counts}")
    return _rows_left(keys, list(zip(*columns, strict=True)), axes, "study.zip")


def _listed(keys: tuple[str, ...], combinations: list[dict[str, Any]]) -> Rows:
    rows = [row for each in combinations for row in itertools.product(*(point_values(each[key]) for key in keys))]
    for row in rows:
        if rows.count(row) > 1:
            point = " ".join(f"{key}={value}" for key, value in zip(keys, row, strict=True))
            raise ConfigError(f"study.combinations lists {point} twice; remove one of them")
    return rows


def _rows_left(keys: tuple[str, ...], rows: Rows, axes: Axes, where: str) -> Rows:
    """Return the rows whose values the command line has not taken away."""
    for at, key in enumerate(keys):
        own = dict.fromkeys(row[at] for row in rows)
        for value in axes.values[key]:
            if value not in own:
                raise ConfigError(
                    f"{where} sets {' and '.join(keys)} together, and {key} there is one of {', '.join(own)}; "
                    f"got '{value}'; give all of them, or add it to the study"
                )
    left = [row for row in rows if all(value in axes.values[key] for key, value in zip(keys, row, strict=True))]
    if not left:
        raise ConfigError(f"{where} has no combination of the values given for {' and '.join(keys)}")
    return left


def _column(key: str, group: tuple[str, ...], rows: Rows) -> list[str]:
    return list(dict.fromkeys(row[group.index(key)] for row in rows))
