"""Native root mean square norms whose weight is not trained, and the gradient of what they get."""

import torch
from torch import Tensor

from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import Library

DTYPES = (torch.float32, torch.bfloat16)


class NativeRmsNorm:
    """weight * (x / sqrt(mean(x^2) + eps)) over the last dimension, worked out in float32.

    What is in brackets is rounded to the dtype of x before it is multiplied, as transformers does.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    @staticmethod
    def takes(x: Tensor, weight: Tensor) -> bool:
        """Whether there are kernels for these, and the weight wants no gradient."""
        return (
            x.device.type == "cpu"
            and x.dtype in DTYPES
            and weight.dtype == x.dtype
            and x.shape[-1:] == weight.shape != (0,)
            and not (weight.requires_grad and torch.is_grad_enabled())
        )

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the norm, as x, and 1 / sqrt(mean(x^2) + eps) of each row, (...,) float32.

        Args:
            x: (..., columns), contiguous.
            weight: (columns,).
            eps: what keeps rows of zeros finite.
        """
        out, scales = torch.empty_like(x), torch.empty(x.shape[:-1])
        self._library.qlk_cpu_rms_norm(
            *(x.data_ptr(), DTYPE_CODES[x.dtype], scales.numel(), x.shape[-1], weight.contiguous().data_ptr(), eps),
            *(out.data_ptr(), scales.data_ptr(), torch.get_num_threads()),
        )
        return out, scales

    def backward(self, grad_out: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the gradient of x, for what `forward` got and returned."""
        gradient, grad_x = grad_out.contiguous(), torch.empty_like(x)
        self._library.qlk_cpu_rms_norm_backward(
            *(gradient.data_ptr(), x.data_ptr(), DTYPE_CODES[x.dtype], scales.numel(), x.shape[-1]),
            *(weight.contiguous().data_ptr(), scales.data_ptr(), grad_x.data_ptr(), torch.get_num_threads()),
        )
        return grad_x
