"""A quantized linear layer with its LoRA adapter in pure torch: what native kernels must compute, and the fallback."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.blockwise import reference as blockwise
from qlora_lab.ops.blockwise.weight import WEIGHT_PARTS
from qlora_lab.ops.lora.dropout import drop


def lora_linear(x: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    """Return (out, low); see `op.lora_linear`."""
    weight, (bias, lora_A, lora_B, scaling, dropout, seed) = parts[:WEIGHT_PARTS], parts[WEIGHT_PARTS:]
    out = blockwise.quantized_linear(x, *weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        low = F.linear(drop(x, dropout, seed), lora_A.to(x.dtype))
        out = out + scaling * F.linear(low, lora_B.to(x.dtype))
    return out, low.reshape(-1, lora_A.shape[0]).float()


def lora_linear_backward(grad_output: Tensor, x: Tensor, low: Tensor, *parts: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_x, grad_A, grad_B); grad_x is empty unless the last of `parts` asks for it."""
    weight, (lora_A, lora_B, scaling, dropout, seed, needs_grad_x) = parts[:WEIGHT_PARTS], parts[WEIGHT_PARTS:]
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        gradient = grad_output.reshape(-1, grad_output.shape[-1])
        grad_low = scaling * (gradient @ lora_B.to(dtype))
        grad_A = grad_low.T @ drop(x, dropout, seed).reshape(-1, x.shape[-1])
        grad_B = scaling * (gradient.T @ low.to(dtype))
        if not needs_grad_x:
            return x.new_empty(0), grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        through_adapter = drop((grad_low @ lora_A.to(dtype)).view(x.shape), dropout, seed)
    grad_x = blockwise.quantized_linear_grad_input(grad_output, *weight) + through_adapter
    return grad_x, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
