"""Attention for CPUs that emulate bfloat16: computed in float32 and rounded once.

Registered with transformers under NAME, beside its own "sdpa".
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qlora_lab.models.precision import product_dtype

NAME = "qlora_lab_float32"  # without "sdpa", which transformers looks for in names


def float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return scaled dot product attention in the dtype of the query, computed in float32.

    Args:
        query: (rows, heads, tokens, head size).
        key, value: (rows, key and value heads, tokens so far, head size).
        attention_mask: boolean, or to be added to the scores.

    Returns:
        (rows, tokens, heads, head size), and None for the weights.
    """
    bias = {name: value.float() for name, value in kwargs.items() if name == "position_bias" and value is not None}
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **{**kwargs, **bias}
    )
    return output.to(query.dtype), None


AttentionInterface.register(NAME, float32_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_attention(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Let attention compute in float32 where this machine is slow in `compute_dtype`; models without SDPA stay."""
    slow = product_dtype(model.device.type, compute_dtype) != compute_dtype
    if slow and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
