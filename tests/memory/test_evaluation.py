"""What evaluation keeps is what was predicted, or a quarter less."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.architecture import linear_layers
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.data.prepare import data_of_run
from qlora_lab.evaluation import weights
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.run import run_benchmarks
from qlora_lab.evaluation.suite import evaluate
from qlora_lab.memory import evaluation
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import plan_memory
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.models.load import load_model
from qlora_lab.models.precision import computing_in
from tests.memory.live_bytes import LiveBytes
from tests.memory.test_activations import BASE, composed_once, numbers

HELD_OUT = [
    *("data.rows=4", "evaluation.rows=8", "evaluation.batch_tokens=512", "evaluation.max_source_tokens=96"),
    *("evaluation.max_target_tokens=32", "evaluation.max_new_tokens=32"),
]


@pytest.mark.parametrize(
    ("model_type", "dtype", "size"),
    [
        ("llama", "float32", {"layers": 4}),
        *(  # the logits of what is scored at once, and of the next token of the rows that are answered
            ("llama", dtype, {"layers": 2, "vocab": 100_000, "chunk": chunk})
            for dtype in ("float32", "bfloat16")
            for chunk in (10, 2)
        ),
        ("llama", "bfloat16", {"f": 768, "layers": 2}),
        ("opt", "float32", {"layers": 4}),
        ("t5", "float32", {}),
    ],
)
def test_scoring_and_answering_take_what_was_predicted(
    model_type: str, dtype: str, size: dict[str, int], tmp_path: Path
) -> None:
    architecture, task = numbers(model_type, {**BASE, "vocab": 384, **size}), FAMILIES[model_type].task
    config = copy.deepcopy(composed_once(*HELD_OUT))
    config.model = replace(config.model, task=task, architecture=architecture)
    config.trainer.loss_chunk_tokens = size.get("chunk", 16)
    model = load_model(
        config.model, config.quant, compute_dtype=getattr(torch, dtype), device="cpu", cache_dir=tmp_path, seed=0
    )
    add_adapters(model, config.adapter, torch.Generator())
    data = data_of_run(config, ByteLevelTokenizer(), tmp_path)
    counter = LiveBytes([*model.parameters(), *model.buffers()])
    with counter, computing_in(model, getattr(torch, dtype)):
        evaluate(
            model,
            ByteLevelTokenizer(),
            data.held_out,
            config.evaluation,
            exact_match_sets=data.exact_match_sets,
            loss_chunk_tokens=config.trainer.loss_chunk_tokens,
            weights_context=weights.cached_if_small,
        )
    linears = linear_layers(architecture)
    assert linears is not None
    predicted = evaluation.evaluation_bytes(config, architecture, linears, 4 if dtype == "float32" else 2)
    assert 0.9 * counter.peak < predicted < 1.3 * counter.peak


@pytest.mark.parametrize(
    ("benchmark", "overrides"),
    [
        ({"task": "perplexity"}, ["evaluation.batch_tokens=128"]),  # one window of all that the model reads
        ({"task": "glue_cola", "max_source_tokens": 64, "max_new_tokens": 32, "rows": 8}, []),
    ],
)
def test_benchmarks_take_what_was_predicted(benchmark: dict[str, Any], overrides: list[str], tmp_path: Path) -> None:
    long = benchmark["task"] == "perplexity"
    texts = [f"{'a cat sat on a mat and ' * 30}{number}"[-600 if long else -44 :] for number in range(2 if long else 8)]
    rows = [{"text": text, "sentence": text, "label": 1} for text in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = copy.deepcopy(composed_once(*HELD_OUT, *overrides))
    architecture = numbers("llama", {**BASE, "vocab": 384, "layers": 4})
    config.model = replace(config.model, architecture=architecture, max_length_tokens=512)
    config.evaluation.rows = 1
    config.evaluation.benchmarks = {"b": BenchmarkConfig(kind="file", path="rows.jsonl", **benchmark)}
    config.trainer.loss_chunk_tokens = 16
    model = load_model(
        config.model, config.quant, compute_dtype=torch.float32, device="cpu", cache_dir=tmp_path, seed=0
    )
    examinee = replace(Examinee.of_run(model, ByteLevelTokenizer(), config), data_dir=tmp_path)
    counter = LiveBytes([*model.parameters(), *model.buffers()])
    with counter, computing_in(model, torch.float32):
        run_benchmarks(examinee, config.evaluation.benchmarks, weights_context=weights.cached_if_small)
    linears = linear_layers(architecture)
    assert linears is not None
    predicted = evaluation.evaluation_bytes(config, architecture, linears, 4)
    assert 0.9 * counter.peak < predicted < 1.5 * counter.peak  # rows are shorter than they may be


def test_expanded_weights_count_up_to_the_limit_and_only_above_training() -> None:
    assert evaluation.DENSE_LIMIT_BYTES == weights.DENSE_LIMIT_BYTES
    # 106 million weights in float32 are more than what training keeps of one short row, and less than of many
    config = composed_once("model=smollm2_135m", "trainer.device=cpu")
    short, long = (plan_memory(config, Shape(rows, 128)) for rows in (1, 32))
    assert short.evaluation > 300e6 and long.evaluation == 0
    assert short.total == short.training + short.evaluation
