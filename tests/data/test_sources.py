import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data import sources
from qlora_lab.data.report import SetReport
from qlora_lab.data.rows import Row
from qlora_lab.data.sources import load_rows
from qlora_lab.errors import DataError
from qlora_lab.runs.fingerprint import source_fingerprint


def load(tmp_path: Path, rows: list[Any], template: str = "question_answer") -> tuple[list[Row], SetReport]:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    counts = SetReport()
    source = SourceConfig(kind="file", template=template, path="rows.jsonl")
    return load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=counts), counts


def test_rows_are_read_and_every_drop_is_counted(tmp_path: Path) -> None:
    dialogues = ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: ", "\n\nHuman: a"]
    rows, counts = load(tmp_path, [{"chosen": text} for text in dialogues], "hh_last_turn")
    assert [(row.source, row.target) for row in rows] == [("a", "b")]
    assert counts == SetReport(
        rows_read=3, rows_without_pair={"no reply of the assistant at the end": 1}, pairs=2, empty_targets=1
    )


def test_broken_rows_of_every_kind_are_in_one_message(tmp_path: Path) -> None:
    good = {"question": "a", "answer": "b"}
    with pytest.raises(DataError) as error:
        load(tmp_path, [good, {"question": "a", "anser": "b"}, 3, good])
    assert str(error.value) == (
        f"{tmp_path / 'rows.jsonl'} has 2 broken rows: line 2: column 'answer' is missing "
        "(columns: 'question', 'anser'; did you mean 'anser'?); line 3: not an object but a number (3)"
    )


def test_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        load(tmp_path, [])


def test_set_that_gives_no_row_is_refused_with_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 2 rows were dropped \(2 with an empty target\)"):
        load(tmp_path, [{"question": "a", "answer": " "}] * 2)
    with pytest.raises(DataError, match=r"\(2 with no answer of the bot\); is 'chip2' the right"):
        load(tmp_path, [{"text": "a"}] * 2, "chip2")


def test_file_changed_since_planning_is_refused(tmp_path: Path) -> None:
    source = SourceConfig(kind="file", template="chip2", path="rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "<human>: a\\n<bot>: b"}')
    source.content_sha256 = source_fingerprint(source, tmp_path)
    assert len(load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport())) == 1
    (tmp_path / "rows.jsonl").write_text('{"text": "<human>: a\\n<bot>: c"}')
    with pytest.raises(DataError, match="has changed"):
        load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport())


def test_hub_rows_go_through_their_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"instruction": "a", "input": "", "output": "b"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    source = SourceConfig(kind="hub", template="alpaca_chat", hub_id="some/set")
    assert load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport()) == [Row("a", "b")]


def test_wheel_rows_are_read_from_the_verified_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/test.jsonl", '{"passage": "A cat.", "question": "How many?", "answer": "1"}\n')
    asked: list[tuple[str, Path]] = []

    def wheel_file(name: str, cache_dir: Path) -> Path:
        asked.append((name, cache_dir))
        return wheel

    monkeypatch.setattr(sources, "wheel_file", wheel_file)
    source = SourceConfig(kind="wheel", template="asdiv", wheel="asdiv", member="data/test.jsonl")
    rows = load_rows(source, cache_dir=tmp_path / "cache", data_dir=tmp_path, counts=SetReport())
    assert rows == [Row("A cat. How many?", "1")]
    assert asked == [("asdiv", tmp_path / "cache")]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("data/test.jsonl", '{"passage": "A cat.", "question": "How many?", "anwser": "1"}\n')
    with pytest.raises(DataError, match=r"data/test\.jsonl of wheel 'asdiv' has 1 broken row: line 1"):
        load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport())
