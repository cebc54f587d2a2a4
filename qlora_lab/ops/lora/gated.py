"""A gated product and the quantized linear layer with an adapter after it, keeping two tensors for the backward pass.

`down(activation(gate) * up)` written out keeps four of the width of the MLP: the gate, the activated gate, up, and
their product for the gradient of lora_A. Here the activated gate and the product are worked out again from the others,
for SiLU on a CPU by a native kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_lab.ops.blockwise.weight import WEIGHT_TENSORS, PackedWeight
from qlora_lab.ops.lora.checks import check_lora_linear
from qlora_lab.ops.lora.op import LORA_LINEAR, LORA_LINEAR_BACKWARD, Adapter, as_kernels_take
from qlora_lab.ops.native.gate import NativeGate
from qlora_lab.ops.registry import KERNELS

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
    """Return `lora_linear` of activation(gate) * up.

    Gradients flow to gate, up, lora_A and lora_B, once (not to their own gradients); the bias is frozen. Values and
    gradients are those of torch's operators and `lora_linear` apart, bit for bit; where `torch.nn.functional.silu` has
    native kernels, its product and the gradients of gate and up are worked out in float32 and rounded once: in float32
    they differ by a few units in the last place, in bfloat16 by the roundings between torch's operators.

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
        native = _native_gate(activation, gate, up)
        product = activation(gate) * up if native is None else native.forward(gate, up)
        x = product.to(compute_dtype)
        check_lora_linear(x, weight, bias, lora_A, lora_B, *adapter[1:])
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
        product = _ProductAgain(ctx.activation, gate, up, wants_gate)
        grad_x, grad_A, grad_B = LORA_LINEAR_BACKWARD(
            grad_output.to(ctx.compute_dtype),
            product.value().to(ctx.compute_dtype),
            low,
            *(*weight, *ctx.layout, as_kernels_take(lora_A), as_kernels_take(lora_B), *ctx.adapter),
            wants_gate or wants_up,
        )
        grad_gate, grad_up = product.gradients(grad_x.to(ctx.product_dtype), wants_up)
        return (grad_gate, grad_up, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), *[None] * 5)


class _ProductAgain:
    """activation(gate) * up for the backward pass, and the gradients of the two, where they want any."""

    def __init__(self, activation: Activation, gate: Tensor, up: Tensor, wants_gate: bool) -> None:
        self._gate, self._up, self._wants_gate = gate, up, wants_gate
        self._native = _native_gate(activation, gate, up)
        if self._native is None:
            with torch.enable_grad():
                self._leaf = gate.detach().requires_grad_(wants_gate)
                self._activated = activation(self._leaf)

    def value(self) -> Tensor:
        if self._native is not None:
            return self._native.forward(self._gate, self._up)
        return self._activated.detach() * self._up

    def gradients(self, grad_product: Tensor, wants_up: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return them for that of the product, which is overwritten."""
        if not (self._wants_gate or wants_up):
            return None, None
        if self._native is not None:
            return self._native.backward(grad_product, self._gate, self._up)
        activated, grad_gate = self._activated, None
        grad_up = (grad_product * activated.detach()).to(self._up.dtype) if wants_up else None
        if self._wants_gate:
            (grad_gate,) = torch.autograd.grad(activated, self._leaf, grad_product.mul_(self._up).to(activated.dtype))
        return grad_gate, grad_up


def _native_gate(activation: Activation, gate: Tensor, up: Tensor) -> NativeGate | None:
    """Return the kernels for a product, where there are any."""
    takes = activation is F.silu and NativeGate.takes(gate, up)
    if KERNELS.library is None or not takes or torch.compiler.is_compiling():
        return None
    return NativeGate(KERNELS.library)
