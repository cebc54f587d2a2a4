import io
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.data.json_text import JsonText
from qlora_lab.data.readers import read_file
from qlora_lab.data.records import BrokenRows
from qlora_lab.errors import DataError

ITEMS: list[Any] = [
    {"a": "eins,\n zwei]", "b": [1, -2.5e-3, {"c": None}], "ü": "\u2028 𝄞"},
    'text \\ " \t',
    [],
    {},
    [[True, False], -12, 0.5],
    float("inf"),
    {"cut": "\ud83d half", "whole": "😀"},
    1234567890123,
]
TEXT = json.dumps(ITEMS, indent=1) + " \n\n"  # with escapes
RAW = json.dumps(ITEMS[:2], ensure_ascii=False, indent=3)  # without
CHUNKS = [1, 2, 3, 7, 64, 10_000]


class Slow(io.BytesIO):
    """Gives no more at once than it is asked for, or the most that it may."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self._most = most

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        return super().read(min(size, self._most))


def items_of(content: bytes, chunk_bytes: int = 2**20, most: int = 2**20) -> list[Any]:
    text = JsonText(Slow(content, most), "rows.json", chunk_bytes)
    assert text.next_character() == "["
    return [item.value for item in text.items()]


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("text", [TEXT, RAW, "\ufeff" + RAW, "[]", " [ ] ", "[1]", "[12,\n345 ]"])
def test_items_are_those_of_the_whole_wherever_it_is_cut_into_pieces(text: str, chunk_bytes: int) -> None:
    expected = json.loads(text.removeprefix("\ufeff"))
    assert items_of(text.encode(), chunk_bytes) == expected
    assert items_of(text.encode(), chunk_bytes, most=1) == expected


def fault_of(text: str) -> str | None:
    """Return what `json.loads` of the whole says, in our words."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"rows.json is invalid JSON at line {error.lineno}, column {error.colno} ({error.msg})"
    return None


@pytest.mark.parametrize("chunk_bytes", [1, 5, 10_000])
def test_what_is_wrong_is_told_as_of_the_whole(chunk_bytes: int) -> None:
    rng = random.Random(0)
    broken = [TEXT[:end] for end in range(1, len(TEXT.rstrip()))]  # cut short anywhere
    for _ in range(300):  # a character that is another
        place = rng.randrange(1, len(TEXT))
        broken.append(TEXT[:place] + rng.choice('x",]}[{:\n\\ 0-') + TEXT[place + 1 :])
    broken += ["[1] 2", "[] []", "[,]", "[1,]", "[1 2]", "[-]", "[tru]", "[nul", '["\\ud83']
    faults = 0
    for text in broken:
        fault = fault_of(text)
        if fault is None:
            assert items_of(text.encode(), chunk_bytes) == json.loads(text)
            continue
        faults += 1
        with pytest.raises(DataError, match=f"^{re.escape(fault)}$"):
            items_of(text.encode(), chunk_bytes)
    assert faults > len(TEXT)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_bytes_that_are_no_text_are_told_by_their_line(chunk_bytes: int) -> None:
    with pytest.raises(DataError, match=r"^rows\.json is not UTF-8 text at line 3 \(invalid continuation byte\)$"):
        items_of(b'[{"a": "\xc3\xbc"},\n\n{"a": "\xe4"}]', chunk_bytes)
    with pytest.raises(DataError, match=r"^rows\.json is not UTF-8 text at line 2 \(unexpected end of data\)$"):
        items_of(b'["a",\n"\xc3', chunk_bytes)


def test_a_fault_is_found_without_reading_what_follows() -> None:
    stream = io.BytesIO(b'[{"a": 1}, {"a" 2},' + b'{"a": 1},' * 100_000)
    text = JsonText(stream, "rows.json", chunk_bytes=1000)
    text.next_character()
    with pytest.raises(DataError, match=r"line 1, column 17 \(Expecting ':' delimiter\)"):
        list(text.items())
    assert stream.tell() == 1000


def peak_bytes(path: Path) -> tuple[int, int]:
    """Return how many rows a file has, and the most memory that reading them took."""
    tracemalloc.start()
    try:
        rows = sum(1 for _ in read_file(path, BrokenRows(str(path))))
        return rows, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_array_is_read_in_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    row = json.dumps({"input": "x" * 500, "output": "y" * 500})
    path = tmp_path / "rows.json"
    for count in (2_000, 20_000):
        path.write_text("[" + ",\n".join([row] * count) + "]")
        rows, peak = peak_bytes(path)
        assert rows == count
        assert peak < 6 * 2**20  # a piece of 1 MiB as bytes and as text, twice while it goes on; the file has up to 20


def test_a_row_of_10_mb_takes_a_few_times_its_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"a": "x" * 10_000_000}, {"a": "short"}]
    path.write_text(json.dumps(rows))
    assert [dict(record.columns) for record in read_file(path, BrokenRows(str(path)))] == rows
    count, peak = peak_bytes(path)
    assert (count, peak < 60_000_000) == (2, True)  # bytes, text and value, and pieces of twice the size


def test_rows_before_a_fault_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1},\n{"a": 2},\n{"a": ')
    records = read_file(path, BrokenRows("rows.json"))
    assert [next(records).columns for _ in range(2)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"^rows\.json is invalid JSON at line 3, column 7 \(Expecting value\)$"):
        next(records)
