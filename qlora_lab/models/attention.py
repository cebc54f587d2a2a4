"""Attention on a CPU: by our own kernels, which keep each input once and nothing of a score's size.

Registered with transformers under NAME, beside its own "sdpa", which is called wherever there is no kernel: for a token
after others as in generation, for biases, dropout and caps of the scores. What that would compute in bfloat16 where the
machine emulates it is computed in float32 and rounded once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lab.models.precision import product_dtype, without_slow_autocast
from qlora_lab.ops.native.attention import NativeAttention
from qlora_lab.ops.registry import KERNELS

NAME = "qlora_lab_cpu"  # without "sdpa", which transformers looks for in names


def use_fast_attention(model: PreTrainedModel) -> None:
    """Give a model on a CPU the attention of this module, not "sdpa"."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return scaled dot product attention in the dtype of the query.

    Args:
        query: (rows, heads, tokens, head size).
        key, value: (rows, key and value heads, tokens so far, head size).
        attention_mask: True where a token is attended to, or a bias of the scores; None leaves it to `is_causal`.

    Returns:
        (rows, tokens, heads, head size), and None for the weights.
    """
    parts = _as_autocast_wants(query, key, value)
    if _is_plain(kwargs) and NativeAttention.takes(*parts, attention_mask):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        options = {"causal": bool(causal) and attention_mask is None}
        options["scale"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
        output: Tensor = _Attention.apply(*parts, attention_mask, options)
        return output, None
    if product_dtype(query.device.type, torch.bfloat16) == torch.bfloat16:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return result
    return _without_emulation(module, query, key, value, attention_mask, kwargs), None


AttentionInterface.register(NAME, cpu_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _as_autocast_wants(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what attention of torch's own would get: all in autocast's dtype, where that is on."""
    if not torch.is_autocast_enabled("cpu") or query.device.type != "cpu":
        return query, key, value
    dtype = torch.get_autocast_dtype("cpu")
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether the kernels are there, and nothing is asked for that they do not do."""
    return (
        KERNELS.library is not None
        and not torch.compiler.is_compiling()
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "position_bias", "cache"))
    )


class _Attention(torch.autograd.Function):
    """Native attention; of what is as large as the scores nothing is kept, and heads that share a key share it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        assert KERNELS.library is not None  # see _is_plain
        ctx.attention = NativeAttention(KERNELS.library, **options)
        output, logsumexp = ctx.attention.forward(query, key, value, mask)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, output, logsumexp = ctx.saved_tensors
        return (*ctx.attention.backward(inputs, output, logsumexp, grad_output), None, None)


def _without_emulation(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """Return what transformers' "sdpa" does of the same in float32, in the query's dtype."""
    wide = product_dtype(query.device.type, query.dtype)
    if wide != query.dtype:
        options = {name: _bias(given, wide) if name == "position_bias" else given for name, given in options.items()}
        mask = _bias(mask, wide)
    with without_slow_autocast(query.device.type):
        output, _ = sdpa_attention_forward(module, query.to(wide), key.to(wide), value.to(wide), mask, **options)
    return output.to(query.dtype)


def _bias(mask: Any, dtype: torch.dtype) -> Any:
    """Return a mask as what is added to the scores in `dtype`; a boolean one says where to attend."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
