"""Blockwise quantization as registered torch ops, and the functions that check their arguments.

The reference is registered for every device; a native library registers the same names for CPU or CUDA, which
take precedence, and nothing above this file changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.checks import (
    check_block_size,
    check_dtype,
    check_nested,
    check_packed,
    check_weight,
    dtype_name,
)
from qlora_lab.ops.formats import format_named

LIBRARY = torch.library.Library("qlora_lab", "FRAGMENT")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op with the reference as its kernel on every device, and what its result looks like."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qlora_lab::{name}", fake, lib=LIBRARY)


def quantize_blockwise_fake(weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
    packed = weight.new_empty(format_named(fmt).packed_bytes(weight.numel()), dtype=torch.uint8)
    blocks = (weight.numel() + block_size - 1) // block_size
    return packed, weight.new_empty(blocks, dtype=torch.float32)


def dequantize_blockwise_fake(
    packed: Tensor, absmax: Tensor, fmt: str, block_size: int, numel: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


def quantize_absmax_fake(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    blocks = (absmax.numel() + block_size - 1) // block_size
    return codes, absmax.new_empty(blocks), absmax.new_empty(())


def dequantize_absmax_fake(codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    return nested_absmax.new_empty(codes.numel())


def quantized_linear_fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    fmt: str,
    block_size: int,
    nested_block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def quantized_linear_grad_input_fake(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    fmt: str,
    block_size: int,
    nested_block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


register(
    "quantize_blockwise(Tensor weight, str fmt, int block_size) -> (Tensor packed, Tensor absmax)",
    reference.quantize_blockwise,
    quantize_blockwise_fake,
)
register(
    "dequantize_blockwise(Tensor packed, Tensor absmax, str fmt, int block_size, SymInt numel, ScalarType dtype)"
    " -> Tensor",
    reference.dequantize_blockwise,
    dequantize_blockwise_fake,
)
register(
    "quantize_absmax(Tensor absmax, int block_size) -> (Tensor codes, Tensor nested_absmax, Tensor offset)",
    reference.quantize_absmax,
    quantize_absmax_fake,
)
register(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset, int block_size) -> Tensor",
    reference.dequantize_absmax,
    dequantize_absmax_fake,
)
register(
    "quantized_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? bias,"
    " str fmt, int block_size, int nested_block_size, int out_features, int in_features) -> Tensor",
    reference.quantized_linear,
    quantized_linear_fake,
)
register(
    "quantized_linear_grad_input(Tensor grad_output, Tensor packed, Tensor absmax, Tensor? nested_absmax,"
    " Tensor? offset, str fmt, int block_size, int nested_block_size, int out_features, int in_features) -> Tensor",
    reference.quantized_linear_grad_input,
    quantized_linear_grad_input_fake,
)


def save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the quantized weight for the backward of `quantized_linear`; never the expanded one, nor x."""
    _, packed, absmax, nested_absmax, offset, bias, *ctx.layout = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)
    ctx.bias_dtype = None if bias is None else bias.dtype


def quantized_linear_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients for x and the bias; the quantized weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qlora_lab.quantized_linear_grad_input(grad_output, *ctx.saved_tensors, *ctx.layout)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0, dtype=ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None


def save_weight_of_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, offset, *ctx.layout = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, offset)


def grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient for grad_output: the input's gradient is linear in it, with the same weight."""
    grad_output = torch.ops.qlora_lab.quantized_linear(grad, *ctx.saved_tensors, None, *ctx.layout)
    return grad_output, None, None, None, None, None, None, None, None, None


torch.library.register_autograd(
    "qlora_lab::quantized_linear", quantized_linear_backward, setup_context=save_weight, lib=LIBRARY
)
torch.library.register_autograd(
    "qlora_lab::quantized_linear_grad_input",
    grad_input_backward,
    setup_context=save_weight_of_grad_input,
    lib=LIBRARY,
)


