"""A tiny model with a tokenizer of bytes, and rows in the schemas of the published sets (self-written)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.run import BenchmarkOutcome, run_benchmarks
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.models.tasks import task_of
from tests.tiny_models import LLAMA

MakeExaminee = Callable[..., Examinee]
Run = Callable[..., BenchmarkOutcome]


def random_llama(vocabulary: int = 384) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(**LLAMA | {"vocab_size": vocabulary}, initializer_range=0.3, max_position_embeddings=4096)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture
def make_examinee(tmp_path: Path, llama: LlamaForCausalLM) -> MakeExaminee:
    def make(model: PreTrainedModel | None = None, tokenizer: Any = None, **options: Any) -> Examinee:
        chosen = llama if model is None else model
        usual: dict[str, Any] = {
            "prompt_format": "plain" if task_of(chosen) == "causal" else "encoder",
            "max_length_tokens": 2048,
            "batch_tokens": 1024,
        }
        return Examinee(
            chosen,
            ByteLevelTokenizer() if tokenizer is None else tokenizer,
            loss_chunk_tokens=256,
            cache_dir=tmp_path,
            data_dir=tmp_path,
            **usual | options,
        )

    return make


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path, make_examinee: MakeExaminee) -> Run:
    """Run one benchmark, named as its task, over rows; its metrics come without the prefix of their names."""

    def run_one(task: str, asked: list[dict[str, Any]], examinee: Examinee | None = None, **options: Any) -> Any:
        write_rows(tmp_path / "rows.jsonl", asked)
        config = BenchmarkConfig(task=task, kind="file", path="rows.jsonl", split="test", **options)
        config.check(f"evaluation.benchmarks.{task}")
        outcome = run_benchmarks(examinee or make_examinee(), {task: config})
        assert set(outcome.metrics) <= set(config.metric_names(task))
        prefix = config.metric_prefix(task) + "/"
        metrics = {name.removeprefix(prefix): value for name, value in outcome.metrics.items()}
        return BenchmarkOutcome(metrics, outcome.items, outcome.revisions)

    return run_one
