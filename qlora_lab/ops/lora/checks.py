"""Refusals of the adapter's product, beside those of the weight under it (ops/blockwise/weight.py)."""

import torch
from torch import Tensor

from qlora_lab.errors import ConfigError, ShapeError
from qlora_lab.ops.blockwise.checks import check_same_device, dtype_name
from qlora_lab.ops.blockwise.weight import PackedWeight, check_input

ADAPTER_DTYPES = (torch.float32, torch.bfloat16)
LARGEST_SEED = 2**63 - 1  # of an int in an op's schema


def check_lora_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, dropout: float, seed: int
) -> None:
    """Raise ConfigError or ShapeError unless they are what `lora_linear` takes."""
    weight.check_linear(x, bias)
    check_adapter(weight, lora_A, lora_B, dropout)
    if not isinstance(seed, int | torch.SymInt) or not -LARGEST_SEED - 1 <= seed <= LARGEST_SEED:
        raise ConfigError(f"the seed of dropout must be an integer from -2^63 to 2^63 - 1; got {seed!r}")


def check_adapter(weight: PackedWeight, lora_A: Tensor, lora_B: Tensor, dropout: float) -> None:
    """Raise ShapeError unless the matrices are an adapter of the weight."""
    rank = lora_A.shape[0] if lora_A.dim() else 0
    if lora_A.shape != (rank, weight.in_features) or lora_B.shape != (weight.out_features, rank):
        raise ShapeError(
            f"lora_A must be (rank, {weight.in_features}) and lora_B ({weight.out_features}, rank); "
            f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    if lora_A.dtype not in ADAPTER_DTYPES or lora_B.dtype != lora_A.dtype:
        raise ShapeError(
            "lora_A and lora_B must both be float32 or both bfloat16; got "
            f"{dtype_name(lora_A.dtype)} and {dtype_name(lora_B.dtype)}"
        )
    check_same_device("lora_A", lora_A, "the weight", weight.packed)
    check_same_device("lora_B", lora_B, "the weight", weight.packed)
    if not 0.0 <= dropout < 1.0:
        raise ShapeError(f"dropout must be at least 0 and less than 1; got {dropout}")


def check_lora_gradients(grad_output: Tensor, x: Tensor, low: Tensor, weight: PackedWeight, rank: int) -> None:
    """Raise ConfigError or ShapeError unless they are what the gradients of `lora_linear` are worked out from."""
    weight.check_linear(x, None)
    check_input("grad_output", grad_output, weight.out_features)
    rows = x.shape[:-1].numel()
    if grad_output.dtype != x.dtype or grad_output.shape[:-1].numel() != rows or low.shape != (rows, rank):
        raise ShapeError(
            f"grad_output, x and low do not belong together: {tuple(grad_output.shape)} of "
            f"{dtype_name(grad_output.dtype)}, {tuple(x.shape)} of {dtype_name(x.dtype)} and {tuple(low.shape)}"
        )
    if low.dtype != torch.float32:
        raise ShapeError(f"low must be float32; got {dtype_name(low.dtype)}")
