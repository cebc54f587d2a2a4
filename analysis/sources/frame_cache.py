"""Data frames that are kept in Parquet files, and of which only what has changed is read again."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qlora_lab.runs.files import write_atomic
from qlora_lab.wheels import default_cache_dir

KEY, STAMP = "_key", "_stamp"
FORMAT = 2  # raised when what is kept changes its meaning, or rows are made otherwise
METADATA = b"qlora_lab"
NUMBERS = "biuf"  # kinds of columns that Parquet keeps as they are

Read = Callable[[list[str]], pd.DataFrame]


@dataclass(frozen=True)
class Entry:
    """A part of a frame: what it is called, and what changes whenever its source does."""

    key: str
    stamp: str


def stamp_of(files: Sequence[Path]) -> str:
    """Return a text that changes with the files: their sizes and times, or that one is missing."""
    parts = []
    for file in files:
        try:
            found = file.stat()
            parts.append(f"{found.st_size}.{found.st_mtime_ns}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


class FrameCache:
    """Rows of many entries in one Parquet file.

    Args:
        name: what the frame is of; each name has a file of its own.
        folder: where the file lies; None: in the project's cache.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        folder = folder if folder is not None else default_cache_dir() / "analysis"
        self.file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.parquet"

    def frame(self, entries: Sequence[Entry], read: Read) -> pd.DataFrame:
        """Return the rows of all entries in their order, with KEY, reading those that are new or have changed.

        What cannot be kept (the disk is full) is read every time; that is said once, on stderr.

        Args:
            read: returns the rows of some keys, with a column KEY.
        """
        kept = self._load()
        stamps = {entry.key: entry.stamp for entry in entries}
        if kept is not None:
            kept = kept[[stamps.get(key) == stamp for key, stamp in zip(kept[KEY], kept[STAMP], strict=True)]]
        fresh = set() if kept is None else set(kept[KEY])
        stale = [entry.key for entry in entries if entry.key not in fresh]
        if stale or kept is None:
            new = read(stale)
            new = new.assign(**{STAMP: [stamps[key] for key in new[KEY]]})
            kept = new if kept is None or kept.empty else _joined(kept, new)
            self._save(kept)
        rank = {entry.key: number for number, entry in enumerate(entries)}
        order = kept[KEY].map(rank).argsort(kind="stable")
        return kept.iloc[order].drop(columns=STAMP)

    def _load(self) -> pd.DataFrame | None:
        try:
            table = pq.read_table(self.file)
            about = json.loads((table.schema.metadata or {})[METADATA])
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return None  # there is none, or it is damaged: everything is read again
        if about["format"] != FORMAT:
            return None
        frame = table.to_pandas()
        for column in about["json"]:
            values = {text: json.loads(text) for text in frame[column].unique()}
            frame[column] = [values[text] for text in frame[column]]
        return frame

    def _save(self, frame: pd.DataFrame) -> None:
        as_json = [name for name in frame.columns if frame[name].dtype.kind not in NUMBERS and name not in (KEY, STAMP)]
        columns: dict[str, Any] = {name: frame[name] for name in frame.columns}
        for name in as_json:
            columns[name] = [json.dumps(value) for value in frame[name]]
        table = pa.Table.from_pandas(pd.DataFrame(columns, index=frame.index), preserve_index=False)
        about = json.dumps({"format": FORMAT, "json": as_json}).encode()
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({METADATA: about}), sink, compression="zstd")
        try:
            write_atomic(self.file, sink.getvalue().to_pybytes())
        except OSError as error:
            print(f"what was read is not kept for the next time ({error})", file=sys.stderr)


def _joined(kept: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of both; a column that one of them lacks is missing there."""
    if new.empty:
        return kept
    names = dict.fromkeys([*kept.columns, *new.columns])
    # as lists, so that every column gets the type that it would have if all rows had been read at once
    return pd.DataFrame({name: [*_values(kept, name), *_values(new, name)] for name in names})


def _values(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame:
        return [math.nan] * len(frame)
    column = frame[name]
    return column.tolist() if column.dtype.kind in NUMBERS or column.notna().any() else [None] * len(frame)
