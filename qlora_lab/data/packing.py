"""Several rows one after the other in a row of a batch, each with positions of its own and none seeing another.

Packing changes how the rows of a step lie in memory and nothing else: the steps, and the loss they take, are the same.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from qlora_lab.config.schema import CAUSAL
from qlora_lab.data.batching import as_tensors
from qlora_lab.data.layout import lay_out, token_rows
from qlora_lab.data.tokenization import Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share rows out over as few packs as hold them, evenly, so that padding the packs to the fullest costs little.

    Args:
        lengths: tokens of each row.
        capacity: tokens of a pack; a longer row gets a pack of its own.

    Returns:
        Row numbers of each pack, the fullest pack first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    count = -(-sum(lengths) // capacity)
    while (packs := _shared_out(order, lengths, count, capacity)) is None:
        count += 1
    return sorted(packs, key=lambda rows: -sum(lengths[row] for row in rows))


def _shared_out(order: Sequence[int], lengths: Sequence[int], count: int, capacity: int) -> list[list[int]] | None:
    """Put each row, the longest first, into the emptiest of `count` packs; None where one runs over."""
    packs: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for row in order:
        tokens, number = heapq.heappop(emptiest)
        if packs[number] and tokens + lengths[row] > capacity:
            return None
        packs[number].append(row)
        heapq.heappush(emptiest, (tokens + lengths[row], number))
    return [rows for rows in packs if rows]


def collate_packed(packs: Sequence[Sequence[Example]], pad_id: int) -> dict[str, Tensor]:
    """Lay out each pack as one row, padded on the right to the longest; see `lay_out`.

    Where positions do not go on by 1, another sequence begins (see models/packing.py).
    """
    examples = [example for pack in packs for example in pack]
    kinds, shares = np.zeros(len(examples), dtype=np.int64), [[len(pack) for pack in packs]]
    (batch,) = lay_out(token_rows(examples), kinds, shares, pad_id, task=CAUSAL, packed=True)
    return as_tensors(batch.inputs)
