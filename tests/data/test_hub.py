import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.hub import read_hub
from qlora_lab.data.report import SetReport
from qlora_lab.data.sources import load_rows
from qlora_lab.errors import DataError
from tests.hub_stand_in import hub_server

SOURCE = SourceConfig(
    kind="hub",
    template="chip2",
    hub_id="laion/OIG",
    split="train[:2]",
    revision="abc",
    hub_files="unified_chip2.jsonl",
)


def test_hub_set_is_asked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(*args: Any, **named: Any) -> datasets.Dataset:
        asked.update(named, args=args)
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [(place, dict(columns)) for place, columns in read_hub(SOURCE, {})] == [
        ("row 1", {"text": "a"}),
        ("row 2", {"text": "b"}),
    ]
    assert asked == {
        "args": ("laion/OIG", None),
        "split": "train[:2]",
        "revision": "abc",
        "data_files": "unified_chip2.jsonl",
    }


def test_the_commit_that_was_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    rows = datasets.Dataset.from_list([{"text": "<human>: a\n<bot>: b"}])
    rows.info.download_checksums = {f"hf://datasets/laion/OIG@{commit}/unified_chip2.jsonl": {"num_bytes": 1}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    counts = SetReport()
    load_rows(SOURCE, cache_dir=Path(), data_dir=Path(), counts=counts)
    assert counts.revisions == {"laion/OIG": commit}


def refusal(source: SourceConfig) -> str:
    with pytest.raises(DataError) as raised:
        list(read_hub(source, {}))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"data.source.hub_id '{source.hub_id}'")
    assert message.endswith("give a local copy of its rows with data.source.path=FILE")
    return message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found OIG.py"),
            "revision=refs/convert/parquet",
        ),
        (
            ValueError("Unknown split 'trian'.\nShould be one of ['train']"),
            "check these keys of data.source",
        ),
    ],
)
def test_hub_failures_become_one_sentence_with_advice(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert advice in refusal(SOURCE)


def test_a_set_that_is_not_cached_is_refused_offline(tmp_path: Path) -> None:
    assert "is not in the local hub cache, and the hub could not be reached" in refusal(SOURCE)


def test_files_and_splits_are_read_as_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the repository; `datasets` reads both alike."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, text in (("a_zsopt", "first"), ("b_zsopt", "second"), ("c_fsopt", "third")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "part.0.jsonl").write_text(f'{{"text": "{text}"}}\n')
    source = SourceConfig(kind="hub", template="chip2", hub_id=str(tmp_path / "set"), hub_files="*_zsopt/part.0.jsonl")
    assert [dict(columns) for _, columns in read_hub(source, {})] == [{"text": "first"}, {"text": "second"}]
    source.split = "train[1:]"
    assert [dict(columns) for _, columns in read_hub(source, {})] == [{"text": "second"}]
    source.split = "trian"
    assert "trian" in refusal(source)
    source.split, source.hub_files = "train", "*_zsopt/part.7.jsonl"
    assert "part.7.jsonl" in refusal(source)
    (tmp_path / "set" / "a_zsopt" / "part.0.jsonl").write_text('{"text": "fir')
    source.hub_files = "a_zsopt/part.0.jsonl"
    assert "did not load" in refusal(source)


def test_what_the_hub_refuses_is_explained(tmp_path: Path) -> None:
    """In a process of its own: the hub's address is read when its library is imported."""
    code = """
from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.hub import read_hub
from qlora_lab.errors import DataError
for hub_id, revision in (("meta/gated-set", None), ("some/absent", None), ("some/set", "old")):
    try:
        list(read_hub(SourceConfig(kind="hub", template="alpaca", hub_id=hub_id, revision=revision), {}))
    except DataError as error:
        print(str(error).replace("\\n", "|"))
"""
    with hub_server() as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
    gated, absent, revision = done.stdout.splitlines()
    start = (
        "data.source.hub_id 'meta/gated-set' is gated on the hub: accept its terms on https://huggingface.co/datasets"
    )
    assert gated.startswith(start) and "HF_TOKEN" in gated
    assert absent.startswith("data.source.hub_id 'some/absent' was not found on the hub, or is private")
    assert revision.startswith("data.source.hub_id 'some/set' has no data.source.revision 'old' on the hub")
    assert all(sentence.endswith("data.source.path=FILE") for sentence in (gated, absent, revision))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]
