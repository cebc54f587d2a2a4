"""Products with the output head: by the CPU's own kernels, or by torch, in float32 where that is slow in its dtype.

For torch the head is converted a few rows at a time, just before they are multiplied: a float32 copy of the whole would
be the largest matrix in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_lab.models.precision import has_slow_products, without_slow_autocast
from qlora_lab.ops.native.dense import NativeDense
from qlora_lab.ops.registry import KERNELS

ROWS_AT_ONCE = 2048  # of 576 columns: 4.7 MB in float32


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden @ weight^T + bias as a fresh tensor, in float32 at least; no gradient flows.

    Args:
        hidden: (N, hidden size).
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
    """
    native = _native(weight)
    if native is not None and hidden.dtype == weight.dtype:
        return native.linear(hidden, weight, bias)
    if not has_slow_products(weight):
        with without_slow_autocast(weight.device.type):
            logits = functional.linear(hidden.to(weight.dtype), weight, bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = hidden.new_empty((len(hidden), len(weight)), dtype=torch.float32)
    wide = hidden.float()
    for rows in _slices(weight):
        torch.mm(wide, weight[rows].float().T, out=logits[:, rows])
    return logits if bias is None else logits.add_(bias)


def head_input_gradient(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """Return grad_logits @ weight: (N, hidden size), for grad_logits (N, vocabulary) in float32 at least."""
    native = _native(weight)
    if native is not None and grad_logits.dtype == torch.float32:
        return native.grad_input(grad_logits, weight)
    if not has_slow_products(weight):
        with without_slow_autocast(weight.device.type):
            return grad_logits.to(weight.dtype) @ weight
    gradient = grad_logits.new_zeros((len(grad_logits), weight.shape[1]))
    for rows in _slices(weight):
        gradient.addmm_(grad_logits[:, rows], weight[rows].float())
    return gradient


def _native(weight: Tensor) -> NativeDense | None:
    """Return the kernels for products with this head; none where autocast says in which dtype it is multiplied."""
    if KERNELS.library is None or not NativeDense.takes(weight) or torch.is_autocast_enabled("cpu"):
        return None
    return NativeDense(KERNELS.library)


@contextmanager
def whole_head_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Let the output head of a model that writes get its inputs without gaps.

    Of a prompt only the last token's hidden states are multiplied, which lie apart in memory; a product of bfloat16 on
    a CPU then copies the whole head for every row (SmolLM2-135M, 8 prompts: 450 MB and 0.9 s, where 8 MB and 10 ms do).
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(_without_gaps)
    try:
        yield
    finally:
        hook.remove()


def _without_gaps(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = args
    return hidden.contiguous(), *others


def _slices(weight: Tensor) -> Iterator[slice]:
    for start in range(0, len(weight), ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)
