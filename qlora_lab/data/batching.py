"""Which rows form which step, and the tensors of a batch. Pure functions: equal inputs, equal results."""

import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qlora_lab.data.layout import lay_out, token_rows
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import DataError

WINDOW_STEPS = 16  # steps whose rows are sorted by length together


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_size: int,
    max_steps: int | None,
    max_tokens: int | None,
    seed: int,
    group_by_length: bool,
) -> list[list[int]]:
    """Plan every optimizer step of a run: which rows it trains on.

    Each epoch holds every row once, in an order drawn from `seed` and the epoch's number. With
    `group_by_length` the rows of a window of 16 steps are sorted by length and cut into steps, which are
    shuffled again: steps hold rows of like length, the order of short and long steps stays random. Rows
    that do not fill a step are a smaller step at the end of the epoch; they are drawn, not the longest.

    The plan is whole from the start: a resumed run takes up the same list where it stopped, and a plan of
    fewer steps is the beginning of a plan of more.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step.
        max_steps: steps at most; None: no limit.
        max_tokens: stop with the row that reaches this many tokens (padding not counted), which may leave
            the last step with fewer rows; None: no limit.
        seed: of the order.
        group_by_length: put rows of like length into a step.

    Raises:
        DataError: no rows, an empty row, or no limit at all.
    """
    if not lengths or min(lengths) < 1:
        raise DataError(f"a plan needs rows of at least one token; got {len(lengths)} rows")
    if max_steps is None and max_tokens is None:
        raise DataError("trainer.max_steps and trainer.max_train_tokens are both null; set at least one")
    steps: list[list[int]] = []
    tokens_left = max_tokens
    for step in endless_steps(lengths, batch_size, seed, group_by_length):
        if len(steps) == max_steps or (tokens_left is not None and tokens_left <= 0):
            break
        if tokens_left is not None:
            step, tokens_left = within_budget(step, lengths, tokens_left)
        steps.append(step)
    return steps


def endless_steps(lengths: Sequence[int], batch_size: int, seed: int, group_by_length: bool) -> Iterator[list[int]]:
    epoch = 0
    while True:
        yield from epoch_steps(lengths, batch_size, random.Random(f"epoch {epoch} {seed}"), group_by_length)
        epoch += 1


def epoch_steps(lengths: Sequence[int], batch_size: int, rng: random.Random, group_by_length: bool) -> list[list[int]]:
    """Cut one epoch's random order of rows into steps."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    in_full_steps = len(order) - len(order) % batch_size
    if group_by_length:
        order = sorted_in_windows(order[:in_full_steps], lengths, batch_size) + order[in_full_steps:]
    steps = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    full = steps[: in_full_steps // batch_size]
    if group_by_length:
        rng.shuffle(full)
    return full + steps[len(full) :]


def sorted_in_windows(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    window = WINDOW_STEPS * batch_size
    grouped: list[int] = []
    for start in range(0, len(order), window):
        # the sort is stable, so rows of one length keep their random order
        grouped += sorted(order[start : start + window], key=lambda row: lengths[row])
    return grouped


def within_budget(step: Sequence[int], lengths: Sequence[int], tokens_left: int) -> tuple[list[int], int]:
    """Return the step's rows up to the one that uses up the budget, and what is left of it."""
    kept: list[int] = []
    for row in step:
        if tokens_left <= 0:
            break
        kept.append(row)
        tokens_left -= lengths[row]
    return kept, tokens_left


def split_micro_batches(step: Sequence[int], lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """Cut a step into micro-batches of like length, the longest first, so that memory peaks at once."""
    order = sorted(step, key=lambda row: -lengths[row])
    return [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest of them; see `lay_out`."""
    kinds, shares = np.zeros(len(examples), dtype=np.int64), [[1] * len(examples)]
    (batch,) = lay_out(token_rows(examples), kinds, shares, pad_id, task=examples[0].task, packed=False)
    return as_tensors(batch.inputs)


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right.

    Returns:
        input_ids and attention_mask, each (rows, longest) int64.
    """
    shape = (len(rows), max(len(row) for row in rows))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = id_tensor(row)
        attention_mask[index, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def id_tensor(ids: Sequence[int]) -> Tensor:
    """Return token ids as an int64 tensor; of an array it is made in one copy, not token by token."""
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad prompts on the left, so that generation goes on from each one's last token.

    Returns:
        input_ids and attention_mask, each (prompts, longest) int64.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for index, prompt in enumerate(prompts):
        input_ids[index, longest - len(prompt) :] = id_tensor(prompt)
        attention_mask[index, longest - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
