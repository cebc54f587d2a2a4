"""Encoder-decoders and classifiers go through the same run as causal models, and so do new tokens."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_lab import run
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.errors import ConfigError
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.helpers import composed

LAPTOP = Hardware("some CPU", frozenset(), 2, ())
SMALL = [
    *("model.source=random", "model.tokenizer=byte_level", "model.architecture.vocab_size=384"),
    *("model.architecture.hidden_size=32", "model.architecture.num_layers=2", "model.architecture.num_heads=2"),
    *("model.architecture.num_kv_heads=2", "model.architecture.feed_forward_size=64", "adapter.rank=4"),
]
RUN = ["trainer.batch_size=8", "optim.learning_rate=0.02", "trainer.device=cpu", "tracking=none", "evaluation.rows=16"]
Execute = Callable[..., dict[str, Any]]


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """Execute a run and return its result, with the folder's content where that is asked for."""

    def go(*overrides: str) -> dict[str, Any]:
        paths = f"paths.runs_dir={tmp_path}", f"paths.cache_dir={tmp_path}/cache"
        config = resolve(composed(*SMALL, *RUN, *paths, *overrides), LAPTOP, lambda source: None)
        config = replace(config, trainer=replace(config.trainer, threads=1))
        folder = RunFolder.create(tmp_path, run_id(config), config)
        state = run.execute(folder.path)
        status = folder.status()
        assert state == FINISHED, status
        losses = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
        return {**folder.result(), "folder": folder.path, "history": losses}

    return go


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Rows whose class is their first word."""
    rows = [
        {"input": f"{word} film number {number}", "output": label}
        for number in range(40)
        for word, label in (("fine", "positive"), ("poor", "negative"))
    ]
    file = tmp_path / "reviews.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def generations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "generations" / "held_out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_encoder_decoder_learns_and_answers(execute: Execute, checkpointing: bool) -> None:
    result = execute(
        *("model=flan_t5_small", "model.architecture.head_size=16", "data.rows=32", "trainer.max_steps=6"),
        *("evaluation.max_new_tokens=24", "data.source.families=[largest_number]"),
        f"trainer.gradient_checkpointing={checkpointing}",
    )
    training = [line["train/loss"] for line in result["history"] if "train/loss" in line]
    assert training[-1] < 0.8 * training[0]
    metrics = result["metrics"]
    assert metrics["eval/loss"] < training[0] and metrics["eval/bits_per_byte"] > 0
    assert "eval/exact_match" in metrics
    # two stacks of two layers: 4 + 3 linears in the encoder, 8 + 3 in the decoder, each with lora_A and lora_B
    assert len(load_file(result["folder"] / "adapter" / "adapter_model.safetensors")) == 2 * 2 * 18
    assert len(generations(result["folder"])) == 16


def test_a_classifier_learns_its_labels(execute: Execute, reviews: Path) -> None:
    result = execute(
        *("model=roberta_base", "data=file", f"data.source.path={reviews}", "data.source.template=input_output"),
        *("data.labels=[negative,positive]", "trainer.max_steps=30", "evaluation.rows=20"),
        *("data.max_source_tokens=64", "data.max_target_tokens=8"),
    )
    metrics = result["metrics"]
    assert metrics["eval/exact_match"] == 1.0  # the accuracy
    assert metrics["eval/loss"] < 0.3 and metrics["eval/target_tokens"] == 20
    assert {row["generation"] for row in generations(result["folder"])} == {"negative", "positive"}
    adapter = json.loads((result["folder"] / "adapter" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    # the head is saved with the adapters, and is not quantized
    weights = load_file(result["folder"] / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.classifier.out_proj.weight"].shape == (2, 32)
    assert result["quantized_parameters"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)


def test_new_tokens_are_trained_where_it_is_asked_for(execute: Execute) -> None:
    overrides = [
        *("model=smollm2_360m", "model.prompt_format=plain", "model.architecture.tie_embeddings=true"),
        *("model.new_tokens=['<tool>']", "data.rows=16", "trainer.max_steps=2", "evaluation.max_new_tokens=32"),
        "model.max_length_tokens=512",
    ]
    frozen, trained = execute(*overrides), execute(*overrides, "adapter.trained_modules=[embed_tokens]")
    assert frozen["trainable_parameters"] + 385 * 32 == trained["trainable_parameters"]
    saved = load_file(trained["folder"] / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.model.embed_tokens.weight"].shape == (385, 32)


def test_data_that_is_chat_gets_the_chat_format(execute: Execute) -> None:
    overrides = ["model=tiny_random", "data.rows=16", "trainer.max_steps=1", "evaluation.max_new_tokens=32"]
    plain, chat = execute(*overrides), execute(*overrides, "data.prompt_format=chatml")
    assert not generations(plain["folder"])[0]["prompt"].startswith("<|im_start|>")
    assert generations(chat["folder"])[0]["prompt"].startswith("<|im_start|>user\n")


def test_a_target_that_is_no_class_fails_the_run_in_one_sentence(tmp_path: Path, reviews: Path) -> None:
    config = composed(
        *(*SMALL, *RUN, f"paths.runs_dir={tmp_path}", f"paths.cache_dir={tmp_path}/cache", "model=roberta_base"),
        *("data=file", f"data.source.path={reviews}", "data.source.template=input_output"),
        "data.labels=[positive,neutral]",
    )
    config = resolve(config, LAPTOP, lambda source: None)
    folder = RunFolder.create(tmp_path, run_id(config), replace(config, trainer=replace(config.trainer, threads=1)))
    assert run.execute(folder.path) == FAILED
    status = folder.status()
    assert status is not None
    message = str(status["error"]["message"])
    assert "has a target that is no class: it must be one of positive, neutral; got 'negative'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=roberta_large"], "data.labels must name the classes when model.task is 'classification'"),
        (["data.labels=[yes]"], "data.labels must name two different classes or more; got ['yes']"),
        (
            ["model=flan_t5_base", "data.loss_on=everything"],
            "data.loss_on must be 'target' when model.task is 'seq2seq'",
        ),
        (["model.task=seq2sec"], "model.task must be one of causal, seq2seq, classification; got 'seq2sec'"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        composed(*overrides)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)
