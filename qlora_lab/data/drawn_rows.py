"""The rows that a run has drawn from a pool in tokens."""

from collections.abc import Mapping, Sequence
from typing import overload

import numpy as np

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
