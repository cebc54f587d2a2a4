"""The native AdamW: all tensors of a step in one call of the C library."""

from collections.abc import Sequence
from ctypes import byref, c_double, c_int64

import torch
from torch import Tensor

from qlora_lab.ops.adamw import AdamwStep, AdamwTensor
from qlora_lab.ops.native.library import AdamwView, Library


class NativeAdamw:
    """`ops.adamw.AdamwKernels` for CPU tensors."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        views = (AdamwView * len(gradients))(
            *(AdamwView(gradient=gradient.data_ptr(), numel=gradient.numel()) for gradient in gradients)
        )
        norm, first_not_finite = c_double(), c_int64()
        self._library.qlk_cpu_gradient_norm(
            *(views, len(gradients), gradient_scale, byref(norm), byref(first_not_finite), torch.get_num_threads())
        )
        return norm.value, None if first_not_finite.value < 0 else first_not_finite.value

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        views = (AdamwView * len(tensors))(*(_view(tensor) for tensor in tensors))
        self._library.qlk_cpu_adamw(
            *(views, len(tensors), step.learning_rate, step.beta1, step.beta2, step.eps, step.gradient_scale),
            *(step.step, step.block_size, torch.get_num_threads()),
        )


def _view(tensor: AdamwTensor) -> AdamwView:
    *tensors, weight_decay = tensor
    pointers = (None if part is None else part.data_ptr() for part in tensors)
    return AdamwView(*pointers, tensor.parameter.numel(), weight_decay, 0)
