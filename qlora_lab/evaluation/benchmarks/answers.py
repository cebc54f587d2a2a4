"""Answers in words: rows of source and target put as in training, and what the model writes to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_lab.config.schema import CLASSIFICATION, BenchmarkConfig
from qlora_lab.data.prompts import data_ids, find_prompt_format
from qlora_lab.data.rows import Row
from qlora_lab.data.tokenization import Limits, encode_prompt
from qlora_lab.errors import DataError
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.items import read_items
from qlora_lab.evaluation.benchmarks.likelihood import Advance
from qlora_lab.evaluation.classify import classify
from qlora_lab.evaluation.generate import Generation, generate
from qlora_lab.models.tasks import task_of


def read_rows(
    examinee: Examinee,
    config: BenchmarkConfig,
    place: str,
    to_rows: Callable[[Mapping[str, Any]], Sequence[Row]],
) -> list[Row]:
    """Read the rows that a template gives, one a record at most."""

    def row(columns: Mapping[str, Any]) -> Row | None:
        return next(iter(to_rows(columns)), None)

    return read_items(config, row, place=place, cache_dir=examinee.cache_dir, data_dir=examinee.data_dir)


def written_answers(
    examinee: Examinee,
    config: BenchmarkConfig,
    place: str,
    rows: Mapping[int, Row],
    progress: Callable[[int], Advance],
) -> list[Generation]:
    """Let the model answer the source of every row, greedily; a classifier with the name of a class.

    Raises:
        DataError: a source is longer than max_source_tokens, or does not fit the model's context with its answer.
    """
    prompts = _prompts(examinee, config, place, rows)
    advance = progress(len(prompts))
    answers: list[Generation | None] = [None] * len(prompts)
    # a few batches at a time, so that it can be seen how far it is
    for batch in budget_batches([len(prompt) + config.max_new_tokens for prompt in prompts], examinee.batch_tokens):
        for number, answer in zip(batch, _answers(examinee, config, [prompts[n] for n in batch]), strict=True):
            answers[number] = answer
        advance(len(batch))
    return [answer for answer in answers if answer is not None]


def _answers(examinee: Examinee, config: BenchmarkConfig, prompts: Sequence[list[int]]) -> list[Generation]:
    if task_of(examinee.model) == CLASSIFICATION:
        names = classify(
            examinee.model,
            prompts,
            pad_id=examinee.pad_id,
            batch_tokens=examinee.batch_tokens,
            device=examinee.device,
        )
        return [Generation([], name, "class") for name in names]
    return generate(
        examinee.model,
        examinee.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_tokens=examinee.batch_tokens,
        device=examinee.device,
    )


def _prompts(examinee: Examinee, config: BenchmarkConfig, place: str, rows: Mapping[int, Row]) -> list[list[int]]:
    formatted = find_prompt_format(examinee.prompt_format, examinee.tokenizer)
    writes = 0 if task_of(examinee.model) == CLASSIFICATION else config.max_new_tokens
    room = min(config.max_source_tokens, examinee.max_length_tokens - writes)
    sources = data_ids([row.source for row in rows.values()], examinee.tokenizer)
    prompts = []
    for (number, row), source_ids in zip(rows.items(), sources, strict=True):
        prompt_ids, cut = encode_prompt(row, source_ids, formatted, Limits(room, config.max_new_tokens, group=place))
        if cut:
            raise DataError(
                f"the prompt of item {number + 1} of {place} has {len(source_ids):,} tokens and does not fit in "
                f"{room:,} ({place}.max_source_tokens, and model.max_length_tokens less {place}.max_new_tokens); items "
                "are never cut: raise the limits, or leave the item out"
            )
        prompts.append(prompt_ids)
    return prompts
