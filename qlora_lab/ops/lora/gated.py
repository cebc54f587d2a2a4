"""A gated product and the quantized linear layer with an adapter after it, keeping two tensors for the backward pass.

`down(activation(gate) * up)` written out keeps four of the width of the MLP: the gate, the activated gate, up, and
their product for the gradient of lora_A. Here the last two are worked out again from the others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lab.ops.blockwise.weight import WEIGHT_TENSORS, PackedWeight
from qlora_lab.ops.lora.checks import check_lora_linear
from qlora_lab.ops.lora.op import LORA_LINEAR, LORA_LINEAR_BACKWARD, Adapter, as_kernels_take

Activation = Callable[[Tensor], Tensor]


def gated_lora_linear(
    activation: Activation,
    gate: Tensor,
    up: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    compute_dtype: torch.dtype,
    scaling: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Return `lora_linear` of activation(gate) * up, bit for bit; also its gradients are those of the two apart.

    Gradients flow to gate, up, lora_A and lora_B, once (not to their own gradients); the bias is frozen.

    Args:
        activation: elementwise, without parameters and without randomness: it is called again in backward.
        gate: (..., in_features), floating.
        up: as gate.
        compute_dtype: of the linear layer; the product is cast to it and the result back.

    The others, what is returned (in the product's dtype) and raised are those of `ops.lora.op.lora_linear`.
    """
    outputs: Tensor = _GatedLoraLinear.apply(
        gate, up, lora_A, lora_B, activation, compute_dtype, (scaling, dropout, seed), bias, weight
    )
    return outputs


class _GatedLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        activation: Activation,
        compute_dtype: torch.dtype,
        adapter: Adapter,
        bias: Tensor | None,
        weight: PackedWeight,
    ) -> Tensor:
        product = activation(gate) * up
        x = product.to(compute_dtype)
        check_lora_linear(x, weight, bias, lora_A, lora_B, adapter[1])
        out, low = LORA_LINEAR(x, *weight, bias, as_kernels_take(lora_A), as_kernels_take(lora_B), *adapter)
        ctx.save_for_backward(gate, up, lora_A, lora_B, low, *weight[:WEIGHT_TENSORS])
        ctx.layout, ctx.activation, ctx.adapter = weight[WEIGHT_TENSORS:], activation, adapter
        ctx.compute_dtype, ctx.product_dtype = compute_dtype, product.dtype
        return out.to(product.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, lora_A, lora_B, low, *weight = ctx.saved_tensors
        wants_gate, wants_up = ctx.needs_input_grad[:2]
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_(wants_gate)
            activated = ctx.activation(leaf)
        grad_x, grad_A, grad_B = LORA_LINEAR_BACKWARD(
            grad_output.to(ctx.compute_dtype),
            (activated.detach() * up).to(ctx.compute_dtype),
            low,
            *(*weight, *ctx.layout, as_kernels_take(lora_A), as_kernels_take(lora_B), *ctx.adapter),
            wants_gate or wants_up,
        )
        grad_product = grad_x.to(ctx.product_dtype)
        grad_up = (grad_product * activated.detach()).to(up.dtype) if wants_up else None
        grad_gate = None
        if wants_gate:
            (grad_gate,) = torch.autograd.grad(activated, leaf, grad_product.mul_(up).to(activated.dtype))
        return (grad_gate, grad_up, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), *[None] * 5)
