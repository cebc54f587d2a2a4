"""A run's data from its configuration: training examples, evaluation sets and a count of everything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, HELD_OUT, DataConfig, EvaluationConfig, SourceConfig
from qlora_lab.data.held_out import (
    check_disjoint,
    choose_evaluation_rows,
    draw_training_rows,
    question_sets,
    remove_overlap,
)
from qlora_lab.data.noise import put_in_wrong_answers
from qlora_lab.data.procedural import procedural_rows
from qlora_lab.data.prompts import PromptFormat, data_ids, find_prompt_format
from qlora_lab.data.report import DataReport, SetReport
from qlora_lab.data.rows import Row
from qlora_lab.data.sources import load_rows
from qlora_lab.data.tokenization import EvalExample, Example, Limits, encode_rows
from qlora_lab.errors import ConfigError, DataError


@dataclass(frozen=True)
class PreparedData:
    train: list[Example]
    held_out: dict[str, list[EvalExample]]
    exact_match_sets: frozenset[str]  # held-out sets whose targets are the only right answers
    report: DataReport


@dataclass(frozen=True)
class Folders:
    cache_dir: Path
    data_dir: Path


def prepare_data(
    data: DataConfig,
    evaluation: EvaluationConfig,
    *,
    prompt_format: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    data_dir: Path,
    task: str = CAUSAL,
) -> PreparedData:
    """Read, hold out, draw, spoil and tokenize the data of one run.

    Evaluation rows depend on the evaluation's own seed and source; training rows on the run's seed. What
    asks the same as an evaluation row is kept out of training, and this is checked on the result.

    Args:
        data: the training set, with its token limits.
        evaluation: rows to hold out, or sets of their own, with token limits of their own.
        prompt_format: name of a format of `prompts`.
        tokenizer: of the model.
        seed: of the run.
        cache_dir: where fetched wheels lie.
        data_dir: where relative paths are looked up first.
        task: of the model.

    Raises:
        DataError: a source is missing, broken, empty or too small, or no target survives its limit.
        ConfigError: an unknown template, family or prompt format; or evaluation.max_new_tokens is too small for
            an answer that has to be matched exactly.
        ModelError: the tokenizer does not fit the prompt format.
    """
    folders = Folders(cache_dir, data_dir)
    report = DataReport()
    formatted = find_prompt_format(prompt_format, tokenizer)
    pool = load_pool(data.source, folders, report.train)
    held_out = choose_held_out(data.source, evaluation, pool, folders, report)
    rows = training_rows(data, pool, held_out, seed, report)
    check_disjoint(rows, held_out)
    limits = Limits(data.max_source_tokens, data.max_target_tokens)
    encode = partial(encode_rows, prompt_format=formatted, tokenizer=tokenizer, task=task, labels=data.labels)
    train = encode(rows, limits=limits, loss_on=data.loss_on, set_name=data.name, counts=report.train)
    evaluation_limits = Limits(evaluation.max_source_tokens, evaluation.max_target_tokens, group="evaluation")
    encoded = {
        name: evaluation_examples(
            # always scored on the target, whatever training's loss is on
            encode(chosen, limits=evaluation_limits, loss_on="target", set_name=name, counts=report.held_out[name]),
            formatted,
            tokenizer,
        )
        for name, chosen in held_out.items()
    }
    exact = {name for name, chosen in evaluation.sets.items() if chosen.exact_match}
    if not evaluation.sets and data.exact_match:
        exact = {HELD_OUT}
    for name in exact:
        check_answers_fit(name, encoded[name], evaluation.max_new_tokens)
    return PreparedData(
        train=[example for _, example in train],
        held_out=encoded,
        exact_match_sets=frozenset(exact),
        report=report,
    )


def check_answers_fit(name: str, rows: Sequence[EvalExample], max_new_tokens: int) -> None:
    """Refuse a set that asks for exact answers longer than what the model may write.

    Raises:
        ConfigError: the longest answer does not fit.
    """
    longest = max(row.answer_tokens for row in rows)
    if longest > max_new_tokens:
        raise ConfigError(
            f"evaluation.max_new_tokens must be at least {longest}, the tokens of the longest exact answer in "
            f"'{name}'; got {max_new_tokens}; raise it, or turn exact_match off for this set"
        )


def load_pool(source: SourceConfig, folders: Folders, counts: SetReport) -> list[Row] | None:
    """Return all rows of a source; None for procedural rows, of which there is no end."""
    if source.kind == "procedural":
        return None
    return load_rows(source, cache_dir=folders.cache_dir, data_dir=folders.data_dir, counts=counts)


def choose_held_out(
    own_source: SourceConfig,
    evaluation: EvaluationConfig,
    own_pool: Sequence[Row] | None,
    folders: Folders,
    report: DataReport,
) -> dict[str, list[Row]]:
    """Choose the rows of every evaluation set; of the run's own source where none is configured."""
    if not evaluation.sets:
        report.held_out[HELD_OUT] = SetReport()
        return {HELD_OUT: evaluation_rows(own_source, own_pool, evaluation, HELD_OUT)}
    held_out: dict[str, list[Row]] = {}
    for name, source in evaluation.sets.items():
        report.held_out[name] = SetReport()
        pool = load_pool(source, folders, report.held_out[name])
        held_out[name] = evaluation_rows(source, pool, evaluation, name)
    return held_out


