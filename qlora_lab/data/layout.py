"""Examples laid out in padded micro-batches, those of several steps at once.

Little of it is done row by row in Python: while that runs, no other thread's Python does, and one that launches the
work of a GPU would wait.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qlora_lab.config.schema import CAUSAL
from qlora_lab.data.tokenization import Example
from qlora_lab.models.cross_entropy import IGNORE_INDEX

Rows = Sequence[int]  # of a micro-batch: how many examples each holds


class TokenRows(NamedTuple):
    """Examples, one after the other.

    Attributes:
        ids: (tokens,) int32.
        lengths: (examples,) tokens of each.
        target_starts, loss_starts: (examples,) of each, see `Example`.
    """

    ids: np.ndarray
    lengths: np.ndarray
    target_starts: np.ndarray
    loss_starts: np.ndarray


class MicroBatch(NamedTuple):
    """What a model is given, and of each label the kind of its example; all (rows, longest) int64."""

    inputs: dict[str, np.ndarray]
    kinds: np.ndarray  # 0 in the padding


class Places(NamedTuple):
    """Where the tokens of rows go that are padded on the right, each to the longest of its micro-batch."""

    of_tokens: np.ndarray  # among all places of all micro-batches
    shapes: list[tuple[int, int]]  # of the micro-batches
    total: int

    def filled(self, values: np.ndarray | int, padding: int) -> np.ndarray:
        """Put a number in each token's place, and another everywhere else."""
        places = np.full(self.total, padding, dtype=np.int64)
        places[self.of_tokens] = values
        return places

    def cut(self, places: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the places of each micro-batch."""
        start = 0
        for rows, longest in self.shapes:
            end = start + rows * longest
            yield places[start:end].reshape(rows, longest)
            start = end


def token_rows(examples: Sequence[Example]) -> TokenRows:
    """Put examples into arrays."""
    return TokenRows(
        np.concatenate([np.asarray(example.input_ids, dtype=np.int32) for example in examples]),
        np.array([example.length for example in examples]),
        np.array([example.target_start for example in examples]),
        np.array([example.loss_start for example in examples]),
    )


def lay_out(
    rows: TokenRows, kinds: np.ndarray, shares: Sequence[Rows], pad_id: int, *, task: str, packed: bool
) -> list[MicroBatch]:
    """Lay examples out in micro-batches.

    Args:
        rows: the examples in the order of the micro-batches and their rows.
        kinds: (examples,) a number of each example.
        shares: of each micro-batch, how many examples each of its rows holds; 1 where they are not packed.
        task: of the model they are for.

    Returns:
        input_ids, labels and, of packed rows, position_ids, which start at 0 in every example, and in the padding; of
        others attention_mask. Labels are -100 before an example's `loss_start` and in the padding, and follow
        positions, so pad may equal eos. For models that read and write apart, input_ids are the prompts, and labels,
        (rows, 1 + longest target), the targets after one -100.
    """
    if task != CAUSAL:
        return _apart(rows, kinds, shares, pad_id)
    places = _places(rows.lengths, shares)
    positions = _positions(rows.lengths)
    is_scored = positions >= np.repeat(rows.loss_starts, rows.lengths)
    inputs = {
        "input_ids": places.filled(rows.ids, pad_id),
        "labels": places.filled(np.where(is_scored, rows.ids, IGNORE_INDEX), IGNORE_INDEX),
        **({"position_ids": places.filled(positions, 0)} if packed else {"attention_mask": places.filled(1, 0)}),
    }
    found = places.cut(places.filled(np.repeat(kinds, rows.lengths), 0))
    return _cut({name: (places, values) for name, values in inputs.items()}, found)


def _apart(rows: TokenRows, kinds: np.ndarray, shares: Sequence[Rows], pad_id: int) -> list[MicroBatch]:
    """Lay out prompts and targets."""
    starts = np.cumsum(rows.lengths) - rows.lengths
    ids = np.insert(rows.ids, starts + rows.target_starts, IGNORE_INDEX)
    lengths = rows.lengths + 1
    is_target = _positions(lengths) >= np.repeat(rows.target_starts, lengths)
    prompts, targets = _places(rows.target_starts, shares), _places(lengths - rows.target_starts, shares)
    inputs = {
        "input_ids": (prompts, prompts.filled(ids[~is_target], pad_id)),
        "attention_mask": (prompts, prompts.filled(1, 0)),
        "labels": (targets, targets.filled(ids[is_target], IGNORE_INDEX)),
    }
    return _cut(inputs, targets.cut(targets.filled(np.repeat(kinds, lengths - rows.target_starts), 0)))


def _cut(inputs: dict[str, tuple[Places, np.ndarray]], kinds: Iterator[np.ndarray]) -> list[MicroBatch]:
    cut = [places.cut(values) for places, values in inputs.values()]
    return [MicroBatch(dict(zip(inputs, of_one, strict=False)), of_one[-1]) for of_one in zip(*cut, kinds, strict=True)]


def _places(lengths: np.ndarray, shares: Sequence[Rows]) -> Places:
    """Find the places of the tokens of examples, those that share a row one after the other."""
    examples = np.array([count for rows in shares for count in rows])
    counts = np.array([len(rows) for rows in shares])
    tokens = np.add.reduceat(lengths, np.cumsum(examples) - examples)  # of each row
    longest = np.maximum.reduceat(tokens, np.cumsum(counts) - counts)
    widths = np.repeat(longest, counts)
    before = np.cumsum(widths - tokens) - (widths - tokens)  # padding before each row
    of_tokens = np.arange(tokens.sum()) + np.repeat(before, tokens)
    return Places(of_tokens, list(zip(counts.tolist(), longest.tolist(), strict=True)), int(widths.sum()))


def _positions(lengths: np.ndarray) -> np.ndarray:
    """Return each token's place in its example."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
