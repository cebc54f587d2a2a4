"""A run's data from its configuration: training examples, evaluation sets and a count of everything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, HELD_OUT, OWN_PART, DataConfig, EvaluationConfig, RunConfig
from qlora_lab.data.drawn_rows import DrawnRows
from qlora_lab.data.filters import OVERLAP
from qlora_lab.data.held_out import check_disjoint, draw, question_sets
from qlora_lab.data.mixing import rows_of_parts
from qlora_lab.data.noise import put_in_wrong_answers
from qlora_lab.data.pool import Folders, Pool, choose_held_out, write_pool
from qlora_lab.data.procedural import procedural_rows
from qlora_lab.data.prompts import PromptFormat, data_ids, find_prompt_format
from qlora_lab.data.removed import RemovedRows
from qlora_lab.data.report import DataReport
from qlora_lab.data.row_file import keys_of
from qlora_lab.data.rows import Row
from qlora_lab.data.token_cache import at_commits, cached_pool, pool_key
from qlora_lab.data.tokenization import (
    CUT,
    WHOLE,
    Encoded,
    Encoder,
    EvalExample,
    Example,
    Limits,
    count_cuts,
    encode_rows,
    nothing_encoded,
    to_example,
)
from qlora_lab.errors import ConfigError, DataError

SMALL_DRAW = 2000  # rows that every run tokenizes for itself in a second, rather than a whole pool for all


@dataclass(frozen=True)
class PreparedData:
    train: Sequence[Example]
    train_lengths: Sequence[int]  # of the training rows, in tokens
    held_out: dict[str, list[EvalExample]]
    exact_match_sets: frozenset[str]  # held-out sets whose targets are the only right answers
    report: DataReport
    removed: RemovedRows | None = None  # rows of the sources that may not be trained on; None where there are none


def data_of_run(config: RunConfig, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> PreparedData:
    """Prepare the data of a resolved run, as `prepare_data` does."""
    return prepare_data(
        config.data,
        config.evaluation,
        prompt_format=config.data.prompt_format or config.model.prompt_format,
        tokenizer=tokenizer,
        seed=config.seed,
        cache_dir=cache_dir,
        data_dir=Path(config.paths.data_dir),
        task=config.model.task,
    )


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
    """Read, hold out, filter, draw, spoil and tokenize the data of one run.

    Evaluation rows depend on the evaluation's own seed and source; training rows on the run's seed. What
    asks the same as an evaluation row is kept out of training, and this is checked on the result.

    Args:
        data: the training set, with its token limits.
        evaluation: rows to hold out, or sets of their own, with token limits of their own.
        prompt_format: name of a format of `prompts`.
        tokenizer: of the model.
        seed: of the run.
        cache_dir: where fetched wheels lie, and pools of rows in tokens.
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
    encoder = Encoder(
        formatted, tokenizer, Limits(data.max_source_tokens, data.max_target_tokens), task, data.labels, data.name
    )
    removed: RemovedRows | None = None
    if data.source.kind == "procedural":
        held_out = choose_held_out(data.source, evaluation, None, folders, report.held_out)
        rows = procedural_training_rows(data, held_out, seed)
        train: Sequence[Example] = encoded_examples(rows, data, encoder, held_out, seed, report)
        lengths = [example.length for example in train]
    else:
        in_words = data.rows is not None and data.rows <= SMALL_DRAW and not data.filter.drop_truncated
        in_tokens = None if in_words else encoder
        data, evaluation = at_commits(data, evaluation)
        key = pool_key(data, evaluation, in_tokens, data_dir)
        pool = cached_pool(cache_dir, key, lambda folder: write_pool(folder, data, evaluation, in_tokens, folders))
        chosen = pool.chosen
        held_out, removed = chosen.held_out, pool.removed or None
        report.train, report.held_out = chosen.train, chosen.evaluation
        report.overlap_removed = chosen.overlap_removed
        report.filtered = {reason: count for reason, count in chosen.removed.items() if reason != OVERLAP}
        numbers = drawn_numbers(data, pool, seed, report)
        if in_tokens is not None:
            train, lengths = drawn_examples(data, encoder, pool, numbers, seed, report)
        else:
            rows = [pool.row(number) for number in numbers.tolist()]
            train = encoded_examples(rows, data, encoder, held_out, seed, report)
            lengths = [example.length for example in train]
    evaluation_limits = Limits(evaluation.max_source_tokens, evaluation.max_target_tokens, group="evaluation")
    encode = partial(encode_rows, prompt_format=formatted, tokenizer=tokenizer, task=task, labels=data.labels)
    encoded = {
        name: evaluation_examples(
            # always scored on the target, whatever training's loss is on
            encode(rows, limits=evaluation_limits, loss_on="target", set_name=name, counts=report.held_out[name]),
            formatted,
            tokenizer,
        )
        for name, rows in held_out.items()
    }
    exact = {name for name, chosen_set in evaluation.sets.items() if chosen_set.exact_match}
    if not evaluation.sets and data.exact_match:
        exact = {HELD_OUT}
    for name in exact:
        check_answers_fit(name, encoded[name], evaluation.max_new_tokens)
    return PreparedData(train, lengths, encoded, frozenset(exact), report, removed)


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


