"""Native products with a dense matrix that is not trained, such as an output head."""

import torch
from torch import Tensor

from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import Library

DTYPES = (torch.float32, torch.bfloat16)


class NativeDense:
    """Products of a few rows or many, in the weight's dtype where the machine has units for it, with float32 sums.

    bfloat16 is widened on its way into the cache where there are none; results are not rounded to it anywhere.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether there are kernels for products with this matrix."""
        return weight.device.type == "cpu" and weight.dtype in DTYPES and not torch.compiler.is_compiling()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ weight^T + bias, (N, out_features) float32.

        Args:
            x: (N, in_features) of the weight's dtype.
            weight: (out_features, in_features) that `takes`.
            bias: (out_features,) or None.
        """
        x, weight = x.contiguous(), weight.contiguous()
        shift = None if bias is None else bias.to(weight.dtype).contiguous()
        out = torch.empty(len(x), len(weight))
        self._library.qlk_cpu_dense_linear(
            *(x.data_ptr(), len(x), weight.data_ptr(), DTYPE_CODES[weight.dtype], *weight.shape),
            *(None if shift is None else shift.data_ptr(), out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def grad_input(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """Return grad_output @ weight, (N, in_features) float32.

        Args:
            grad_output: (N, out_features) float32; rounded to bfloat16 where units for that multiply.
            weight: (out_features, in_features) that `takes`.
        """
        grad_output, weight = grad_output.contiguous(), weight.contiguous()
        out = torch.empty(len(grad_output), weight.shape[1])
        self._library.qlk_cpu_dense_grad_input(
            *(grad_output.data_ptr(), len(grad_output), weight.data_ptr(), DTYPE_CODES[weight.dtype], *weight.shape),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        return out
