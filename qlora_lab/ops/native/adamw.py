"""The native AdamW: all tensors of a step in one call of the C library."""

from array import array
from collections.abc import Iterable, Sequence
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
        norm, first_not_finite = c_double(), c_int64()
        self._library.qlk_cpu_gradient_norm(
            *(_views(gradient_words(gradients)), len(gradients), gradient_scale, byref(norm), byref(first_not_finite)),
            torch.get_num_threads(),
        )
        return norm.value, None if first_not_finite.value < 0 else first_not_finite.value

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        self._library.qlk_cpu_adamw(
            *(_views(tensor_words(tensors)), len(tensors), step.learning_rate, step.beta1, step.beta2, step.eps),
            *(step.gradient_scale, step.step, step.block_size, torch.get_num_threads()),
        )


WORDS = 8  # of 64 bits, in a struct qlk_adamw_tensor
GRADIENT, NUMEL, LAST = 1, 6, 7  # which of them


def tensor_words(tensors: Sequence[AdamwTensor]) -> "array[int]":
    """Return an array of struct qlk_adamw_tensor as its 64-bit words.

    They are written column by column: one tensor's words after another's would take half as long again.
    """
    words = array("q", bytes(8 * WORDS * len(tensors)))
    for word, column in enumerate(list(zip(*tensors, strict=True))[:NUMEL]):
        words[word::WORDS] = _addresses(column)  # the fields of both have one order
    words[NUMEL::WORDS] = array("q", [tensor.parameter.numel() for tensor in tensors])
    words[LAST::WORDS] = array("q", [_last_word(tensor.weight_decay, tensor.parameter.dtype) for tensor in tensors])
    return words


def gradient_words(gradients: Sequence[Tensor]) -> "array[int]":
    """Return those words for gradients alone, which are all that their norm reads."""
    words = array("q", bytes(8 * WORDS * len(gradients)))
    words[GRADIENT::WORDS] = _addresses(gradients)
    words[NUMEL::WORDS] = array("q", [gradient.numel() for gradient in gradients])
    words[LAST::WORDS] = array("q", [_last_word(0.0, gradient.dtype) for gradient in gradients])
    return words


def _addresses(tensors: Iterable[Tensor | None]) -> "array[int]":
    return array("q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _views(words: "array[int]") -> Array[AdamwView]:
    return (AdamwView * (len(words) // WORDS)).from_buffer(words)


@cache
def _last_word(weight_decay: float, dtype: torch.dtype) -> int:
    """Return the float32 weight decay and the number of the dtype beside it as one 64-bit word."""
    (word,) = unpack("=q", pack("=fi", weight_decay, DTYPE_CODES[dtype]))
    return int(word)