def procedural_training_rows(data: DataConfig, held_out: Mapping[str, Sequence[Row]], seed: int) -> list[Row]:
    assert data.rows is not None  # DataConfig refuses that
    questions = question_sets(held_out).keys()
    return procedural_rows(data.rows, seed=seed, role="training", families=data.source.families, exclude=questions)


def encoded_examples(
    rows: Sequence[Row],
    data: DataConfig,
    encoder: Encoder,
    held_out: Mapping[str, Sequence[Row]],
    seed: int,
    report: DataReport,
) -> list[Example]:
    """Put wrong answers into rows and encode them."""
    noisy = put_in_wrong_answers(rows, data.wrong_answer_share, seed)
    report.wrong_answers, report.wrong_answers_impossible = noisy.wrong, noisy.impossible
    check_disjoint(keys_of(noisy.rows)[1], held_out)
    encoded = encode_rows(
        noisy.rows,
        encoder.prompt_format,
        encoder.tokenizer,
        encoder.limits,
        loss_on=data.loss_on,
        set_name=encoder.set_name,
        counts=report.train,
        task=encoder.task,
        labels=encoder.labels,
    )
    return [example for _, example in encoded]


def drawn_numbers(data: DataConfig, pool: Pool, seed: int, report: DataReport) -> np.ndarray:
    """Draw the training rows of a pool, of each source its share."""
    weights = {OWN_PART: 1.0, **{name: part.weight for name, part in data.mix.items()}}
    available = {name: len(numbers) for name, numbers in pool.parts.items()}
    counts = rows_of_parts(weights, available, data.rows, data.name)
    if data.mix:
        report.parts = counts
    return np.array(
        [number for name, count in counts.items() for number in draw(pool.parts[name].tolist(), count, seed, name)]
    )


def drawn_examples(
    data: DataConfig, encoder: Encoder, pool: Pool, numbers: np.ndarray, seed: int, report: DataReport
) -> tuple[DrawnRows, list[int]]:
    """Put wrong answers into drawn rows of a pool in tokens, and count; return the rows and their lengths."""
    check_disjoint(pool.source_keys[numbers], pool.chosen.held_out)
    outcomes, cut = pool.targets[numbers], pool.source_cut[numbers]
    lengths = (pool.starts[1:] - pool.starts[:-1])[numbers]
    target_starts = pool.target_starts[numbers]
    replaced: dict[int, Example] = {}
    for place, (row, found) in wrong_answers(data, encoder, pool, numbers, seed, report).items():
        outcomes[place], cut[place] = found.target, found.source_cut
        replaced[place] = example = to_example(row.key, row.family, found, data.loss_on, encoder.task)
        lengths[place], target_starts[place] = example.length, example.target_start
    count_cuts(report.train, cut, outcomes)
    learnt = np.flatnonzero((outcomes == WHOLE) | (outcomes == CUT))
    if not len(learnt):
        raise DataError(nothing_encoded(data.name, len(numbers), encoder.limits, report.train))
    report.train.rows = len(learnt)
    report.train.tokens = int(lengths[learnt].sum())
    report.train.target_tokens = int((lengths - target_starts)[learnt].sum())
    report.train.longest_row_tokens = int(lengths[learnt].max())
    moved = {index: replaced[place] for index, place in enumerate(learnt.tolist()) if place in replaced}
    return DrawnRows(pool, numbers[learnt], moved, data.loss_on, encoder.task), lengths[learnt].tolist()


def wrong_answers(
    data: DataConfig, encoder: Encoder, pool: Pool, numbers: np.ndarray, seed: int, report: DataReport
) -> dict[int, tuple[Row, Encoded]]:
    """Return the rows that get a wrong answer, by their place among the drawn ones; all of these are read for it."""
    if not data.wrong_answer_share:
        return {}
    rows = [pool.row(int(number)) for number in numbers]
    noisy = put_in_wrong_answers(rows, data.wrong_answer_share, seed)
    report.wrong_answers, report.wrong_answers_impossible = noisy.wrong, noisy.impossible
    changed = [place for place, (before, after) in enumerate(zip(rows, noisy.rows, strict=True)) if after is not before]
    spoilt = [noisy.rows[place] for place in changed]
    return dict(zip(changed, zip(spoilt, encoder(spoilt), strict=True), strict=True))


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
