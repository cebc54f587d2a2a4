"""What was read of runs, kept in Parquet files, so that only what has changed is read again."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.sources.row_table import AS_JSON, Entry, RowTable
from qlora_lab.runs.files import write_atomic
from qlora_lab.wheels import default_cache_dir

FORMAT = 4  # raised when what is kept changes its meaning, or rows are made otherwise
METADATA = b"qlora_lab"

Read = Callable[[list[str]], RowTable]


def stamp_of(files: list[str]) -> str:
    """Return a text that changes with the files: their sizes and times, or that one is missing."""
    parts = []
    for file in files:
        try:
            found = os.stat(file)  # noqa: PTH116  # of ten thousands of files, Path.stat takes twice as long
            parts.append(f"{found.st_size}.{found.st_mtime_ns}")
        except OSError:
            parts.append("-")
    return " ".join(parts)


class FrameCache:
    """Rows of many runs in one Parquet file.

    Args:
        name: what the rows are of; each name has a file of its own.
        folder: where the file lies; None: in the project's cache.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        folder = folder if folder is not None else default_cache_dir() / "analysis"
        self.file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.parquet"

    def rows(self, stamps: Mapping[str, str], read: Read, listed: Collection[str] = ()) -> RowTable:
        """Return the rows of runs in their order, reading those that are new or have changed.

        What cannot be kept (the disk is full) is read every time; that is said once, on stderr.

        Args:
            stamps: of the runs, by key.
            read: returns the rows of some keys.
            listed: folders of which these are all the runs there are. Others of theirs are gone, and kept no longer;
                runs elsewhere that nobody asks for now are kept for those who ask later.
        """
        kept = self._load()
        stale = list(stamps)
        if kept is not None:
            fresh = {entry.key for entry in kept.entries if stamps.get(entry.key) == entry.stamp}
            stale = [key for key in stamps if key not in fresh]
            others = [
                entry.key
                for entry in kept.entries
                if entry.key not in stamps and entry.key.rpartition("/")[0] not in listed
            ]
            kept = kept.select([entry.key for entry in kept.entries if entry.key in fresh] + others)
        if stale or kept is None:
            new = read(stale).stamped(stamps)
            kept = new if kept is None else RowTable.joined([kept, new])
            self._save(kept)
        return kept.select(list(stamps))

    def _load(self) -> RowTable | None:
        try:
            table = pq.read_table(self.file)
            about = json.loads((table.schema.metadata or {})[METADATA])
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return None  # there is none, or it is damaged: everything is read again
        if about["format"] != FORMAT:
            return None
        shapes = [tuple(shape) for shape in about["shapes"]]
        entries = [Entry(key, run_id, shapes[shape], *rest) for key, run_id, shape, *rest in about["entries"]]
        fields = [field.with_metadata(AS_JSON if field.name in about["json"] else None) for field in table.schema]
        return RowTable(tuple(entries), pa.Table.from_arrays(table.columns, schema=pa.schema(fields)))

    def _save(self, rows: RowTable) -> None:
        shapes = {shape: number for number, shape in enumerate(dict.fromkeys(entry.columns for entry in rows.entries))}
        about = {
            "format": FORMAT,
            "json": [field.name for field in rows.table.schema if field.metadata],
            "shapes": list(shapes),
            "entries": [
                [entry.key, entry.run_id, shapes[entry.columns], entry.damaged, entry.stamp] for entry in rows.entries
            ],
        }
        table = rows.table.replace_schema_metadata({METADATA: json.dumps(about).encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        try:
            write_atomic(self.file, sink.getvalue().to_pybytes())
        except OSError as error:
            print(f"what was read is not kept for the next time ({error})", file=sys.stderr)
