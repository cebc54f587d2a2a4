"""The rows that a run has drawn from a pool in tokens, one by one or many at once."""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

from qlora_lab.data.layout import TokenRows, token_rows
from qlora_lab.data.pool import Pool
from qlora_lab.data.row_file import hex_key
from qlora_lab.data.tokenization import Example


class DrawnRows(Sequence[Example]):
    """Rows drawn from a pool, made into examples one by one as they are asked for.

    Args:
        numbers: of the rows in the pool.
        replaced: examples that stand in the place of a row, by their place among `numbers`.
        loss_on: "target" or "everything".
    """

    def __init__(
        self, pool: Pool, numbers: np.ndarray, replaced: Mapping[int, Example], loss_on: str, task: str
    ) -> None:
        self._pool = pool
        self._numbers = numbers
        self._replaced = replaced
        self._loss_on = loss_on
        self._task = task

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._replaced:
            return self._replaced[index]
        number = int(self._numbers[index])
        target_start = int(self._pool.target_starts[number])
        return Example(
            input_ids=self._pool.tokens(number),
            target_start=target_start,
            loss_start=target_start if self._loss_on == "target" else 1,
            key=hex_key(int(self._pool.keys[number])),
            family=self._pool.family(number),
            target_bytes=int(self._pool.target_bytes[number]),
            task=self._task,
        )

    def lengths(self, places: np.ndarray) -> np.ndarray:
        """Return the tokens of rows, by their places."""
        if self._any_replaced(places):
            return np.array([self[place].length for place in places.tolist()])
        return self._pool.lengths(self._numbers[places])

    def token_rows(self, places: np.ndarray) -> TokenRows:
        """Return rows in arrays, by their places."""
        if self._any_replaced(places):
            return token_rows([self[place] for place in places.tolist()])
        numbers = self._numbers[places]
        starts = self._pool.target_starts[numbers]
        loss_starts = starts if self._loss_on == "target" else np.ones_like(starts)
        return TokenRows(self._pool.flat_tokens(numbers), self._pool.lengths(numbers), starts, loss_starts)

    def _any_replaced(self, places: np.ndarray) -> bool:
        return bool(self._replaced) and not self._replaced.keys().isdisjoint(places.tolist())


def lengths_of(examples: Sequence[Example], places: Sequence[int]) -> np.ndarray:
    """Return the tokens of examples, by their places; of drawn rows without making them one by one."""
    if isinstance(examples, DrawnRows):
        return examples.lengths(np.array(places))
    return np.array([examples[place].length for place in places])


def rows_of(examples: Sequence[Example], places: Sequence[int]) -> TokenRows:
    """Return examples in arrays, by their places; of drawn rows likewise."""
    if isinstance(examples, DrawnRows):
        return examples.token_rows(np.array(places))
    return token_rows([examples[place] for place in places])
