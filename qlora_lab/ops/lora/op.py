"""The product of a quantized linear layer and its LoRA adapter as one registered op."""

from typing import Any

import torch
from torch import Tensor

from qlora_lab.ops.blockwise.weight import WEIGHT_PARTS, WEIGHT_SCHEMA, WEIGHT_TENSORS, PackedWeight
from qlora_lab.ops.lora import reference
from qlora_lab.ops.lora.checks import check_lora_linear
from qlora_lab.ops.registry import register, register_differentiable

Adapter = tuple[float, float, int]  # scaling, dropout, seed
ADAPTER_SCHEMA = "Tensor lora_A, Tensor lora_B, float scaling, float dropout, int seed"


def lora_linear_fake(x: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    out_features, lora_A = parts[WEIGHT_PARTS - 2], parts[WEIGHT_PARTS + 1]
    out = x.new_empty((*x.shape[:-1], out_features))
    return out, x.new_empty((x.shape[:-1].numel(), lora_A.shape[0]), dtype=torch.float32)


def lora_linear_backward_fake(grad_output: Tensor, x: Tensor, low: Tensor, *parts: Any) -> tuple[Tensor, ...]:
    lora_A, lora_B, *_, needs_grad_x = parts[WEIGHT_PARTS:]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(lora_A), torch.empty_like(lora_B)


register(
    f"lora_linear_backward(Tensor grad_output, Tensor x, Tensor low, {WEIGHT_SCHEMA}, {ADAPTER_SCHEMA},"
    " bool needs_grad_x) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)",
    reference.lora_linear_backward,
    lora_linear_backward_fake,
)
LORA_LINEAR_BACKWARD = torch.ops.qlora_lab.lora_linear_backward.default


def as_kernels_take(matrix: Tensor) -> Tensor:
    """Return a matrix of the adapter in a dtype that its device's kernels read: on GPUs also bfloat16."""
    return matrix if matrix.is_cuda else matrix.float()


class _LoraLinear(torch.autograd.Function):
    """Keeps x, the low-rank product, the packed weight and the adapter: nothing of the size of the dense weight.

    A bfloat16 adapter is kept as it is; what CPU kernels take is float32, and there only while a product runs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        weight: PackedWeight,
        adapter: Adapter,
    ) -> tuple[Tensor, Tensor]:
        out, low = LORA_LINEAR(x, *weight, bias, as_kernels_take(lora_A), as_kernels_take(lora_B), *adapter)
        ctx.mark_non_differentiable(low)
        ctx.set_materialize_grads(False)  # or zeros would be made for `low` in every backward
        ctx.save_for_backward(x, low, lora_A, lora_B, *weight[:WEIGHT_TENSORS])
        ctx.layout, ctx.adapter = weight[WEIGHT_TENSORS:], adapter
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out, low

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, lora_A, lora_B, *weight = ctx.saved_tensors
        wants_x, wants_bias = ctx.needs_input_grad[:2]
        grad_x, grad_A, grad_B = LORA_LINEAR_BACKWARD(
            *(grad_output, x, low, *weight, *ctx.layout, as_kernels_take(lora_A), as_kernels_take(lora_B)),
            *(*ctx.adapter, wants_x),
        )
        grad_bias = None
        if wants_bias:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0, dtype=ctx.bias_dtype)
        grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        return grad_x if wants_x else None, grad_bias, grad_A, grad_B, None, None


def lora_linear_with_gradients(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (
        x.requires_grad or lora_A.requires_grad or lora_B.requires_grad or (bias is not None and bias.requires_grad)
    ):
        outputs: tuple[Tensor, Tensor] = _LoraLinear.apply(x, bias, lora_A, lora_B, weight, adapter)
        return outputs
    result: tuple[Tensor, Tensor] = LORA_LINEAR(
        x, *weight, bias, as_kernels_take(lora_A), as_kernels_take(lora_B), *adapter
    )
    return result


def lora_linear_of_parts(x: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
    bias, lora_A, lora_B, *adapter = parts[WEIGHT_PARTS:]
    return lora_linear_with_gradients(x, PackedWeight(*parts[:WEIGHT_PARTS]), bias, lora_A, lora_B, tuple(adapter))


LORA_LINEAR = register_differentiable(
    f"lora_linear(Tensor x, {WEIGHT_SCHEMA}, Tensor? bias, {ADAPTER_SCHEMA}) -> (Tensor out, Tensor low)",
    reference.lora_linear,
    lora_linear_fake,
    lora_linear_of_parts,
)


def lora_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Return x @ weight^T + bias + scaling * (drop(x) @ lora_A^T) @ lora_B^T.

    Gradients flow to x, the bias, lora_A and lora_B, once (not to their own gradients).

    Args:
        x: (..., in_features); float32, bfloat16 or float16, which is the dtype of the computation.
        weight: (out_features, in_features), frozen.
        bias: (out_features,) or None.
        lora_A: (rank, in_features), float32 or bfloat16.
        lora_B: (out_features, rank), as lora_A.
        scaling: factor of the adapter's product.
        dropout: share of the elements of x that the adapter does not see, in [0, 1); see `dropout.drop`.
        seed: of those elements; the same seed drops the same ones, in backward too.

    Returns:
        (..., out_features) in x's dtype.

    Raises:
        ConfigError: unknown format, block size or dtype, or a seed of more than 64 bits.
        ShapeError: tensors that do not belong together.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    check_lora_linear(x, weight, bias, lora_A, lora_B, dropout, seed)
    adapter = (scaling, dropout, seed)
    if torch.compiler.is_compiling():
        out, _ = torch.ops.qlora_lab.lora_linear(x, *weight, bias, lora_A, lora_B, *adapter)
    else:  # the op itself, without a way through torch's dispatcher
        out, _ = lora_linear_with_gradients(x, weight, bias, lora_A, lora_B, adapter)
    return out
