import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qlora_lab.config.schema import EvaluationConfig
from qlora_lab.data.tokenization import EvalExample
from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.suite import EvaluationOutcome, evaluate


def run(
    model: Any, tokenizer: Any, held_out: Any, *, exact_match: Any = ("held_out", "chat", "tasks"), **options: Any
) -> EvaluationOutcome:
    config = EvaluationConfig(batch_tokens=100, max_new_tokens=5, sample_generations=2)
    return evaluate(model, tokenizer, held_out, config, exact_match_sets=exact_match, loss_chunk_tokens=16, **options)


def with_right_answers(model: Any, tokenizer: Any, rows: list[EvalExample], right: int) -> list[EvalExample]:
    """Make what the model says the target of the first rows."""
    said = run(model, tokenizer, {"held_out": rows}).generations
    return [
        dataclasses.replace(row, target=record["generation"] + "\n") if number < right else row
        for number, (row, record) in enumerate(zip(rows, said, strict=True))
    ]


def test_one_set_gives_plain_names_and_a_record_a_row(model: Any, tokenizer: Any, make_rows: Any) -> None:
    rows = with_right_answers(model, tokenizer, make_rows(8), right=3)
    outcome = run(model, tokenizer, {"held_out": rows})
    assert set(outcome.metrics) == {
        "eval/loss",
        "eval/bits_per_byte",
        "eval/exact_match",
        "eval/rows",
        "eval/target_tokens",
    }
    assert outcome.metrics["eval/exact_match"] == 3 / 8
    assert [record["key"] for record in outcome.rows] == [row.example.key for row in rows]
    assert set(outcome.rows[0]) == {
        "set",
        "key",
        "family",
        "loss_sum",
        "target_tokens",
        "target_bytes",
        "exact_match",
    }
    assert [record["exact_match"] for record in outcome.rows] == [True] * 3 + [False] * 5
    assert [record["family"] for record in outcome.rows] == ["even", None] * 4
    loss = sum(record["loss_sum"] for record in outcome.rows) / sum(row["target_tokens"] for row in outcome.rows)
    assert outcome.metrics["eval/loss"] == pytest.approx(loss)
    first = outcome.generations[0]
    assert set(first) == {"set", "key", "prompt", "target", "generation", "stop_reason", "exact_match"}
    assert (first["set"], first["prompt"], first["exact_match"]) == ("held_out", rows[0].prompt, True)
    assert len(outcome.generations) == 8


def test_several_sets_are_averaged_set_by_set(model: Any, tokenizer: Any, make_rows: Any) -> None:
    small, large = make_rows(3, seed=1), make_rows(12, seed=2)
    outcome = run(model, tokenizer, {"chat": small, "tasks": large})
    metrics = outcome.metrics
    alone = {
        name: run(model, tokenizer, {"held_out": rows}).metrics for name, rows in (("chat", small), ("tasks", large))
    }
    for name in ("chat", "tasks"):
        assert metrics[f"eval/{name}/loss"] == pytest.approx(alone[name]["eval/loss"], rel=1e-6)
        assert metrics[f"eval/{name}/exact_match"] == alone[name]["eval/exact_match"]
    assert metrics["eval/loss"] == pytest.approx((metrics["eval/chat/loss"] + metrics["eval/tasks/loss"]) / 2)
    assert metrics["eval/rows"] == 15 and metrics["eval/chat/rows"] == 3
    assert [record["set"] for record in outcome.rows] == ["chat"] * 3 + ["tasks"] * 12


def test_exact_match_of_one_set_alone(model: Any, tokenizer: Any, make_rows: Any) -> None:
    held_out = {"chat": make_rows(6, seed=1), "sums": make_rows(4, seed=2)}
    outcome = run(model, tokenizer, held_out, exact_match=["sums"])
    assert "eval/sums/exact_match" in outcome.metrics and "eval/chat/exact_match" not in outcome.metrics
    assert outcome.metrics["eval/exact_match"] == outcome.metrics["eval/sums/exact_match"]
    assert [record["set"] for record in outcome.generations] == ["chat"] * 2 + ["sums"] * 4


def test_a_single_set_of_its_own_name_has_both_names(model: Any, tokenizer: Any, make_rows: Any) -> None:
    metrics = run(model, tokenizer, {"chat": make_rows(3)}).metrics
    assert metrics["eval/loss"] == metrics["eval/chat/loss"]


def test_samples_are_saved_where_no_exact_match_is_defined(model: Any, tokenizer: Any, make_rows: Any) -> None:
    rows = make_rows(6)
    outcome = run(model, tokenizer, {"held_out": rows}, exact_match=())
    assert "eval/exact_match" not in outcome.metrics
    assert [record["key"] for record in outcome.generations] == [row.example.key for row in rows[:2]]
    assert all(record["exact_match"] is None for record in [*outcome.rows, *outcome.generations])


def test_the_model_is_evaluated_without_dropout_and_left_as_it_was(model: Any, tokenizer: Any, make_rows: Any) -> None:
    held_out = {"held_out": make_rows(4)}
    expected = run(model, tokenizer, held_out)
    model.train()
    assert run(model, tokenizer, held_out) == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_may_be_kept_expanded_around_the_evaluation(model: Any, tokenizer: Any, make_rows: Any) -> None:
    seen = []

    @contextmanager
    def expanded(module: Any) -> Iterator[None]:
        handle = module.model.register_forward_hook(lambda *_: seen.append("forward"))
        yield
        handle.remove()
        seen.append("end")

    run(model, tokenizer, {"held_out": make_rows(4)}, weights_context=expanded)
    assert "forward" in seen and seen[-1] == "end"


def test_evaluators_are_chosen_by_name(model: Any, tokenizer: Any, make_rows: Any) -> None:
    outcome = run(model, tokenizer, {"held_out": make_rows(4)}, evaluators=["target_loss"])
    assert not outcome.generations and "eval/exact_match" not in outcome.metrics
    assert outcome.rows[0]["exact_match"] is None and outcome.rows[0]["loss_sum"] > 0
    with pytest.raises(ConfigError, match="did you mean 'target_loss'"):
        run(model, tokenizer, {"held_out": make_rows(4)}, evaluators=["target_los"])


def test_an_empty_set_has_missing_metrics(model: Any, tokenizer: Any) -> None:
    metrics = run(model, tokenizer, {"held_out": []}).metrics
    assert math.isnan(metrics["eval/loss"]) and math.isnan(metrics["eval/exact_match"])
