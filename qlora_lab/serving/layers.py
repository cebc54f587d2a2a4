"""Linear layers that any number of adapters share, one for all rows of a batch or another for each row."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.adapters.placement import Linear
from qlora_lab.errors import ShapeError
from qlora_lab.quant.linear import QuantizedLinear


class Matrices(NamedTuple):
    """An adapter's part of one layer: lora_A (rank, in_features) and lora_B (out_features, rank), float32."""

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True, eq=False)
class ReadyAdapter:
    """An adapter on the device of its base, with its matrices by the path of their layer."""

    scaling: float
    layers: Mapping[str, Matrices]


class Stack:
    """Matrices of several adapters side by side, padded with zeros to the largest rank.

    They are copied layer by layer when they are first needed, and take as much memory again as the adapters.
    """

    def __init__(self, adapters: Sequence[ReadyAdapter]) -> None:
        self.adapters = list(adapters)
        self._layers: dict[str, tuple[Tensor, Tensor] | None] = {}

    def of(self, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return (adapters, in_features, rank) and (adapters, rank, out_features), already scaled; None: no adapter."""
        if path not in self._layers:
            self._layers[path] = self._stacked(path, dtype)
        return self._layers[path]

    def _stacked(self, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        parts = {place: one.layers[path] for place, one in enumerate(self.adapters) if path in one.layers}
        if not parts:
            return None
        some = next(iter(parts.values()))
        rank = max(part.lora_A.shape[0] for part in parts.values())
        lora_A = some.lora_A.new_zeros(len(self.adapters), rank, some.lora_A.shape[1], dtype=dtype)
        lora_B = some.lora_B.new_zeros(len(self.adapters), some.lora_B.shape[0], rank, dtype=dtype)
        for place, part in parts.items():
            lora_A[place, : len(part.lora_A)] = part.lora_A
            lora_B[place, :, : len(part.lora_A)] = part.lora_B * self.adapters[place].scaling
        return lora_A.transpose(1, 2), lora_B.transpose(1, 2)


class Mix:
    """The adapter of each row of a batch, as groups of rows of one size: all low-rank products are two of a batch.

    A group with fewer rows than others is filled up with rows whose result nobody reads. Where one adapter has many
    more rows than the others, they are several groups, which takes a copy of its matrices for each; see `group_size`.
    """

    def __init__(self, rows: Sequence[ReadyAdapter | None], stack: Stack, device: torch.device) -> None:
        self.stack = stack
        self._row_count = len(rows)
        members = [[row for row, one in enumerate(rows) if one is adapter] for adapter in stack.adapters]
        size = group_size([max(1, len(found)) for found in members])
        groups = [
            (adapter, found[first : first + size])
            for adapter, found in enumerate(members)
            for first in range(0, max(1, len(found)), size)
        ]
        filled = [[*found, *[0] * (size - len(found))] for _, found in groups]
        places = {row: group * size + at for group, (_, found) in enumerate(groups) for at, row in enumerate(found)}
        of_groups = [adapter for adapter, _ in groups]
        self._of_groups = torch.tensor(of_groups, device=device) if len(groups) > len(members) else None
        self._filled = torch.tensor(filled, device=device).flatten()
        self._rows = torch.tensor(list(places), device=device)
        self._places = torch.tensor(list(places.values()), device=device)

    def add(self, outputs: Tensor, x: Tensor, path: str, dtype: torch.dtype) -> Tensor:
        """Return the layer's outputs, (..., out_features), plus each row's low-rank product of x, (..., in_features).

        Raises:
            ShapeError: x has not as many rows as the mix.
        """
        matrices = self.stack.of(path, dtype)
        if matrices is None:
            return outputs
        if x.shape[:-1].numel() % self._row_count:
            raise ShapeError(f"the batch must have {self._row_count} rows, one for each adapter; got {tuple(x.shape)}")
        lora_A, lora_B = matrices
        if self._of_groups is not None:
            lora_A, lora_B = lora_A[self._of_groups], lora_B[self._of_groups]
        by_row = x.to(dtype).reshape(self._row_count, -1, x.shape[-1])  # some models flatten rows and tokens into one
        groups = by_row[self._filled].reshape(len(lora_A), -1, x.shape[-1])
        product = torch.bmm(torch.bmm(groups, lora_A), lora_B).view(len(self._filled), by_row.shape[1], -1)
        flat = outputs.reshape(self._row_count, by_row.shape[1], -1)
        return flat.index_add(0, self._rows, product[self._places].to(outputs.dtype)).view(outputs.shape)


def group_size(rows: Sequence[int]) -> int:
    """Return the largest size of groups with which filling them up at most doubles the batch.

    Args:
        rows: of each adapter, at least one; one also where an adapter of the stack has none in this batch.
    """
    sizes = range(max(rows), 0, -1)
    return next(size for size in sizes if size * sum(-(-count // size) for count in rows) <= 2 * sum(rows))


@dataclass
class Route:
    """Which adapters the layers of one model use at the moment: none, one for every row, or a mix."""

    now: ReadyAdapter | Mix | None = None
    _stack: Stack | None = field(default=None, repr=False)

    def mixed(self, rows: Sequence[ReadyAdapter | None], device: torch.device) -> ReadyAdapter | Mix | None:
        """Return what serves these rows; a mix where they differ."""
        distinct = list(dict.fromkeys(one for one in rows if one is not None))
        if len(distinct) < 2 and None not in rows:
            return distinct[0]
        return Mix(rows, self._stack_of(distinct), device) if distinct else None

    def forget_all_but(self, ready: Collection[ReadyAdapter]) -> None:
        """Give up the last stack if it has other adapters than these: it would keep their memory."""
        if self._stack is not None and not set(self._stack.adapters) <= set(ready):
            self._stack = None

    def _stack_of(self, distinct: list[ReadyAdapter]) -> Stack:
        """Return the stack of the batch before where that has all of them and not many more: copying takes long."""
        kept = self._stack
        if kept is None or not set(distinct) <= set(kept.adapters) or 2 * len(distinct) < len(kept.adapters):
            self._stack = kept = Stack(distinct)
        return kept


class SharedLinear(nn.Module):
    """y = base(x) + the low-rank products of the adapters that `route` names, without gradients.

    Args:
        base: the layer that all adapters share.
        path: of the layer in the model, by which adapters name it.
        route: of the model.
    """

    def __init__(self, base: Linear, path: str, route: Route) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        self._path = path
        self._route = route

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which model code of transformers asks for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) in the dtype of x, (..., in_features)."""
        base, adapter = self.base, self._route.now
        if isinstance(adapter, Mix):
            dtype = base.compute_dtype if isinstance(base, QuantizedLinear) else x.dtype
            return adapter.add(base(x), x, self._path, dtype)
        if adapter is None or self._path not in adapter.layers:
            outputs: Tensor = base(x)
            return outputs
        lora_A, lora_B = adapter.layers[self._path]
        if isinstance(base, QuantizedLinear) and not base.is_expanded:
            return base.with_adapter(x, lora_A, lora_B, scaling=adapter.scaling, dropout=0.0, seed=0)
        low = F.linear(x, lora_A.to(x.dtype))
        return base(x) + adapter.scaling * F.linear(low, lora_B.to(x.dtype))
