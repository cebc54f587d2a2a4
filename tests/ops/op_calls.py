"""What every registered op can be called with."""

from typing import Any

import torch
from torch import Tensor

import qlora_lab.ops.lora.op  # noqa: F401  # registers its ops
from qlora_lab.ops.blockwise.op import quantize_absmax, quantize_blockwise
from qlora_lab.ops.blockwise.weight import PackedWeight

OUT, IN, RANK = 40, 72, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(op: str, dtype: torch.dtype, *, nested: bool = True) -> tuple[Any, ...]:
    """Return arguments of an op, activations in `dtype`, the weight with or without double quantization."""
    dense, x, gradient = normal(OUT, IN), normal(2, 3, IN, seed=1).to(dtype), normal(2, 3, OUT, seed=2).to(dtype)
    packed, absmax = quantize_blockwise(dense, "nf4", 64)
    codes = quantize_absmax(absmax, 32)
    weight = PackedWeight(packed, *(codes if nested else (absmax, None, None)), "nf4", 64, 32, OUT, IN)
    adapter = (normal(RANK, IN, seed=3), normal(OUT, RANK, seed=4), 0.5, 0.25, 9)
    return {
        "quantize_blockwise": (dense.to(dtype), "nf4", 64),
        "dequantize_weight": (*weight, dtype),
        "dequantize_weight_into": (*weight, torch.empty(OUT, IN, dtype=dtype)),
        "quantize_absmax": (absmax, absmax.mean(), 32),
        "dequantize_absmax": (*codes, 32),
        "quantized_linear": (x, *weight, normal(OUT, seed=5)),
        "quantized_linear_grad_input": (gradient, *weight),
        "lora_linear": (x, *weight, None, *adapter),
        "lora_linear_backward": (gradient, x, normal(6, RANK, seed=6), *weight, *adapter, True),
    }[op.removesuffix("_kernel")]
