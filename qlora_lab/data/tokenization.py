"""Rows become examples: prompt and target in tokens, each within its own limit, eos always last."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION
from qlora_lab.data.prompts import PromptFormat, data_ids
from qlora_lab.data.report import SetReport
from qlora_lab.data.rows import Row
from qlora_lab.errors import DataError, unknown_name

Flags = Sequence[int] | np.ndarray

ROWS_AT_ONCE = 1000  # tokenized in one call
SPLIT_CHARACTER = "\ufffd"  # what tokenizers decode a part of a character to


@dataclass(frozen=True)
class Example:
    """One row in tokens.

    Attributes:
        input_ids: prompt, target and eos; 32-bit integers. For a classifier the target is the class's number.
        target_start: position of the target's first token; at least 1.
        loss_start: first position that is trained on: `target_start`, or 1 for everything (position 0 has
            nothing to be predicted from). Labels go by position: pad may be eos, and eos is learnt.
        key: content of the row (see `Row.key`).
        family: of the row.
        target_bytes: UTF-8 bytes of the target's text that its tokens stand for; eos and classes count none.
        task: of the model the row is for: a causal one reads prompt and target in a row, others apart.
    """

    input_ids: Sequence[int]
    target_start: int
    loss_start: int
    key: str
    family: str | None
    target_bytes: int
    task: str = CAUSAL

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """Tokens of the target, eos among them."""
        return len(self.input_ids) - self.target_start


@dataclass(frozen=True)
class EvalExample:
    """An example to score, and its prompt to generate from."""

    example: Example
    prompt_ids: Sequence[int]
    prompt: str  # as text, not truncated
    target: str  # the right answer, not truncated
    answer_tokens: int  # of the right answer, not truncated, without eos


@dataclass(frozen=True)
class Limits:
    """Tokens a prompt (its markup counted) and a target (its eos counted) may have."""

    max_source_tokens: int
    max_target_tokens: int
    group: str = "data"  # of the configuration, which sets them


WHOLE, CUT, CUT_AWAY, EMPTY = range(4)  # what became of a target; of the last two nothing is left to learn


class Encoded(NamedTuple):
    """One row in tokens, and what was cut to get there."""

    prompt_ids: list[int]
    target_ids: list[int]
    target_bytes: int
    source_cut: bool
    target: int  # WHOLE, CUT, CUT_AWAY or EMPTY


@dataclass(frozen=True)
class Encoder:
    """What turns rows into tokens.

    Attributes:
        prompt_format: what stands around a source.
        tokenizer: of the model.
        limits: in tokens.
        task: of the model.
        labels: the classes, for a classifier.
        set_name: for errors.
    """

    prompt_format: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    task: str
    labels: Sequence[str]
    set_name: str

    def __call__(self, rows: Sequence[Row]) -> Iterator[Encoded]:
        """Encode rows, a thousand at a time.

        Raises:
            DataError: no room for a source beside the markup, or a target that is no class.
        """
        for chunk in chunks(rows):
            sources = data_ids([row.source for row in chunk], self.tokenizer)
            targets = data_ids([row.target for row in chunk], self.tokenizer)
            for row, source_ids, target_ids in zip(chunk, sources, targets, strict=True):
                prompt_ids, source_cut = encode_prompt(row, source_ids, self.prompt_format, self.limits)
                if self.task == CLASSIFICATION:
                    number = class_number(row.target, self.labels, self.set_name)
                    yield Encoded(prompt_ids, [number], 0, source_cut, WHOLE)
                    continue
                kept_ids, target_bytes, outcome = encode_target(row.target, target_ids, self.tokenizer, self.limits)
                yield Encoded(prompt_ids, kept_ids, target_bytes, source_cut, outcome)


def encode_rows(
    rows: Sequence[Row],
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    loss_on: str,
    set_name: str,
    counts: SetReport,
    task: str = CAUSAL,
    labels: Sequence[str] = (),
) -> list[tuple[Row, Example]]:
    """Tokenize rows; those whose target comes to nothing are dropped and counted.

    A conversation that is too long loses its oldest turns. A source that is too long loses its middle: its
    beginning holds the instruction, its end the question of a prompt with worked examples. A target that is too
    long loses its end, never its eos.

    Args:
        rows: rows to encode.
        prompt_format: what stands around a source.
        tokenizer: of the model.
        limits: in tokens.
        loss_on: "target" or "everything".
        set_name: for the error.
        counts: receives truncations, drops and lengths.
        task: of the model.
        labels: the classes, for a classifier.

    Raises:
        DataError: no room for a source beside the markup, a target that is no class, or no row is left.
    """
    encoder = Encoder(prompt_format, tokenizer, limits, task, labels, set_name)
    found = list(encoder(rows))
    count_cuts(counts, [each.source_cut for each in found], [each.target for each in found])
    encoded = [
        (row, to_example(row.key, row.family, each, loss_on, task))
        for row, each in zip(rows, found, strict=True)
        if each.target in (WHOLE, CUT)
    ]
    if not encoded:
        raise DataError(nothing_encoded(set_name, len(rows), limits, counts))
    count_lengths([example for _, example in encoded], counts)
    return encoded


def to_example(key: str, family: str | None, found: Encoded, loss_on: str, task: str) -> Example:
    """Return an encoded row as an example to train on."""
    return Example(
        input_ids=array("i", [*found.prompt_ids, *found.target_ids]),
        target_start=len(found.prompt_ids),
        loss_start=len(found.prompt_ids) if loss_on == "target" else 1,
        key=key,
        family=family,
        target_bytes=found.target_bytes,
        task=task,
    )


def count_cuts(counts: SetReport, sources_cut: Flags, targets: Flags) -> None:
    """Add what became of rows to the counts of their set."""
    outcomes = np.asarray(targets)
    counts.sources_truncated += int(np.count_nonzero(sources_cut))
    counts.targets_truncated += int(np.count_nonzero(outcomes == CUT))
    counts.targets_truncated_away += int(np.count_nonzero(outcomes == CUT_AWAY))
    counts.empty_targets += int(np.count_nonzero(outcomes == EMPTY))


def chunks(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def encode_prompt(
    row: Row, source_ids: list[int], prompt_format: PromptFormat, limits: Limits
) -> tuple[list[int], bool]:
    """Return the prompt's tokens, at most max_source_tokens of them, the markup whole, and whether some were cut."""
    if not row.source.strip():
        return prompt_format.ids(row.source, []), False
    prompt_format = prompt_format.following(row.history, limits.max_source_tokens - len(source_ids))
    room = limits.max_source_tokens - prompt_format.overhead_tokens
    if room < 1:
        raise DataError(
            f"{limits.group}.max_source_tokens is {limits.max_source_tokens}, which leaves no room for a source: "
            f"prompt format '{prompt_format.name}' takes {prompt_format.overhead_tokens} tokens itself; try "
            f"{limits.group}.max_source_tokens={prompt_format.overhead_tokens + 64}"
        )
    too_long = len(source_ids) > room
    kept_ids = without_middle(source_ids, room) if too_long else source_ids
    return prompt_format.ids(row.source, kept_ids), too_long or prompt_format.turns_left_out > 0


