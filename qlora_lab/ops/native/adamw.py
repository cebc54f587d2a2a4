"""The native AdamW: all tensors of a step in one call of the C library."""

from array import array
from collections.abc import Sequence
from ctypes import Array, byref, c_double, c_int64
from functools import cache
from struct import pack, unpack

import torch
from torch import Tensor

from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import AdamwView, Library


class NativeAdamw:
    """`ops.adamw.optimizer.AdamwKernels` for CPU tensors."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        words = array("q")
        for gradient in gradients:
            words.extend(gradient_words(gradient))
        norm, first_not_finite = c_double(), c_int64()
        self._library.qlk_cpu_gradient_norm(
            *(_views(words), len(gradients), gradient_scale, byref(norm), byref(first_not_finite)),
            torch.get_num_threads(),
        )
        return norm.value, None if first_not_finite.value < 0 else first_not_finite.value

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        words = array("q")
        for tensor in tensors:
            words.extend(tensor_words(tensor))
        self._library.qlk_cpu_adamw(
            *(_views(words), len(tensors), step.learning_rate, step.beta1, step.beta2, step.eps),
            *(step.gradient_scale, step.step, step.block_size, torch.get_num_threads()),
        )


def tensor_words(tensor: AdamwTensor) -> tuple[int, ...]:
    """Return a tensor as the eight 64-bit words of struct qlk_adamw_tensor."""
    parameter, gradient, exp_avg, exp_avg_sq, absmax, square_absmax, weight_decay = tensor
    return (
        *(parameter.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()),
        0 if absmax is None else absmax.data_ptr(),
        0 if square_absmax is None else square_absmax.data_ptr(),
        *(parameter.numel(), _last_word(weight_decay, parameter.dtype)),
    )


def gradient_words(gradient: Tensor) -> tuple[int, ...]:
    """Return those words for a gradient alone, which is all that its norm reads."""
    return (0, gradient.data_ptr(), 0, 0, 0, 0, gradient.numel(), _last_word(0.0, gradient.dtype))


def _views(words: "array[int]") -> Array[AdamwView]:
    """Return eight words a tensor as structures: filling them field by field would take milliseconds a step."""
    return (AdamwView * (len(words) // 8)).from_buffer(words)


@cache
def _last_word(weight_decay: float, dtype: torch.dtype) -> int:
    """Return the float32 weight decay and the number of the dtype beside it as one 64-bit word."""
    (word,) = unpack("=q", pack("=fi", weight_decay, DTYPE_CODES[dtype]))
    return int(word)
