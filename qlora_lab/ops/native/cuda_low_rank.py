"""An adapter's low-rank products with many rows: by torch, or by kernels that drop elements of x while they read it."""

from collections.abc import Callable
from ctypes import byref
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.cuda_library import CudaLibrary, LowRankView
from qlora_lab.ops.native.cuda_plan import LowRankPlan
from qlora_lab.ops.native.cuda_streams import Streams

# Adds an adapter's product to some columns of a result: called with these, the first one's number, and how many. What a
# panel gave a moment ago is still in the second-level cache, where a pass over the whole result would go to memory.
Added = Callable[[Tensor, int, int], object]


class LowRank(Protocol):
    """The products of one x (rows, in_features) and its dropout; matrices come in its dtype and contiguous."""

    def down(self, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return dropout(x) @ lora_A^T (rows, rank) in float32, and in the dtype of x."""

    def grad_A(self, grad_low: Tensor, dtype: torch.dtype) -> Tensor:
        """Return grad_low^T @ dropout(x) in `dtype`, float32 or bfloat16."""

    def grad_x(self, of_weight: Callable[[Added | None], Tensor], grad_low: Tensor, lora_A: Tensor) -> Tensor:
        """Return the gradient of x: what `of_weight` returns, and through dropout(x) @ lora_A^T."""


class TorchLowRank:
    """With dropout, of a dropped copy of x, and with a pass over the whole gradient of x.

    Args:
        drop: called with a tensor and what to add, returns dropout of the one plus the other; None without dropout.
    """

    def __init__(self, x: Tensor, drop: Callable[[Tensor, Tensor | None], Tensor] | None) -> None:
        self._x, self._drop = x, drop

    def down(self, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        rounded = F.linear(self._dropped(), lora_A)
        return rounded.float(), rounded

    def grad_A(self, grad_low: Tensor, dtype: torch.dtype) -> Tensor:
        return (grad_low.T @ self._dropped()).to(dtype)

    def grad_x(self, of_weight: Callable[[Added | None], Tensor], grad_low: Tensor, lora_A: Tensor) -> Tensor:
        if self._drop is None:
            return of_weight(lambda part, first, count: part.addmm_(grad_low, lora_A[:, first : first + count]))
        return self._drop(grad_low @ lora_A, of_weight(None))

    def _dropped(self) -> Tensor:
        return self._x if self._drop is None else self._drop(self._x, None)


class FusedLowRank:
    """By the kernels of kernels/cuda/low_rank.cu: nothing of the size of x is written or allocated.

    Args:
        library, streams: as of the ops.
        x: (rows, in_features), contiguous, of 16 bits.
        rank: of the adapter.
        dropout, seed: as of `ops.lora.op.lora_linear`.
        plan: fused.
    """

    def __init__(
        self, library: CudaLibrary, streams: Streams, x: Tensor, rank: int, dropout: float, seed: int, plan: LowRankPlan
    ) -> None:
        self._library, self._streams, self._plan = library, streams, plan
        self._x = x
        self._shape = LowRankView(*x.shape, rank, seed, dropout, DTYPE_CODES[x.dtype])

    def down(self, lora_A: Tensor) -> tuple[Tensor, Tensor]:
        sums = self._workspace(self._plan.down_splits, len(self._x), len(lora_A))
        low, rounded = torch.empty_like(sums[0]), self._x.new_empty(sums.shape[1:])
        with self._streams.queue(self._x.device) as stream:
            self._library.qlk_cuda_low_rank_down(
                *(byref(self._shape), self._x.data_ptr(), lora_A.data_ptr(), self._plan.down_splits),
                *(sums.data_ptr(), low.data_ptr(), rounded.data_ptr(), stream),
            )
        return low, rounded

    def grad_A(self, grad_low: Tensor, dtype: torch.dtype) -> Tensor:
        sums = self._workspace(self._plan.grad_splits, grad_low.shape[1], self._x.shape[1])
        result = sums.new_empty(sums.shape[1:], dtype=dtype)
        with self._streams.queue(self._x.device) as stream:
            self._library.qlk_cuda_low_rank_grad_A(
                *(byref(self._shape), grad_low.data_ptr(), self._x.data_ptr(), self._plan.grad_splits),
                *(sums.data_ptr(), result.data_ptr(), DTYPE_CODES[dtype], stream),
            )
        return result

    def grad_x(self, of_weight: Callable[[Added | None], Tensor], grad_low: Tensor, lora_A: Tensor) -> Tensor:
        return of_weight(partial(self.add, grad_low, lora_A))

    def add(self, grad_low: Tensor, lora_A: Tensor, part: Tensor, first: int, count: int) -> None:
        """Add what comes through the adapter to `part`, `count` columns of a whole gradient of x from `first` on."""
        with self._streams.queue(self._x.device) as stream:
            self._library.qlk_cuda_low_rank_add(
                *(byref(self._shape), grad_low.data_ptr(), lora_A.data_ptr(), first, count, part.data_ptr(), stream)
            )

    def _workspace(self, *shape: int) -> Tensor:
        return self._x.new_empty(shape, dtype=torch.float32)
