"""Refusals shared by the blockwise functions: what was given, what is allowed, what to try.

Also called before every kernel that goes through ctypes, where an op that is called by its own name is not checked by
the function around it: a pointer to too little, or to another dtype, would end the process or read what is not there.
"""

import torch
from torch import Tensor

from qlora_lab.errors import ConfigError, ShapeError
from qlora_lab.ops.formats import format_named

SMALLEST_BLOCK = 32
LARGEST_BLOCK = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_block_size(key: str, block_size: int) -> None:
    """Raise ConfigError unless `block_size` is a power of two from 32 to 4096; `key` names it."""
    is_one = isinstance(block_size, int) and SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK
    if not is_one or block_size & (block_size - 1):
        raise ConfigError(f"{key} must be a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}; got {block_size!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as configurations write it: `float32`."""
    return str(dtype).removeprefix("torch.")


def check_dtype(key: str, dtype: torch.dtype) -> None:
    """Raise ConfigError unless `dtype` is one that weights are read from and expanded to; `key` names it."""
    if dtype not in DTYPES.values():
        raise ConfigError(f"{key} must be one of {', '.join(DTYPES)}; got {dtype_name(dtype)}")


def check_weight(weight: Tensor) -> None:
    """Raise unless `weight` holds something that can be quantized."""
    if not isinstance(weight, Tensor):
        raise ConfigError(f"the weight must be a tensor of torch; got {type(weight).__name__}")
    check_dtype("the dtype of the weight", weight.dtype)
    if weight.numel() == 0:
        raise ShapeError(f"the weight has no elements (shape {tuple(weight.shape)}); there is nothing to quantize")


def check_packed(packed: Tensor, absmax: Tensor, fmt: str, block_size: int, numel: int) -> None:
    """Raise ShapeError unless `packed` and `absmax` belong to `numel` weights in blocks of `block_size`."""
    expected = format_named(fmt).packed_bytes(numel)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise ShapeError(
            f"{numel} weights in {fmt} take {expected} bytes (uint8), but packed is {packed.numel()} of "
            f"{dtype_name(packed.dtype)}; was it quantized in another format or from another shape?"
        )
    blocks = -(-numel // block_size)
    if absmax.numel() != blocks:
        raise ShapeError(
            f"{numel} weights make {blocks} blocks of {block_size}, but absmax has {absmax.numel()}; "
            "was it quantized with another block_size?"
        )


def check_nested(codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> None:
    """Raise ShapeError unless the three parts of a doubly quantized absmax belong together."""
    if codes.dtype != torch.uint8:
        raise ShapeError(
            f"a doubly quantized absmax is uint8 codes, but it is {dtype_name(codes.dtype)}; "
            "leave out nested_absmax and offset if it was not quantized again"
        )
    blocks = -(-codes.numel() // block_size)
    if nested_absmax.numel() != blocks or offset.numel() != 1:
        raise ShapeError(
            f"{codes.numel()} absmax codes make {blocks} blocks of {block_size} and one offset, but nested_absmax "
            f"has {nested_absmax.numel()} and offset {offset.numel()}; was it quantized with another block size?"
        )
    if nested_absmax.dtype != torch.float32 or offset.dtype != torch.float32:
        raise ShapeError(
            f"nested_absmax and offset must be float32; got {dtype_name(nested_absmax.dtype)} and "
            f"{dtype_name(offset.dtype)}"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ShapeError unless two tensors are on one device: kernels would take an address for one of their own."""
    if tensor.device != other.device:
        is_empty = "meta" in (tensor.device.type, other.device.type)
        hint = "; a tensor on meta has no values: load it first" if is_empty else ""
        raise ShapeError(f"{name} is on {tensor.device} and {other_name} on {other.device}{hint}")
