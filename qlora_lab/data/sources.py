"""A configured source becomes rows: found, read, put through its template, counted."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from qlora_lab.config.schema import RowsConfig, SourceConfig
from qlora_lab.data.hub import read_hub
from qlora_lab.data.readers import read_file, read_wheel_member
from qlora_lab.data.records import BrokenRowError, BrokenRows, Record
from qlora_lab.data.report import SetReport
from qlora_lab.data.row_file import RowFile
from qlora_lab.data.rows import Row
from qlora_lab.data.templates import find_template
from qlora_lab.errors import DataError
from qlora_lab.runs.fingerprint import check_fingerprint, locate_file
from qlora_lab.wheels import wheel_file

MAX_ROW_CHARACTERS = 1_000_000  # some 250,000 tokens, longer than any context here
LANGUAGE_COLUMNS = ("lang", "language")


def load_rows(source: SourceConfig, *, cache_dir: Path, data_dir: Path, counts: SetReport) -> list[Row]:
    """Return every row of a source in memory, as `read_rows` does."""
    rows: list[Row] = []
    read_rows(source, rows, cache_dir=cache_dir, data_dir=data_dir, counts=counts)
    return rows


def read_rows(
    source: SourceConfig, into: list[Row] | RowFile, *, cache_dir: Path, data_dir: Path, counts: SetReport
) -> None:
    """Read every row of a file, wheel member or hub set that has a target, in the source's order.

    Args:
        source: where the rows are; `kind` is not procedural.
        into: gets the rows.
        cache_dir: where fetched wheels lie.
        data_dir: where relative paths are looked up first.
        counts: receives what was read and dropped.

    Raises:
        ModelError: the wheel is not in the cache.
        DataError: the source is missing, holds broken rows (each named by its line), or gives no row.
        ConfigError: an unknown template.
    """
    template = find_template(source.template)
    origin = origin_of(source, data_dir)
    broken = BrokenRows(origin)
    before = len(into)
    records: Iterable[Record] = read_records(source, broken, cache_dir, data_dir, counts.revisions)
    for record in template.gather(records, broken) if template.gather is not None else records:
        counts.rows_read += 1
        try:
            made = [checked_length(row) for row in template.to_rows(record.columns)]
        except BrokenRowError as error:
            broken.add(record.place, str(error))
            continue
        if not made:
            counts.count_without_pair(template.none_reason)
        language = next((record.columns[name] for name in LANGUAGE_COLUMNS if name in record.columns), None)
        for row in made:
            counts.pairs += 1
            if row.target.strip():
                into.append(replace(row, language=language) if isinstance(language, str) else row)
            else:
                counts.empty_targets += 1
    broken.raise_if_any()
    if len(into) == before:
        raise DataError(nothing_left(origin, source.template, counts))


def checked_length(row: Row) -> Row:
    """Refuse a row that is too long to be one, such as a whole file in one line.

    Raises:
        BrokenRowError: it is.
    """
    characters = sum(len(text) for text in row.texts)
    if characters > MAX_ROW_CHARACTERS:
        raise BrokenRowError(
            f"{characters:,} characters of text where a row may have {MAX_ROW_CHARACTERS:,}; cut it into rows"
        )
    return row


def origin_of(source: RowsConfig, data_dir: Path, place: str = "data.source") -> str:
    """Name a source in errors; `place` is where it is configured."""
    if source.kind == "file":
        return str(locate_file(source.path or "", data_dir, f"{place}.path"))
    if source.kind == "wheel":
        return f"{source.member} of wheel '{source.wheel}'"
    return f"hub set '{source.hub_id}'"


def read_records(
    source: RowsConfig,
    broken: BrokenRows,
    cache_dir: Path,
    data_dir: Path,
    revisions: dict[str, str],
    place: str = "data.source",
) -> Iterator[Record]:
    """Yield the rows of a file, wheel member or hub set, whose commit `revisions` gets; `place` is for errors."""
    if source.kind == "file":
        path = locate_file(source.path or "", data_dir, f"{place}.path")
        check_fingerprint(path, source.content_sha256)
        return read_file(path, broken)
    if source.kind == "wheel":
        return read_wheel_member(wheel_file(source.wheel or "", cache_dir), source.member or "", broken)
    return read_hub(source, revisions, place)


def nothing_left(origin: str, template: str, counts: SetReport) -> str:
    if not counts.rows_read:
        return f"{origin} holds no rows; give a file with at least one"
    reasons = [f"{count} with {reason}" for reason, count in counts.rows_without_pair.items()]
    reasons += [f"{counts.empty_targets} with an empty target"] if counts.empty_targets else []
    return (
        f"{origin} gives no row to use: all {counts.rows_read} rows were dropped ({', '.join(reasons)}); "
        f"is '{template}' the right data.source.template?"
    )
