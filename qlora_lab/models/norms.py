"""Root mean square norms on a CPU by our own kernels, which keep what they get once, not in float32 beside it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qlora_lab.ops.native.norm import NativeRmsNorm
from qlora_lab.ops.registry import KERNELS

# The classes of transformers that compute this and nothing more (Gemma's adds one to the weight, T5's rounds later).
RMS_NORMS = {
    f"transformers.models.{family}.modeling_{family}.{name}"
    for family, name in (
        *(("llama", "LlamaRMSNorm"), ("mistral", "MistralRMSNorm"), ("smollm3", "SmolLM3RMSNorm")),
        *(("qwen2", "Qwen2RMSNorm"), ("qwen3", "Qwen3RMSNorm")),
    )
}


def use_fast_norms(model: PreTrainedModel) -> None:
    """Let the norms of a model run native kernels wherever these can; they keep their names, parameters and values."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for module in model.modules():
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" in RMS_NORMS:
            kinds.setdefault(kind, type(f"Native{kind.__name__}", (_NativeForward, kind), {}))
            module.__class__ = kinds[kind]


class _NativeForward(nn.Module):
    """The forward pass of a norm; where there is no kernel, that of the class beside this one."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        takes = NativeRmsNorm.takes(hidden_states, self.weight)
        if KERNELS.library is None or not takes or torch.compiler.is_compiling():
            other: Tensor = super().forward(hidden_states)
            return other
        result: Tensor = _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert KERNELS.library is not None  # see _NativeForward
        ctx.norm = NativeRmsNorm(KERNELS.library)
        x = x.contiguous()
        out, scales = ctx.norm.forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.norm.backward(grad_output, *ctx.saved_tensors), None, None