def class_number(target: str, labels: Sequence[str], set_name: str) -> int:
    """Return the place of a target among the classes."""
    name = target.strip()
    if name not in labels:
        raise DataError(f"a row of {set_name} has a target that is no class: {unknown_name('it', name[:80], labels)}")
    return labels.index(name)


def without_middle(ids: list[int], room: int) -> list[int]:
    """Keep `room` tokens: the first half of them from the beginning, the rest from the end."""
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def encode_target(
    text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> tuple[list[int], int, int]:
    """Return the target's tokens with eos, the bytes of its text, and what became of it; none of a lost target."""
    room = limits.max_target_tokens - 1
    eos_id: int = tokenizer.eos_token_id
    if not text.strip() or not ids:
        return [], 0, EMPTY
    if len(ids) <= room:
        return [*ids, eos_id], len(text.encode()), WHOLE
    kept_ids, kept = whole_characters(text, ids, room, tokenizer)
    if not kept.strip():
        return [], 0, CUT_AWAY
    return [*kept_ids, eos_id], len(kept.encode()), CUT


def whole_characters(text: str, ids: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Return the first `room` tokens less those of a character that the cut splits, and the text they stand for.

    Half a character has no text, so its tokens would be scored without a byte to count them by; and nobody
    wants it learnt.
    """

    def decoded(length: int) -> str:
        return str(tokenizer.decode(ids[:length], clean_up_tokenization_spaces=False))

    for length in range(room, 0, -1):
        kept = decoded(length)
        # Some tokenizers decode part of a character to nothing, others to a mark. A text may hold that mark itself; at
        # a cut it is left out too, for nothing tells the two apart.
        if not kept.endswith(SPLIT_CHARACTER) and kept != decoded(length - 1):
            return ids[:length], kept
    return [], ""


def nothing_encoded(set_name: str, rows: int, limits: Limits, counts: SetReport) -> str:
    return (
        f"no row of {set_name} has a target left to learn: of {rows} rows {counts.empty_targets} have an empty "
        f"target and {counts.targets_truncated_away} one truncated away at {limits.group}.max_target_tokens="
        f"{limits.max_target_tokens} (eos takes one); raise it, or check data.source.template"
    )


def count_lengths(examples: Sequence[Example], counts: SetReport) -> None:
    lengths = [example.length for example in examples]
    counts.rows = len(lengths)
    counts.tokens = sum(lengths)
    counts.target_tokens = sum(example.target_tokens for example in examples)
    counts.longest_row_tokens = max(lengths)
