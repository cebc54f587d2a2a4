import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data import sources
from qlora_lab.data.report import DataReport, SetReport
from qlora_lab.data.rows import Row
from qlora_lab.data.sources import load_rows
from qlora_lab.errors import DataError
from qlora_lab.runs.fingerprint import source_fingerprint
from tests.hub_stand_in import give_rows


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
    told = DataReport(train=counts).summary()
    assert "training: 1 rows with no reply of the assistant at the end, 1 rows with an empty target" in told


def test_broken_rows_of_every_kind_are_in_one_message(tmp_path: Path) -> None:
    good = {"question": "a", "answer": "b"}
    with pytest.raises(DataError) as error:
        load(tmp_path, [good, {"question": "a", "anser": "b"}, 3, good])
    assert str(error.value) == (
        f"{tmp_path / 'rows.jsonl'} has 2 broken rows: line 2: column 'answer' is missing "
        "(columns: 'question', 'anser'; did you mean 'anser'?); line 3: not an object but a number (3)"
    )


def test_a_wrong_header_is_one_fault_of_all_its_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,outptu\n" + "a,b\n" * 52_002)
    source = SourceConfig(kind="hub", hub_id="tatsu-lab/alpaca", template="alpaca", path=str(tmp_path / "rows.csv"))
    with pytest.raises(DataError) as error:
        load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport())
    assert str(error.value) == (
        f"{tmp_path / 'rows.csv'} has 52002 broken rows: line 2, line 3, line 4 and 51999 more: column 'output' is "
        "missing (columns: 'instruction', 'outptu'; did you mean 'outptu'?)"
    )


def test_a_row_of_ten_megabytes_is_refused(tmp_path: Path) -> None:
    good = {"question": "a", "answer": "b"}
    with pytest.raises(DataError, match=r"has 1 broken row: line 2: 10,485,761 characters .* may have 1,000,000; cut"):
        load(tmp_path, [good, {"question": "a", "answer": "x" * 10 * 2**20}])
    turns = [{"role": role, "content": "x" * 400_000} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match=r"line 1: 1,600,000 characters"):
        load(tmp_path, [{"messages": turns}], "messages_last_reply")


@pytest.mark.parametrize(
    ("template", "row", "fault"),
    [
        (
            "glue_sst2",
            {"sentence": "a", "label": 2},
            r"must be one of 0 \(negative\), 1 \(positive\); got a number \(2\)",
        ),
        ("glue_sst2", {"sentence": "a", "label": "postive"}, "got 'postive'; did you mean 'positive'"),
        ("glue_sst2", {"sentence": "a", "label": None}, "got null"),
        ("glue_sst2", {"sentence": "a", "label": True}, "got true or false"),
        ("glue_rte", {"sentence1": "a", "sentence2": "b", "label": 0.5}, r"got a number \(0\.5\)"),
        (
            "glue_stsb",
            {"sentence1": "a", "sentence2": "b", "label": 5.1},
            r"a score from 0 to 5; got a number \(5\.1\)",
        ),
        ("glue_mnli", {"premise": "a", "hypothesis": "b"}, "column 'label' is missing"),
        ("messages_every_reply", {"messages": [{"role": "tool", "content": "a"}]}, "role of a message must be one of"),
        ("messages_every_reply", {"messages": [{"role": "user"}]}, "column 'content' is missing"),
        ("messages_every_reply", {"messages": "Hi"}, "'messages' must hold a list of objects; got text"),
        ("oasst_best_path", {"prompt": "Hi"}, "'prompt' must hold a message; got text"),
        ("oasst_best_path", {"prompt": {"role": "user", "text": "Hi"}}, "role of a message must be one of prompter"),
        ("oasst_best_path", {"message_id": "a", "text": "Hi"}, "column 'message_tree_id' is missing"),
        (
            "oasst_best_path",
            {"message_id": "a", "message_tree_id": "t", "parent_id": "b"},
            "tree 't' has 0 messages with",
        ),
    ],
)
def test_a_row_that_its_template_cannot_read_is_named(
    tmp_path: Path, template: str, row: dict[str, Any], fault: str
) -> None:
    with pytest.raises(DataError, match=rf"has 1 broken row: line 1: .*{fault}") as error:
        load(tmp_path, [row], template)
    assert "\n" not in str(error.value)


def test_a_message_twice_in_a_tree_is_refused(tmp_path: Path) -> None:
    message = {"message_id": "a", "message_tree_id": "t", "parent_id": None, "text": "Hi", "role": "prompter"}
    with pytest.raises(DataError, match="tree 't' holds a message twice"):
        load(tmp_path, [message, message | {"parent_id": "a"}], "oasst_best_replies")


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
    give_rows(monkeypatch, [{"instruction": "a", "input": "", "output": "b"}])
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
