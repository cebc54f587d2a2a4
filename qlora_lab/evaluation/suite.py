"""The evaluation of a run: every evaluator over every held-out set, one record a row.

An evaluator is a function from a model and one set of held-out rows to metrics, fields of the rows' records
and generations. EVALUATORS names those that exist; a new one is a function and an entry there.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.schema import CLASSIFICATION, HELD_OUT, EvaluationConfig
from qlora_lab.data.tokenization import EvalExample
from qlora_lab.errors import ConfigError, unknown_name
from qlora_lab.evaluation.classify import classify
from qlora_lab.evaluation.generate import Generation, exact_match, generate
from qlora_lab.evaluation.target_loss import aggregate, score
from qlora_lab.models.tasks import task_of

COUNTS = ("rows", "target_tokens")  # added up over sets, where other metrics are averaged


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: EvaluationConfig
    exact_match: bool  # whether a row's target is the only right answer in this set
    loss_chunk_tokens: int


@dataclass
class SetScores:
    """What an evaluator finds out about one set; `rows` is empty or has one mapping per row."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    generations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class EvaluationOutcome:
    """Metrics named `eval/...`, the lines of rows.jsonl, and the lines of the generations file."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    generations: list[dict[str, Any]]


Evaluator = Callable[[Subject, Sequence[EvalExample]], SetScores]


def target_loss(subject: Subject, rows: Sequence[EvalExample]) -> SetScores:
    """Score the targets: nats a token, and bits a byte of their text."""
    scores = score(
        subject.model,
        rows,
        pad_id=subject.tokenizer.pad_token_id,
        batch_tokens=subject.config.batch_tokens,
        chunk_tokens=subject.loss_chunk_tokens,
        device=subject.model.device,
    )
    return SetScores(
        aggregate(scores),
        rows=[
            {"loss_sum": row.loss_sum, "target_tokens": row.target_tokens, "target_bytes": row.target_bytes}
            for row in scores
        ],
    )


def generation(subject: Subject, rows: Sequence[EvalExample]) -> SetScores:
    """Let the model answer: every row where exact match is defined, else the first few as samples.

    A classifier answers with the name of a class, so that exact match is its accuracy.
    """
    asked = rows if subject.exact_match else rows[: subject.config.sample_generations]
    written = _classes(subject, asked) if task_of(subject.model) == CLASSIFICATION else _texts(subject, asked)
    matches: list[bool | None] = [None] * len(rows)
    records = []
    for number, (row, answer) in enumerate(zip(asked, written, strict=True)):
        if subject.exact_match:
            matches[number] = exact_match(answer.text, row.target)
        records.append(
            {
                "key": row.example.key,
                "prompt": row.prompt,
                "target": row.target,
                "generation": answer.text,
                "stop_reason": answer.stop_reason,
                "exact_match": matches[number],
            }
        )
    right = sum(match is True for match in matches)
    metrics = {"exact_match": right / len(rows) if rows else math.nan} if subject.exact_match else {}
    return SetScores(metrics, rows=[{"exact_match": match} for match in matches], generations=records)


def _texts(subject: Subject, rows: Sequence[EvalExample]) -> list[Generation]:
    return generate(
        subject.model,
        subject.tokenizer,
        [row.prompt_ids for row in rows],
        max_new_tokens=subject.config.max_new_tokens,
        batch_tokens=subject.config.batch_tokens,
        device=subject.model.device,
    )


def _classes(subject: Subject, rows: Sequence[EvalExample]) -> list[Generation]:
    names = classify(
        subject.model,
        [row.prompt_ids for row in rows],
        pad_id=subject.tokenizer.pad_token_id,
        batch_tokens=subject.config.batch_tokens,
        device=subject.model.device,
    )
    return [Generation([], name, "class") for name in names]


EVALUATORS: dict[str, Evaluator] = {"target_loss": target_loss, "generation": generation}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[EvalExample]],
    config: EvaluationConfig,
    *,
    exact_match_sets: Collection[str],
    loss_chunk_tokens: int,
    evaluators: Sequence[str] = tuple(EVALUATORS),
    weights_context: Callable[[torch.nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> EvaluationOutcome:
    """Evaluate a model on held-out rows, on the device where it is.

    One set named "held_out" gives `eval/loss` and its like. Other sets give `eval/<set>/loss` each, and
    `eval/loss` is then the unweighted mean over sets: a set counts the same however many rows it has. (Counts
    of rows and target tokens are added up.) Exact match is a share of rows, from 0 to 1.

    Args:
        held_out: rows by the name of their set.
        config: batch_tokens, max_new_tokens and sample_generations are read.
        exact_match_sets: names of the sets whose targets are the only right answers; all their rows are answered.
        loss_chunk_tokens: rows of logits in memory at once.
        evaluators: names from EVALUATORS.
        weights_context: entered around the evaluation with the model; a place to keep expanded weights, or to set
            the dtype of the products.

    Raises:
        ConfigError: there is no evaluator of a given name.
    """
    for name in evaluators:
        if name not in EVALUATORS:
            raise ConfigError(unknown_name("evaluators", name, EVALUATORS))
    subjects = {
        name: Subject(model, tokenizer, config, name in exact_match_sets, loss_chunk_tokens) for name in held_out
    }
    was_training = model.training
    model.eval()
    try:
        with weights_context(model):
            scores = {
                set_name: [EVALUATORS[name](subjects[set_name], rows) for name in evaluators]
                for set_name, rows in held_out.items()
            }
    finally:
        model.train(was_training)
    return EvaluationOutcome(
        metrics=_metrics({name: _merge(found) for name, found in scores.items()}),
        rows=[record for name, rows in held_out.items() for record in _row_records(name, rows, scores[name])],
        generations=[
            {"set": name, **record} for name in held_out for found in scores[name] for record in found.generations
        ],
    )


def _merge(scores: Sequence[SetScores]) -> dict[str, float]:
    return {name: value for found in scores for name, value in found.metrics.items()}


def _metrics(sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Name the metrics of each set, and sum them up over sets."""
    metrics: dict[str, float] = {}
    for name in {name: None for found in sets.values() for name in found}:
        values = [found[name] for found in sets.values() if name in found]
        metrics[f"eval/{name}"] = sum(values) if name in COUNTS else sum(values) / len(values)
    if list(sets) != [HELD_OUT]:
        for set_name, found in sets.items():
            metrics.update({f"eval/{set_name}/{name}": value for name, value in found.items()})
    return metrics


def _row_records(set_name: str, rows: Sequence[EvalExample], scores: Sequence[SetScores]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [
        {"set": set_name, "key": row.example.key, "family": row.example.family, "exact_match": None} for row in rows
    ]
    for found in scores:
        if found.rows:
            for record, fields in zip(records, found.rows, strict=True):
                record.update(fields)
    return records