def quantize_blockwise(weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight in blocks that share one absmax.

    Each value is multiplied by the rounded reciprocal of its block's absmax and gets the code of the nearest
    level, the lower one at a tie. A block with a NaN or an infinity keeps it in absmax and so decodes to NaN.

    Args:
        weight: any shape, N elements; float32, bfloat16 or float16. No gradient flows through it.
        fmt: a name of `ops.formats.FORMATS`.
        block_size: weights per block, a power of two from 32 to 4096; the last block may be shorter.

    Returns:
        packed, ((N + 1) // 2,) uint8 for 4-bit formats, the even element in the high half of a byte, or (N,)
        uint8 for 8-bit ones; absmax, (ceil(N / block_size),) float32.

    Raises:
        ConfigError: unknown format, block size or dtype.
        ShapeError: the weight is empty.

    Source: Dettmers et al. 2023, "QLoRA", section 3; bytes equal bitsandbytes' on CPU for nf4 and fp4_e2m1.
    """
    format_named(fmt)
    check_block_size("block_size", block_size)
    check_weight(weight)
    return torch.ops.qlora_lab.quantize_blockwise(weight.detach(), fmt, block_size)


def dequantize_blockwise(
    packed: Tensor, absmax: Tensor, fmt: str, block_size: int, numel: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Expand codes to weights: level x absmax in float32, then rounded to `dtype`.

    Args:
        packed: uint8 codes as `quantize_blockwise` returns them.
        absmax: (ceil(numel / block_size),) float32.
        fmt: the format they were quantized in.
        block_size: weights per block.
        numel: weights to return; an odd number leaves half of the last byte unused.
        dtype: float32, bfloat16 or float16.

    Returns:
        (numel,) of `dtype`.

    Raises:
        ConfigError: unknown format, block size or dtype.
        ShapeError: `packed` or `absmax` does not belong to `numel` weights.
    """
    check_block_size("block_size", block_size)
    check_dtype("dtype", dtype)
    check_packed(packed, absmax, fmt, block_size, numel)
    return torch.ops.qlora_lab.dequantize_blockwise(packed, absmax, fmt, block_size, numel, dtype)


def quantize_absmax(absmax: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize absmax itself to 8 bits (double quantization): the mean is taken off, the rest goes in blocks.

    Args:
        absmax: (blocks,) float32.
        block_size: absmax values per second-level block, a power of two from 32 to 4096.

    Returns:
        codes, (blocks,) uint8 into `ops.formats.signed_dynamic_map`; nested_absmax, (ceil(blocks / block_size),)
        float32; offset, 0-d float32, the mean.

    Raises:
        ConfigError: block size.
        ShapeError: `absmax` is not a non-empty float32 vector.

    Source: Dettmers et al. 2023, "QLoRA", section 3; codes equal bitsandbytes' on CPU.
    """
    check_block_size("block_size", block_size)
    if absmax.dtype != torch.float32 or absmax.dim() != 1 or absmax.numel() == 0:
        raise ShapeError(
            f"absmax must be a non-empty float32 vector; got {dtype_name(absmax.dtype)} of shape {tuple(absmax.shape)}"
        )
    return torch.ops.qlora_lab.quantize_absmax(absmax, block_size)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int = 256) -> Tensor:
    """Expand a doubly quantized absmax: level x nested_absmax + offset.

    Args:
        codes, nested_absmax, offset: as `quantize_absmax` returns them.
        block_size: absmax values per second-level block.

    Returns:
        (codes.numel(),) float32.

    Raises:
        ConfigError: block size.
        ShapeError: the three parts do not belong together.
    """
    check_block_size("block_size", block_size)
    check_nested(codes, nested_absmax, offset, block_size)
    return torch.ops.qlora_lab.dequantize_absmax(codes, nested_absmax, offset, block_size)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    fmt: str,
    block_size: int,
    nested_block_size: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    """Return x @ weight^T + bias for a frozen quantized weight of shape (out_features, in_features).

    The weight is expanded to x's dtype for the product, in forward and again in backward, and never kept.
    Gradients flow to x and to the bias.

    Args:
        x: (..., in_features); float32, bfloat16 or float16, which is the dtype of the computation.
        packed: uint8 codes of the weight, row by row.
        absmax: float32 per block, or uint8 codes where it was quantized again.
        nested_absmax, offset: of the second quantization, or None and None.
        bias: (out_features,) or None; cast to x's dtype.
        fmt: the weight's format.
        block_size: weights per block.
        nested_block_size: absmax values per second-level block; not used without one.
        out_features, in_features: the weight's shape.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        ConfigError: unknown format, block size or dtype.
        ShapeError: tensors that do not belong together.
    """
    check_dtype("the dtype of x", x.dtype)
    check_block_size("block_size", block_size)
    check_packed(packed, absmax, fmt, block_size, out_features * in_features)
    if x.shape[-1] != in_features:
        raise ShapeError(f"x must have {in_features} features in its last dimension; got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"bias must have shape ({out_features},); got {tuple(bias.shape)}")
    if (nested_absmax is None) != (offset is None):
        raise ShapeError("nested_absmax and offset belong together; got only one of them")
    if nested_absmax is not None and offset is not None:
        check_block_size("nested_block_size", nested_block_size)
        check_nested(absmax, nested_absmax, offset, nested_block_size)
    return torch.ops.qlora_lab.quantized_linear(
        x,
        packed,
        absmax,
        nested_absmax,
        offset,
        bias,
        fmt,
        block_size,
        nested_block_size,
        out_features,
        in_features,
    )