def evaluation_rows(
    source: SourceConfig, pool: Sequence[Row] | None, evaluation: EvaluationConfig, name: str
) -> list[Row]:
    if pool is not None:
        return choose_evaluation_rows(pool, evaluation.rows, evaluation.seed, name)
    return procedural_rows(
        evaluation.rows, seed=evaluation.seed, role="evaluation", families=source.families, distinct=True
    )


def training_rows(
    data: DataConfig,
    pool: Sequence[Row] | None,
    held_out: Mapping[str, Sequence[Row]],
    seed: int,
    report: DataReport,
) -> list[Row]:
    """Return the run's training rows: none that overlaps evaluation, the wrong answers put in."""
    if pool is None:
        rows = procedural_training_rows(data, held_out, seed)
    else:
        kept, removed = remove_overlap(pool, held_out)
        report.overlap_removed = beyond_held_out(removed, held_out)
        if not kept:
            raise DataError(
                f"data set '{data.name}' has no row left to train on: all {len(pool)} ask what evaluation rows "
                "ask; try a smaller evaluation.rows"
            )
        rows = draw_training_rows(kept, data.rows, seed)
    noisy = put_in_wrong_answers(rows, data.wrong_answer_share, seed)
    report.wrong_answers = noisy.wrong
    report.wrong_answers_impossible = noisy.impossible
    return noisy.rows


def procedural_training_rows(data: DataConfig, held_out: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
    assert data.rows is not None  # DataConfig refuses that
    return procedural_rows(
        data.rows,
        seed=seed,
        role="training",
        families=data.source.families,
        exclude=question_sets(held_out).keys(),
    )


def beyond_held_out(removed: Mapping[str, int], held_out: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Of the rows removed, those that are not themselves the run's held-out rows."""
    return {name: count - (len(held_out[name]) if name == HELD_OUT else 0) for name, count in removed.items()}


def evaluation_examples(
    encoded: Sequence[tuple[Row, Example]], prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase
) -> list[EvalExample]:
    """Put beside each example its prompt and its right answer."""
    answers = data_ids([row.target for row, _ in encoded], tokenizer)
    return [
        EvalExample(
            example=example,
            prompt_ids=example.input_ids[: example.target_start],
            prompt=prompt_format.following(row.history).text(row.source),
            target=row.target,
            answer_tokens=len(answer) if example.task != CLASSIFICATION else 1,
        )
        for (row, example), answer in zip(encoded, answers, strict=True)
    ]
