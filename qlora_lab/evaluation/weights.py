"""Whether evaluation keeps the expanded weights of a quantized model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from qlora_lab.quant.linear import QuantizedLinear, cached_weights

# Expanding once saves small models much time over hundreds of short forwards (SmolLM2-135M in float32: 0.4 GB). A big
# model (65B in bfloat16: 130 GB) would not fit beside itself, and has enough work in each forward to expand for.
DENSE_LIMIT_BYTES = 2_000_000_000


def dense_bytes(model: nn.Module) -> int:
    """Return the memory of all quantized weights when expanded."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sum(layer.in_features * layer.out_features * layer.compute_dtype.itemsize for layer in layers)


def cached_if_small(model: nn.Module, limit_bytes: int = DENSE_LIMIT_BYTES) -> AbstractContextManager[Any]:
    """Return `cached_weights` for a model whose expanded weights stay within the limit; else nothing, and say so."""
    needed = dense_bytes(model)
    if needed <= limit_bytes:
        return cached_weights(model)
    print(
        "the quantized weights are decoded anew for every product: kept expanded, they would take "
        f"{needed / 1e9:.1f} GB, above the limit of {limit_bytes / 1e9:g} GB",
        flush=True,
    )
    return nullcontext()
