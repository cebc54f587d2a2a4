"""The native gate of an MLP, silu(gate) * up, and its gradients."""

import torch
from torch import Tensor

from qlora_lab.ops.native.ctypes_ops import DTYPE_CODES
from qlora_lab.ops.native.library import Library

DTYPES = (torch.float32, torch.bfloat16)


class NativeGate:
    """gate * sigmoid(gate) * up, worked out in float32 and rounded once."""

    def __init__(self, library: Library) -> None:
        self._library = library

    @staticmethod
    def takes(gate: Tensor, up: Tensor) -> bool:
        """Whether there are kernels for these."""
        return (
            gate.device.type == up.device.type == "cpu"
            and gate.dtype == up.dtype
            and gate.dtype in DTYPES
            and gate.shape == up.shape
        )

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product, contiguous, for two tensors that `takes` allows."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        self._library.qlk_cpu_silu_gate(
            *(gate.data_ptr(), up.data_ptr(), DTYPE_CODES[gate.dtype], gate.numel(), out.data_ptr()),
            torch.get_num_threads(),
        )
        return out

    def backward(self, grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up, the second in the memory of `grad_out`, if that is contiguous.

        Args:
            grad_out: of the product, in its dtype.
            gate, up: as `forward` got them.
        """
        grad_out, gate, up = grad_out.contiguous(), gate.contiguous(), up.contiguous()
        grad_gate = torch.empty_like(gate)
        self._library.qlk_cpu_silu_gate_backward(
            *(grad_out.data_ptr(), gate.data_ptr(), up.data_ptr(), DTYPE_CODES[gate.dtype], gate.numel()),
            *(grad_gate.data_ptr(), grad_out.data_ptr(), torch.get_num_threads()),
        )
        return grad_gate, grad_out
