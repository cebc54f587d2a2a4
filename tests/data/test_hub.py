import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.hub import read_hub
from qlora_lab.data.report import SetReport
from qlora_lab.data.sources import load_rows
from qlora_lab.errors import DataError
from tests.hub_stand_in import give_rows, hub_server

SOURCE = SourceConfig(
    kind="hub",
    template="chip2",
    hub_id="laion/OIG",
    split="train[:2]",
    revision="abc",
    hub_files="unified_chip2.jsonl",
)


def test_hub_set_is_asked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    give_rows(monkeypatch, [{"text": "a"}, {"text": "b"}])
    given = datasets.load_dataset_builder

    def load_dataset_builder(*args: Any, **named: Any) -> Any:
        asked.append({**named, "args": args})
        return given(*args, **named)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert [(place, dict(columns)) for place, columns in read_hub(SOURCE, {})] == [
        ("row 1", {"text": "a"}),
        ("row 2", {"text": "b"}),
    ]
    files = {"args": ("laion/OIG", None), "revision": "abc", "data_files": "unified_chip2.jsonl"}
    # once more under the name by which the set is found without a network
    assert asked == [files, files | {"config_id": "default-data_files=unified_chip2.jsonl"}]


ONLINE_AND_OFFLINE = """
import json, sys
import datasets
from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.hub import at_commit, read_hub
from qlora_lab.errors import DataError

def show(hub_id, **asked):
    source, revisions = SourceConfig(kind="hub", template="chip2", hub_id=hub_id, **asked), {}
    try:
        texts = [columns["text"] for _, columns in read_hub(source, revisions)]
        print(json.dumps([texts, revisions.get(hub_id), at_commit(source).revision]))
    except DataError as error:
        print(json.dumps(str(error)))

first, second, third = (digit * 40 for digit in "123")
for files in (None, "rows.jsonl"):
    for revision in (first, None):
        show("some/set", hub_files=files, revision=revision)
datasets.config.HF_HUB_OFFLINE = True
for files in (None, "rows.jsonl"):
    for revision in (None, first, second, third):
        show("some/set", hub_files=files, revision=revision)
sys.stderr = sys.stdout
at_commit(SourceConfig(kind="hub", template="chip2", hub_id="some/set", revision="main"))
"""


def test_without_a_network_each_commit_that_was_read_is_found_again(tmp_path: Path) -> None:
    """With the real library on a hub of our own; the hub's address is read when it is imported."""
    first, second, third = (digit * 40 for digit in "123")
    sets = {"some/set": {commit: {"rows.jsonl": json.dumps({"text": commit[0]}) + "\n"} for commit in (first, second)}}
    with hub_server(sets) as address:
        done = run_beside_hub(ONLINE_AND_OFFLINE, address, tmp_path)
    *lines, of_a_branch = done.splitlines()
    found = [json.loads(line) for line in lines]
    at_first, at_second = [["1"], first, first], [["2"], second, second]
    missing = (
        f"data.source.hub_id 'some/set' is in the local hub cache at commit {second}, and not at data.source.revision "
        f"'{third}'; load that once on a machine with a network, or set the other"
    )
    assert found == [at_first, at_second] * 2 + [at_second, at_first, at_second, missing] * 2
    assert of_a_branch == (
        f"without a network data.source.revision 'main' cannot be looked up; read at commit {second}, "
        "the last prepared here"
    )


def run_beside_hub(code: str, address: str, home: Path) -> str:
    environment = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def test_the_commit_that_was_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    give_rows(monkeypatch, [{"text": "<human>: a\n<bot>: b"}], commit)
    counts = SetReport()
    load_rows(replace(SOURCE, revision=None), cache_dir=Path(), data_dir=Path(), counts=counts)
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
    def load_dataset_builder(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
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
        gated, absent, revision = run_beside_hub(code, address, tmp_path).splitlines()
    start = (
        "data.source.hub_id 'meta/gated-set' is gated on the hub: accept its terms on https://huggingface.co/datasets"
    )
    assert gated.startswith(start) and "HF_TOKEN" in gated
    assert absent.startswith("data.source.hub_id 'some/absent' was not found on the hub, or is private")
    assert revision.startswith("data.source.hub_id 'some/set' has no data.source.revision 'old' on the hub")
    assert all(sentence.endswith("data.source.path=FILE") for sentence in (gated, absent, revision))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"]
