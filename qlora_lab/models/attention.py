"""Attention in bfloat16 on a CPU: in float32 where that is faster, rounded once, and keeping nothing in float32.

Registered with transformers under NAME, beside its own "sdpa", which it calls wherever it has nothing to add. (Float32
stays with "sdpa": keeping each key head once spares SmolLM2-135M 47 MB of 1 GB, and costs 4 % of a training step.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lab.models.precision import product_dtype, training_attention_dtype, without_slow_autocast

NAME = "qlora_lab_cpu"  # without "sdpa", which transformers looks for in names


def use_fast_attention(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model that computes in bfloat16 on a CPU the attention of this module, not "sdpa"."""
    helps = training_attention_dtype(model.device.type, dtype, tokens=1) != dtype
    if helps and model.config._attn_implementation == "sdpa":
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
    device, dtype = query.device.type, query.dtype
    wide = training_attention_dtype(device, dtype, query.shape[2])
    if wide != dtype and _is_training_step(query, key, value, attention_mask, kwargs):
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mask = None if attention_mask is None else _bias(attention_mask, wide)
        output = _Attention.apply(query, key, value, mask, bool(causal) and mask is None, scale, wide)
        return output.transpose(1, 2).contiguous(), None
    if product_dtype(device, torch.bfloat16) == torch.bfloat16:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return result
    return _without_emulation(module, query, key, value, attention_mask, kwargs), None


AttentionInterface.register(NAME, cpu_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


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


def _is_training_step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether this is what torch's flash attention for the CPU takes, and a gradient is wanted."""
    return (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
        and query.device.type == "cpu"
        and not (torch.is_autocast_enabled("cpu") and query.dtype == torch.float32)  # which would change its dtype
        and not torch.compiler.is_compiling()
        and query.dtype == key.dtype == value.dtype
        and query.shape[-2:] == key.shape[-2:] == value.shape[-2:]
        and min(query.shape) > 0
        and not (mask is not None and (mask.requires_grad or mask.ndim != 4))
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("softcap", "position_bias", "cache"))
    )


def _bias(mask: Any, dtype: torch.dtype) -> Any:
    """Return a mask as what is added to the scores in `dtype`; a boolean one says where to attend."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


class _Attention(torch.autograd.Function):
    """torch's flash attention for the CPU, keeping key and value of each head once and everything in the given dtype.

    A group of query heads shares a key head, and the kernel wants a copy for each: these are made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        wide: torch.dtype,
    ) -> Tensor:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_widened(query, key, value, wide), 0.0, causal, attn_mask=mask, scale=scale
        )
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, logsumexp, mask)
        ctx.options = (causal, scale, wide)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, mask = ctx.saved_tensors
        causal, scale, wide = ctx.options
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad_output.to(wide), *_widened(query, key, value, wide), output.to(wide), logsumexp, 0.0, causal),
            attn_mask=mask,
            scale=scale,
        )
        groups = query.shape[1] // key.shape[1]
        grad_query, *grad_pair = gradients
        if groups > 1:
            grad_pair = [gradient.unflatten(1, (-1, groups)).sum(2) for gradient in grad_pair]
        return (*(gradient.to(query.dtype) for gradient in (grad_query, *grad_pair)), None, None, None, None)


def _widened(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> list[Tensor]:
    groups = query.shape[1] // key.shape[1]
    return [query.to(dtype), *(repeat_kv(part.to(dtype), groups) for part in (key, value))]
