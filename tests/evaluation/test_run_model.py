"""A finished run's model is opened as the run left it, or refused."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab import run as runs
from qlora_lab.adapters.lora import adapted_layers
from qlora_lab.errors import ConfigError, ModelError, RunFolderError
from qlora_lab.evaluation.candidates import alone, base_of, trained
from qlora_lab.evaluation.run_model import RunModel, open_model, open_run
from qlora_lab.models.warm import WarmBase
from qlora_lab.runs.find import find_run
from qlora_lab.runs.folder import RunFolder
from tests.evaluation.finished_runs import finished, planned

T5 = "model.architecture.model_type=t5 model.task=seq2seq model.prompt_format=encoder"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished(tmp_path_factory.mktemp("runs"), "optim.learning_rate=0.05")


def loss(opened: RunModel) -> float:
    """Evaluate as the run did at its end, on the rows that it held out."""
    assert opened.config is not None
    bench = runs.build(opened.config)
    outcome = runs._evaluate(replace(bench, model=opened.model, tokenizer=opened.tokenizer), opened.config)
    return outcome.metrics["eval/loss"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adapter=none", "quant=none"),
        ("trainer.compute_dtype=bfloat16", "adapter=none", "quant=none"),
        ("trainer.compute_dtype=bfloat16",),
        ("model.new_tokens=['<a>']", "adapter.trained_modules=[embed_tokens]"),
        ("model.new_tokens=['<a>']", "adapter=none", "quant=none"),
        tuple(T5.split()),
    ],
    ids=["adapter", "full", "full bfloat16", "bfloat16", "new tokens", "full new tokens", "t5"],
)
def test_an_opened_run_scores_what_it_scored(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    folder = finished(tmp_path, "optim.learning_rate=0.05", *overrides)
    assert loss(open_run(folder.path)) == folder.result()["metrics"]["eval/loss"]
