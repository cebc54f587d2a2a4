"""Values that no run can work with are refused when they enter, by the name of their key."""

from dataclasses import asdict
from typing import Any

import pytest

from qlora_lab.config.load import from_plain
from qlora_lab.errors import ConfigError
from tests.helpers import composed


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.source.template=alpacca", r"data\.source\.template must be one of .*; did you mean 'alpaca'\?"),
        ("data.source.template=alpaca", r"data\.source\.template must be procedural when data\.source\.kind is"),
        ("data.source.families=[ad_numbers]", r"data\.source\.families must be one of .*; did you mean 'add_numbers'"),
        ("data.rows=null", r"data\.rows must be set when data\.source\.kind is 'procedural'"),
        (
            "evaluation.rows=100000",
            r"evaluation\.rows must be at most 48000, since task family add_numbers has no more",
        ),
        ("model.architecture.hidden_size=0", r"model\.architecture\.hidden_size must be 1 or more; got 0"),
        ("model.architecture.vocab_size=0", r"model\.architecture\.vocab_size must be 1 or more; got 0"),
        ("model.architecture.num_layers=-1", r"model\.architecture\.num_layers must be 1 or more; got -1"),
        ("model.architecture.rope_theta=0", r"model\.architecture\.rope_theta must be a finite number above 0; got 0"),
        ("model.prompt_format=chat_template", r"model\.prompt_format must be chatml or plain when model\.tokenizer is"),
        ("optim.learning_rate=inf", r"optim\.learning_rate must be a finite number above 0; got inf"),
        ("optim.learning_rate=nan", r"optim\.learning_rate must be a finite number above 0; got nan"),
        ("optim.eps=0", r"optim\.eps must be a finite number above 0; got 0"),
        ("adapter.alpha=inf", r"adapter\.alpha must be a finite number above 0; got inf"),
        ("seed=99999999999", r"seed must be from 0 to 4294967295; got 99999999999"),
        ("seed=-1", r"seed must be from 0 to 4294967295; got -1"),
        ("evaluation.seed=4294967296", r"evaluation\.seed must be from 0 to 4294967295"),
        ("launcher.slurm.cpus_per_run=0", r"launcher\.slurm\.cpus_per_run must be 1 or more; got 0"),
        ("launcher.slurm.gpus_per_run=-1", r"launcher\.slurm\.gpus_per_run must be 0 or more; got -1"),
        ("launcher.slurm.memory_gb=0", r"launcher\.slurm\.memory_gb must be 1 or more; got 0"),
        ("study.name=../../x", r"study\.name must be the name of a folder, without slashes; got '\.\./\.\./x'"),
        ("study.name=..", r"study\.name must be the name of a folder"),
    ],
)
def test_a_value_that_no_run_can_work_with_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        composed("model=tiny_random", override)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "file", "allowed"),
    [
        ("file", "rows.jsonl.gz", True),
        ("file", "ROWS.CSV", True),
        ("file", "rows.parquet", True),
        ("file", "rows.parquet.gz", False),
        ("file", "README.md", False),
        ("wheel", "data/rows.txt", False),
    ],
)
def test_a_data_file_of_another_kind_is_refused(kind: str, file: str, allowed: bool) -> None:
    key = "path" if kind == "file" else "member"
    overrides = ["data=file", f"data.source.kind={kind}", f"data.source.{key}={file}", "data.source.wheel=asdiv"]
    overrides += ["data.source.path=unused.jsonl"] if kind == "wheel" else []
    if allowed:
        composed(*overrides)
        return
    with pytest.raises(ConfigError, match=rf"data\.source\.{key} must end in one of .*\.parquet.*; got '{file}'"):
        composed(*overrides)


def with_set(**values: Any) -> None:
    plain = asdict(composed("model=tiny_random"))
    plain["evaluation"]["sets"] = {"chat": values}
    from_plain(plain)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"kind": "fil", "template": "alpaca"}, r"evaluation\.sets\.chat\.kind must be one of .*did you mean 'file'"),
        ({"kind": "file", "template": "alpaca"}, r"evaluation\.sets\.chat\.path is needed when evaluation\.sets\.chat"),
        ({"kind": "file", "template": "al", "path": "a.json"}, r"evaluation\.sets\.chat\.template must be one of"),
    ],
)
def test_a_bad_evaluation_set_is_refused_by_its_own_name(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_set(**values)
