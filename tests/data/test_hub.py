from typing import Any

import datasets
import pytest

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.hub import read_hub
from qlora_lab.errors import DataError

SOURCE = SourceConfig(
    kind="hub",
    template="chip2",
    hub_id="laion/OIG",
    split="train[:2]",
    revision="abc",
    path="unified_chip2.jsonl",
)


def test_hub_set_is_asked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(*args: Any, **named: Any) -> datasets.Dataset:
        asked.update(named, args=args)
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [(place, dict(columns)) for place, columns in read_hub(SOURCE)] == [
        ("row 1", {"text": "a"}),
        ("row 2", {"text": "b"}),
    ]
    assert asked == {
        "args": ("laion/OIG", None),
        "split": "train[:2]",
        "revision": "abc",
        "data_files": "unified_chip2.jsonl",
    }


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found OIG.py"),
            "revision=refs/convert/parquet",
        ),
        (ConnectionError("Couldn't reach 'laion/OIG' on the Hub"), "could not be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'laion/OIG' doesn't exist"),
            "log in with `hf auth login`",
        ),
        (ValueError("Unknown split 'trian'"), "check hub_config, split, revision and path"),
    ],
)
def test_hub_failures_become_one_sentence_with_advice(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as raised:
        list(read_hub(SOURCE))
    message = str(raised.value)
    assert message.startswith("data.source.hub_id 'laion/OIG'")
    assert advice in message
    assert "use data.source.kind=file" in message
