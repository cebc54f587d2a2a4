"""Answers in words: rows of source and target put as in training, and what the model writes to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qlora_lab.config.schema import CLASSIFICATION, BenchmarkConfig
from qlora_lab.data.prompts import data_ids, find_prompt_format
from qlora_lab.data.rows import Row
from qlora_lab.data.tokenization import Limits, encode_prompt
from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.likelihood import Advance
from qlora_lab.evaluation.classify import classify
from qlora_lab.evaluation.generate import Generation, generate, prompt_room
from qlora_lab.evaluation.prompt_sets import turn_ends
from qlora_lab.models.tasks import task_of


def first_row(to_rows: Callable[[Mapping[str, Any]], Sequence[Row]], columns: Mapping[str, Any]) -> Row | None:
    """Return the row that a template makes of a record, which is one at most here."""
    return next(iter(to_rows(columns)), None)


def prompts_of(examinee: Examinee, config: BenchmarkConfig, place: str, rows: Mapping[int, Row]) -> list[Sequence[int]]:
    """Return the tokens of the rows' sources in the examinee's format.

    Args:
        place: where the benchmark is configured, for errors.
        rows: by their numbers in the set.

    Raises:
        DataError: a source is longer than max_source_tokens, or does not fit the model's context with its answer.
    """
    formatted = find_prompt_format(examinee.prompt_format, examinee.tokenizer)
    context = prompt_room(task_of(examinee.model), examinee.max_length_tokens, config.max_new_tokens)
    room = min(config.max_source_tokens, context)
    sources = data_ids([row.source for row in rows.values()], examinee.tokenizer)
    prompts: list[Sequence[int]] = []
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


def written_answers(
    examinee: Examinee, config: BenchmarkConfig, prompts: Sequence[Sequence[int]], advance: Advance
) -> list[Generation]:
    """Let the model answer every prompt, greedily until it ends its turn; a classifier with the name of a class."""
    if task_of(examinee.model) == CLASSIFICATION:
        names = classify(
            examinee.model,
            prompts,
            pad_id=examinee.pad_id,
            batch_tokens=examinee.batch_tokens,
            device=examinee.device,
            advance=advance,
        )
        return [Generation([], name, "class") for name in names]
    return generate(
        examinee.model,
        examinee.tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        batch_tokens=examinee.batch_tokens,
        device=examinee.device,
        stops=turn_ends(examinee.prompt_format, examinee.tokenizer),
        advance=advance,
    )
