"""Gated MLPs that keep less for the backward pass.

Llama, Mistral, Qwen and Gemma have the same one: down_proj(act_fn(gate_proj(x)) * up_proj(x)).
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN

# The classes of transformers that compute this and nothing more (others may, and are left as they are).
GATED_MLPS = {
    f"transformers.models.{family}.modeling_{family}.{name}"
    for family, name in (
        *(("llama", "LlamaMLP"), ("mistral", "MistralMLP"), ("smollm3", "SmolLM3MLP")),
        *(("qwen2", "Qwen2MLP"), ("qwen3", "Qwen3MLP")),
        *(("gemma", "GemmaMLP"), ("gemma2", "Gemma2MLP"), ("gemma3", "Gemma3MLP")),
    )
}
PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
SILUS = {type(ACT2FN[name]) for name in ("silu", "swish")}  # classes: transformers' own, and torch's
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@runtime_checkable
class TakesGatedProduct(Protocol):
    """A linear layer that can work out the product before it a second time instead of keeping it."""

    @property
    def can_take_gated_product(self) -> bool:
        """Whether it can at the moment."""

    def of_gated_product(self, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        """Return what the layer gives for activation(gate) * up; see `ops.lora.gated.gated_lora_linear`."""


class GatedMlp(nn.Module):
    """y = down_proj(act_fn(gate_proj(x)) * up_proj(x)), with the layers of the module it stands for, by their names.

    While training, the activated gate and the product are not kept for the backward pass but worked out again, where
    down_proj can do that and nobody watches it or act_fn through hooks.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in PARTS:
            self.add_module(name, mlp.get_submodule(name))
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., hidden size) for x, (..., hidden size)."""
        activation, down = self.act_fn, self.down_proj
        gate, up = self.gate_proj(x), self.up_proj(x)
        if (
            torch.is_grad_enabled()
            and isinstance(down, TakesGatedProduct)
            and down.can_take_gated_product
            and not _is_watched(activation, down)
        ):
            return down.of_gated_product(F.silu if _is_silu(activation) else activation, gate, up)
        result: Tensor = down(activation(gate) * up)
        return result


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is a gated MLP and nothing more, so that a GatedMlp computes the same."""
    kind = type(module)
    return (
        f"{kind.__module__}.{kind.__qualname__}" in GATED_MLPS
        and "forward" not in vars(module)
        and {name for name, _ in module.named_children()} == set(PARTS)
        and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        and not module.get_submodule("act_fn").state_dict()
        and not _is_watched(module)
    )


def _is_silu(activation: nn.Module) -> bool:
    """Whether a module computes what `F.silu` does, so that its product may run native kernels."""
    return type(activation) in SILUS and "forward" not in vars(activation)


def _is_watched(*modules: nn.Module) -> bool:
    watched = any(getattr(part, hooks) for module in modules for part in module.modules() for hooks in HOOKS)
    return watched or _has_any_global_hook()
