import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qlora_lab.data.readers import TOO_MUCH, read_file, read_wheel_member
from qlora_lab.data.records import BrokenRows
from qlora_lab.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"question": 'He said "hi", twice', "answer": "one\ntwo"},
    {"question": "Wie heißt das?", "answer": "ü"},
]


def read(path: Path) -> list[dict[str, Any]]:
    broken = BrokenRows(str(path))
    rows = [dict(record.columns) for record in read_file(path, broken)]
    broken.raise_if_any()
    return rows


def packed(path: Path, content: str) -> Path:
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


CONTENT = {
    ".jsonl": "\ufeff" + "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    ".json": json.dumps(ROWS, ensure_ascii=False),
    ".csv": 'question,answer\r\n"He said ""hi"", twice","one\ntwo"\r\nWie heißt das?,ü\r\n',
    ".tsv": '\ufeffquestion\tanswer\n"He said ""hi"", twice"\t"one\ntwo"\nWie heißt das?\tü',
}


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", CONTENT)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, kind: str, packing: str) -> None:
    assert read(packed(tmp_path / f"rows{kind}{packing}", CONTENT[kind])) == ROWS


def test_parquet_keeps_nested_columns(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "instances": [{"input": "b", "output": "c"}]}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == rows


def test_broken_json_lines_are_named_by_line_and_counted(tmp_path: Path) -> None:
    lines = [b'{"a": "1"}', b'{"a": ', b"", b"[1]", b'"text"', b'{"a": "\xff"}', *[b"null"] * 4]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path} has 8 broken rows: line 2: invalid JSON (Expecting value at column 6")
    assert "line 4: not an object but a list" in message
    assert "line 5: not an object but text" in message
    assert "line 6: not UTF-8 text (invalid start byte at byte 8)" in message
    assert message.endswith("; line 7, line 8, line 9 and 1 more: not an object but null")


def test_a_json_line_cut_short_is_told_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"line 2: invalid JSON \(Unterminated string.*; it is the last line: was the file"
    ):
        read(packed(tmp_path / "rows.jsonl", '{"a": "1"}\n{"a": "2'))
    with pytest.raises(DataError, match=r"line 1: invalid JSON \(Unterminated string[^;]*\)$"):
        read(packed(tmp_path / "rows.jsonl", '{"a": "1\n{"a": "2"}\n'))


def test_many_faults_are_counted(tmp_path: Path) -> None:
    lines = [" " * column + "{" for column in range(7)]  # each invalid at another column
    with pytest.raises(DataError, match=r"has 7 broken rows: line 1: .*line 5: .*; and 2 more$"):
        read(packed(tmp_path / "rows.jsonl", "\n".join(lines) + "\n"))


HALF, WHOLE = '{"a": "cut \\ud83d"}', '{"a": "\\ud83d\\ude00"}'


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (HALF, r"not UTF-8 text \(\\ud83d is half a character\)"),
        ('{"a": ' + "[" * 100_000, TOO_MUCH),
        ('{"a": ' + "9" * 5000 + "}", TOO_MUCH),
    ],
    ids=["half a character", "deep", "digits"],
)
def test_json_that_is_no_text_or_too_much_is_a_broken_row(tmp_path: Path, row: str, fault: str) -> None:
    with pytest.raises(DataError, match=f"1 broken row: line 2: {fault}"):
        read(packed(tmp_path / "rows.jsonl", f"{WHOLE}\n{row}\n"))
    with pytest.raises(DataError, match=fault):
        read(packed(tmp_path / "rows.json", f"[{WHOLE}, {row}]"))


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_parquet_file_with_a_flipped_byte_is_refused(tmp_path: Path, compression: str) -> None:
    """With checksums, as some writers add them, or where the byte keeps a page from being read."""
    path, rows = tmp_path / "rows.parquet", [{"a": f"some text {number}"} for number in range(2000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, compression=compression, write_page_checksum=True, use_dictionary=False)
    whole = path.read_bytes()
    assert read(path) == rows
    for place in (100, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"rows\.parquet is damaged, or no Parquet file"):
            read(path)


def test_bytes_of_a_parquet_file_that_are_no_text_are_refused(tmp_path: Path) -> None:
    column = pyarrow.array([b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="is damaged, or no Parquet file"):
        read(tmp_path / "rows.parquet")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read \(.*Is a directory"):
        read(tmp_path / "rows.jsonl")


def test_json_that_is_no_array_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a JSON array of objects; got an object"):
        read(packed(tmp_path / "one.json", '{"data": []}'))
    with pytest.raises(DataError, match="item 2: not an object but a number"):
        read(packed(tmp_path / "mixed.json", '[{"a": "1"}, 2]'))


def test_json_may_hold_an_object_a_line(tmp_path: Path) -> None:
    assert read(packed(tmp_path / "lines.json", '{"a": "1"}\n{"a": "2"}\n')) == read(
        packed(tmp_path / "lines.jsonl", '{"a": "1"}\n{"a": "2"}\n')
    )
    with pytest.raises(DataError, match="line 2: invalid JSON"):
        read(packed(tmp_path / "cut.json", '{"a": "1"}\n{"a": \n'))


def test_broken_csv_rows_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 broken row: line 3: 1 fields where the header has 2"):
        read(packed(tmp_path / "short.csv", "a,b\n1,2\n3\n4,5\n"))
    with pytest.raises(DataError, match=r"line 3: invalid CSV \(unexpected end of data\)"):
        read(packed(tmp_path / "open.csv", 'a,b\n1,2\n3,"4\n'))
    with pytest.raises(DataError, match="names the column 'a' twice"):
        read(packed(tmp_path / "twice.csv", "a,a\n1,2\n"))
    (tmp_path / "latin.csv").write_bytes(b"a,b\n1,2\n1,\xe4\n")
    with pytest.raises(DataError, match=r"line 3: not UTF-8 text \(.* at byte 3\)"):
        read(tmp_path / "latin.csv")
    (tmp_path / "latin.json").write_bytes(b'[{"a": "1"},\n{"a": "\xe4"}]')
    with pytest.raises(DataError, match=r"latin\.json is not UTF-8 text at line 2"):
        read(tmp_path / "latin.json")


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    assert read(packed(tmp_path / "long.csv", f"a\n{'x' * 200_000}\n"))[0]["a"] == "x" * 200_000


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.parquet"])
def test_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format")
    with pytest.raises(DataError, match="is damaged, or no"):
        read(tmp_path / name)


def test_cut_off_gzip_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(ROWS[0]).encode() * 100)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged, or no gzip file"):
        read(tmp_path / "rows.jsonl.gz")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.parquet.gz"])
def test_other_kinds_of_file_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"allowed are \.jsonl, \.json, \.csv, \.tsv, \.parquet"):
        read(tmp_path / name)


def test_wheel_member_is_read_in_place(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/data/rows.jsonl", CONTENT[".jsonl"])
        archive.writestr("some/data/packed.csv.gz", gzip.compress(CONTENT[".csv"].encode()))
    for member in ("some/data/rows.jsonl", "some/data/packed.csv.gz"):
        records = read_wheel_member(wheel, member, BrokenRows(member))
        assert [dict(record.columns) for record in records] == ROWS
    with pytest.raises(DataError, match=r"no member 'some/data/row\.jsonl'; did you mean 'some/data/rows"):
        list(read_wheel_member(wheel, "some/data/row.jsonl", BrokenRows("wheel")))
    wheel.write_bytes(b"no zip")
    with pytest.raises(DataError, match="is damaged, or no wheel"):
        list(read_wheel_member(wheel, "some/data/rows.jsonl", BrokenRows("wheel")))
