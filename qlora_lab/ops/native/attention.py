"""Native attention of the tokens of a row to each other, and its gradients."""

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import AttentionView, Library

DTYPES = (torch.float32, torch.bfloat16)


class NativeAttention:
    """softmax(scale * query @ key^T) @ value for each row and head; scores and sums are float32.

    Args:
        causal: whether a token sees none after it.
        scale: of the scores.
    """

    def __init__(self, library: Library, *, causal: bool, scale: float) -> None:
        self._library = library
        self._causal, self._scale = causal, scale

    @staticmethod
    def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether there are kernels for such inputs, which are those of `forward`."""
        rows, heads, tokens, size = query.shape
        return (
            query.device.type == "cpu"
            and query.dtype in DTYPES
            and query.dtype == key.dtype == value.dtype
            and key.shape == value.shape == (rows, key.shape[1], tokens, size)
            and min(query.shape) > 0
            and key.shape[1] > 0
            and heads % key.shape[1] == 0
            and (mask is None or (mask.dtype == torch.bool and mask.shape in _mask_shapes(rows, tokens)))
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output (rows, tokens, heads, head size) and log(sum(exp(scores))), (rows, heads, tokens) float32.

        Args:
            query: (rows, heads, tokens, head size), in float32 or bfloat16.
            key, value: as query, of as many heads or a divisor: neighbouring heads share one.
            mask: (rows or 1, 1, tokens, tokens), False where a token is not seen; or None.
        """
        rows, heads, tokens, size = query.shape
        parts = [_with_neighbours(part) for part in (query, key, value, mask)]
        out = query.new_empty((rows, tokens, heads, size))
        logsumexp = torch.empty(rows, heads, tokens)
        self._library.qlk_cpu_attention(
            byref(self._view(*parts)), out.data_ptr(), logsumexp.data_ptr(), torch.get_num_threads()
        )
        return out, logsumexp

    def backward(
        self, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], out: Tensor, logsumexp: Tensor, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, in their shapes.

        Args:
            inputs: of `forward`.
            out, logsumexp: what it returned.
            grad_out: as out.
        """
        query, key, value, mask = (_with_neighbours(part) for part in inputs)
        gradient = grad_out.contiguous()
        gradients = [part.new_empty(part.transpose(1, 2).shape) for part in (query, key, value)]
        self._library.qlk_cpu_attention_backward(
            *(byref(self._view(query, key, value, mask)), out.data_ptr(), logsumexp.data_ptr(), gradient.data_ptr()),
            *(*(part.data_ptr() for part in gradients), torch.get_num_threads()),
        )
        grad_query, grad_key, grad_value = (part.transpose(1, 2) for part in gradients)
        return grad_query, grad_key, grad_value

    def _view(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        view = AttentionView(*(part.data_ptr() for part in (query, key, value)))
        for name, part in (("query", query), ("key", key), ("value", value)):
            getattr(view, f"{name}_strides")[:] = part.stride()[:3]
        view.rows, view.heads, view.tokens, view.head_size = query.shape
        view.key_heads = key.shape[1]
        view.scale, view.causal, view.dtype = self._scale, self._causal, DTYPE_CODES[query.dtype]
        if mask is not None:
            view.mask = mask.data_ptr()
            view.mask_strides[:] = (0 if len(mask) == 1 else mask.stride(0), mask.stride(2))
        return view


def _mask_shapes(rows: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    return (rows, 1, tokens, tokens), (1, 1, tokens, tokens)


def _with_neighbours(tensor: Tensor | None) -> Any:
    """Return a tensor whose last dimension is contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
