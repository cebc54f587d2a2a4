"""Rows of many runs as one Arrow table that forgets nothing about them: part of it gives the frame of that part alone.

A data frame takes the columns and types that all of its rows together need. So that runs can be kept, and any of them
be asked for later, a table also knows which columns the rows of each run have.
"""

import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from qlora_lab.config.schema import RunConfig

ENTRY = "_entry"  # which run a row is of: its number in `entries`
AS_JSON = {b"as": b"json"}  # of a column whose values have several types: each is text
TYPES: dict[type, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
LARGEST_INT = 2**53  # beyond, 64-bit floats (and other readers of JSON) are not exact


@dataclass(frozen=True)
class Entry:
    """A run of a table.

    Attributes:
        key: where it was read.
        run_id: as its records say.
        columns: that its rows have, also where nothing is in them.
        damaged: lines that could not be read.
        stamp: what changes whenever its source does.
    """

    key: str
    run_id: str
    columns: tuple[str, ...] = ()
    damaged: int = 0
    stamp: str = ""


@dataclass(frozen=True)
class RowTable:
    """Rows, each of one of `entries`; an entry may have none."""

    entries: tuple[Entry, ...]
    table: pa.Table

    @classmethod
    def of(cls, read: Sequence[tuple[Entry, Sequence[dict[str, Any]]]]) -> "RowTable":
        """Put rows together, in the order in which they come; None and NaN are missing alike."""
        entries = tuple(entry for entry, _ in read)
        numbers = np.repeat(np.arange(len(read), dtype=np.int32), [len(rows) for _, rows in read])
        every = [row for _, rows in read for row in rows]
        columns = dict.fromkeys(name for shape in dict.fromkeys(e.columns for e in entries) for name in shape)
        found = {name: _column(name, [row.get(name) for row in every]) for name in columns}
        schema = pa.schema([pa.field(ENTRY, pa.int32()), *(field for field, _ in found.values())])
        arrays = [pa.array(numbers), *(values for _, values in found.values())]
        return cls(entries, pa.Table.from_arrays(arrays, schema=schema))

    @classmethod
    def joined(cls, tables: Sequence["RowTable"]) -> "RowTable":
        """Return the rows of all tables, which have no entry in common."""
        tables = [table for table in tables if table.entries] or list(tables[:1])
        if len(tables) == 1:
            return tables[0]
        starts = np.cumsum([0, *(len(table.entries) for table in tables)])
        names = dict.fromkeys(name for table in tables for name in table.table.column_names if name != ENTRY)
        kinds = {name: _common(name, tables) for name in names}
        schema = pa.schema([pa.field(ENTRY, pa.int32()), *kinds.values()])
        parts = []
        for start, table in zip(starts[:-1], tables, strict=True):
            numbers = pa.array(table.table[ENTRY].to_numpy() + np.int32(start), pa.int32())
            arrays = [numbers, *(_as(field, table.table) for field in kinds.values())]
            parts.append(pa.Table.from_arrays(arrays, schema=schema))
        return cls(tuple(entry for table in tables for entry in table.entries), pa.concat_tables(parts))

    def select(self, keys: Sequence[str]) -> "RowTable":
        """Return the entries of some keys in their order, with their rows."""
        if [entry.key for entry in self.entries] == list(keys):
            return self
        number_of = {entry.key: number for number, entry in enumerate(self.entries)}
        rank = np.full(len(self.entries) + 1, -1, dtype=np.int32)
        rank[[number_of[key] for key in keys]] = np.arange(len(keys))
        ranks = rank[self.table[ENTRY].to_numpy()]
        chosen = np.flatnonzero(ranks >= 0)
        chosen = chosen[np.argsort(ranks[chosen], kind="stable")]
        taken = self.table.take(pa.array(chosen))
        taken = taken.set_column(0, pa.field(ENTRY, pa.int32()), pa.array(ranks[chosen]))
        return RowTable(tuple(self.entries[number_of[key]] for key in keys), taken)

    def stamped(self, stamps: Mapping[str, str]) -> "RowTable":
        """Return the same with the stamps of its entries, by key."""
        return replace(self, entries=tuple(replace(entry, stamp=stamps[entry.key]) for entry in self.entries))

    def frame(self) -> pd.DataFrame:
        """Return the frame that these rows alone make."""
        names = dict.fromkeys(name for shape in dict.fromkeys(e.columns for e in self.entries) for name in shape)
        as_json = [name for name in names if self.table.schema.field(name).metadata]
        frame = self.table.select(list(names)).to_pandas()
        for name in as_json:
            texts = self.table[name].to_pylist()
            values = {text: None if text is None else json.loads(text) for text in set(texts)}
            frame[name] = [values[text] for text in texts]
        for name in names:  # a column may be of a type that other rows gave it
            if self.table[name].null_count == len(self.table):
                frame[name] = math.nan if is_float(name) else pd.Series([None] * len(frame), dtype=object)
        return frame


def is_float(name: str) -> bool:
    """Say whether a column holds floats, whatever its values look like: W&B's server gives 16.0 back as 16.

    They are metrics, seconds, shares, and the settings that are floats in a configuration.
    """
    return "/" in name or name.endswith(("_s", "_share")) or name in _float_settings()


@functools.cache
def _float_settings() -> frozenset[str]:
    """Return the columns of settings that are floats."""
    return frozenset(_floats_of(RunConfig, "config."))


def _floats_of(schema: Any, prefix: str) -> Iterator[str]:
    for name, kind in typing.get_type_hints(schema).items():
        for one in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
            if one is float:
                yield f"{prefix}{name}"
            elif is_dataclass(one):
                yield from _floats_of(one, f"{prefix}{name}.")


def _column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    kinds = set(map(type, values)) - {type(None)}
    if kinds <= {int, float} and (is_float(name) or kinds == {float}):
        return pa.field(name, pa.float64()), pa.array(values, pa.float64(), from_pandas=True)
    if not kinds:
        return pa.field(name, pa.null()), pa.nulls(len(values))
    (kind, *others) = kinds
    too_large = kind is int and any(value is not None and abs(value) > LARGEST_INT for value in values)
    if others or kind not in TYPES or too_large:
        return pa.field(name, pa.string(), metadata=AS_JSON), _json(values)
    return pa.field(name, TYPES[kind]), pa.array(values, TYPES[kind], from_pandas=True)


def _json(values: Sequence[Any]) -> pa.Array:
    texts = [None if value is None or value != value else json.dumps(value) for value in values]
    return pa.array(texts, pa.string())


def _common(name: str, tables: Sequence[RowTable]) -> pa.Field:
    """Return the field in which the values of all tables can be kept as they are."""
    schemas = [table.table.schema for table in tables]
    fields = [schema.field(name) for schema in schemas if name in schema.names]
    known = [field for field in fields if field.type != pa.null()] or fields
    same = all(field.equals(known[0], check_metadata=True) for field in known)
    return known[0] if same else pa.field(name, pa.string(), metadata=AS_JSON)


def _as(field: pa.Field, table: pa.Table) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.nulls(len(table), field.type)
    column = table[field.name]
    if table.schema.field(field.name).equals(field, check_metadata=True):
        return column
    return _json(column.to_pylist()) if field.metadata and column.type != pa.null() else column.cast(field.type)
