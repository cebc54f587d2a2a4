"""Rows on disk, so that a set of any size takes a few bytes of memory a row."""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qlora_lab.data.rows import KEY_HEX_DIGITS, Row, Turn

Keys = np.ndarray  # (rows,) uint64


class RowFile(Sequence[Row]):
    """Rows in the order they were appended; each is read from disk when asked for.

    Args:
        path: of the file, which is made anew.

    Attributes:
        keys, source_keys: `Row.key` and `Row.source_key` of each row as numbers, known without reading the row.
        ends: where each row ends in the file, after a 0.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self.ends = array("q", [0])
        self._keys = array("Q")
        self._source_keys = array("Q")

    def append(self, row: Row) -> None:
        self.ends.append(self.ends[-1] + self._file.write(json.dumps(fields_of(row)).encode()))
        self._keys.append(int(row.key, 16))
        self._source_keys.append(int(row.source_key, 16))

    @property
    def keys(self) -> Keys:
        return np.array(self._keys, dtype=np.uint64)

    @property
    def source_keys(self) -> Keys:
        return np.array(self._source_keys, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._file.flush()
        return read_row(self._file.fileno(), self.ends, index)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        self._file.close()


def read_row(file: int, ends: Sequence[int] | np.ndarray, index: int) -> Row:
    """Read one row of a `RowFile` from its descriptor."""
    start = int(ends[index])
    return row_of(json.loads(os.pread(file, int(ends[index + 1]) - start, start)))


def fields_of(row: Row) -> list[Any]:
    """Return a row as plain values."""
    return [row.source, row.target, row.family, row.asked, row.language, row.history]


def row_of(fields: list[Any]) -> Row:
    """Return the row that `fields_of` gave these plain values for."""
    source, target, family, asked, language, history = fields
    return Row(source, target, family, asked, language, tuple(Turn(*turn) for turn in history))


def keys_of(rows: Sequence[Row]) -> tuple[Keys, Keys]:
    """Return `Row.key` and `Row.source_key` of each row as numbers."""
    if isinstance(rows, RowFile):
        return rows.keys, rows.source_keys
    keys = np.array([int(row.key, 16) for row in rows], dtype=np.uint64)
    return keys, np.array([int(row.source_key, 16) for row in rows], dtype=np.uint64)


def hex_key(key: int) -> str:
    """Return a key as `Row` writes it."""
    return f"{key:0{KEY_HEX_DIGITS}x}"
