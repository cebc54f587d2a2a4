"""Blockwise quantization as registered torch ops, and the functions that check their arguments."""

from typing import Any

import torch
from torch import Tensor

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.checks import (
    check_block_size,
    check_dtype,
    check_nested,
    check_weight,
    dtype_name,
)
from qlora_lab.ops.blockwise.weight import WEIGHT_PARTS, WEIGHT_SCHEMA, WEIGHT_TENSORS, PackedWeight
from qlora_lab.ops.formats import format_named
from qlora_lab.ops.registry import register, register_differentiable


def quantize_blockwise_fake(weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
    packed = weight.new_empty(format_named(fmt).packed_bytes(weight.numel()), dtype=torch.uint8)
    blocks = (weight.numel() + block_size - 1) // block_size
    return packed, weight.new_empty(blocks, dtype=torch.float32)


def dequantize_weight_fake(packed: Tensor, *rest: Any) -> Tensor:
    *_, out_features, in_features, dtype = rest
    return packed.new_empty((out_features, in_features), dtype=dtype)


def quantize_absmax_fake(absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = (absmax.numel() + block_size - 1) // block_size
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(blocks)


def dequantize_absmax_fake(codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
    return nested_absmax.new_empty(codes.numel())


def quantized_linear_fake(x: Tensor, *parts: Any) -> Tensor:
    *_, out_features, _, _ = parts
    return x.new_empty((*x.shape[:-1], out_features))


def quantized_linear_grad_input_fake(grad_output: Tensor, *parts: Any) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], parts[-1]))


register(
    "quantize_blockwise(Tensor weight, str fmt, int block_size) -> (Tensor packed, Tensor absmax)",
    reference.quantize_blockwise,
    quantize_blockwise_fake,
)
register(
    f"dequantize_weight({WEIGHT_SCHEMA}, ScalarType dtype) -> Tensor",
    reference.dequantize_weight,
    dequantize_weight_fake,
)
register(
    f"dequantize_weight_into({WEIGHT_SCHEMA}, Tensor(a!) out) -> ()",
    reference.dequantize_weight_into,
    lambda *_: None,
)
register(
    "quantize_absmax(Tensor absmax, Tensor offset, int block_size) -> (Tensor codes, Tensor nested_absmax)",
    reference.quantize_absmax,
    quantize_absmax_fake,
)
register(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset, int block_size) -> Tensor",
    reference.dequantize_absmax,
    dequantize_absmax_fake,
)


class _QuantizedLinear(torch.autograd.Function):
    """Keeps the quantized weight for backward; never the expanded one, nor x. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.save_for_backward(*weight[:WEIGHT_TENSORS])
        ctx.layout = weight[WEIGHT_TENSORS:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return QUANTIZED_LINEAR(x, *weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input_with_gradients(grad_output, PackedWeight(*ctx.saved_tensors, *ctx.layout))
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None


class _GradInput(torch.autograd.Function):
    """The input's gradient, which is linear in grad_output: its own gradient is a product with the same weight."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, weight: PackedWeight) -> Tensor:
        ctx.save_for_backward(*weight[:WEIGHT_TENSORS])
        ctx.layout = weight[WEIGHT_TENSORS:]
        return QUANTIZED_LINEAR_GRAD_INPUT(grad_output, *weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return linear_with_gradients(grad, PackedWeight(*ctx.saved_tensors, *ctx.layout), None), None


def linear_with_gradients(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        outputs: Tensor = _QuantizedLinear.apply(x, bias, weight)
        return outputs
    return QUANTIZED_LINEAR(x, *weight, bias)


def grad_input_with_gradients(grad_output: Tensor, weight: PackedWeight) -> Tensor:
    if torch.is_grad_enabled() and grad_output.requires_grad:
        grad_x: Tensor = _GradInput.apply(grad_output, weight)
        return grad_x
    return QUANTIZED_LINEAR_GRAD_INPUT(grad_output, *weight)


QUANTIZED_LINEAR = register_differentiable(
    f"quantized_linear(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias) -> Tensor",
    reference.quantized_linear,
    quantized_linear_fake,
    lambda x, *parts: linear_with_gradients(x, PackedWeight(*parts[:WEIGHT_PARTS]), parts[WEIGHT_PARTS]),
)
QUANTIZED_LINEAR_GRAD_INPUT = register_differentiable(
    f"quantized_linear_grad_input(Tensor grad_output, {WEIGHT_SCHEMA}) -> Tensor",
    reference.quantized_linear_grad_input,
    quantized_linear_grad_input_fake,
    lambda grad_output, *parts: grad_input_with_gradients(grad_output, PackedWeight(*parts)),
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
    """Expand the codes of a weight of any shape; see `dequantize_weight`, of which this is the flat form.

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
    weight = PackedWeight(packed, absmax, None, None, fmt, block_size, block_size, 1, numel)
    return dequantize_weight(weight, dtype).view(-1)


def dequantize_weight(weight: PackedWeight, dtype: torch.dtype = torch.float32, *, out: Tensor | None = None) -> Tensor:
    """Expand a quantized matrix: level x absmax in float32, then rounded to `dtype`.

    Args:
        weight: with either kind of absmax.
        dtype: float32, bfloat16 or float16; that of `out` if it is given.
        out: (out_features, in_features), contiguous; written and returned instead of a new tensor.

    Returns:
        (out_features, in_features).

    Raises:
        ConfigError: unknown format, block size or dtype.
        ShapeError: parts that do not belong together, or an `out` of another shape.
    """
    weight.check()
    if out is None:
        check_dtype("dtype", dtype)
        return torch.ops.qlora_lab.dequantize_weight(*weight, dtype)
    weight.check_out(out)
    torch.ops.qlora_lab.dequantize_weight_into(*weight, out)
    return out


def quantize_absmax(absmax: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize absmax itself to 8 bits (double quantization): the mean is taken off, the rest goes in blocks.

    Args:
        absmax: (blocks,) float32.
        block_size: absmax values per second-level block, a power of two from 32 to 4096.

    Returns:
        codes, (blocks,) uint8 into the signed dynamic map (ops/formats.py); nested_absmax, (ceil(blocks / block_size),)
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
    # Above 32,768 blocks torch splits the sum among its threads: the last bit of the mean may depend on them.
    offset = absmax.mean()
    codes, nested_absmax = torch.ops.qlora_lab.quantize_absmax(absmax, offset, block_size)
    return codes, nested_absmax, offset


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


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight^T + bias for a frozen quantized weight.

    The weight is expanded for the product, in forward and again in backward, and never kept. Gradients flow to x
    and to the bias.

    Args:
        x: (..., in_features); float32, bfloat16 or float16, which is the dtype of the computation.
        weight: (out_features, in_features).
        bias: (out_features,) or None; cast to x's dtype.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        ConfigError: unknown format, block size or dtype.
        ShapeError: tensors that do not belong together.
    """
    weight.check_linear(x, bias)
    if torch.compiler.is_compiling():
        return torch.ops.qlora_lab.quantized_linear(x, *weight, bias)
    return linear_with_gradients(x, weight, bias)  # the op itself, without a way through torch's dispatcher
