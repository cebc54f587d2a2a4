"""The dtype of a model's products where it is not that of its weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel


def computing_in(model: PreTrainedModel, compute_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which a model of float32 weights computes in `compute_dtype`; others compute as they are.

    Full fine-tuning keeps every weight in float32, since small steps vanish in 16 bits. (Frozen weights are in
    compute_dtype themselves, and quantized layers bring their own.)
    """
    float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if compute_dtype == torch.float32 or not float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=compute_dtype)
