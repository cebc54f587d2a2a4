"""The dtype of a model's products where it is not that of its weights."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_lab.config import hardware
from qlora_lab.ops.blockwise.checks import DTYPES, dtype_name


@cache
def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which attention and output head multiply on this machine; see `config.hardware`.

    Args:
        device: its type, "cpu" or "cuda".
        dtype: of what they get, and of what they give back.
    """
    name = hardware.product_dtype(hardware.detect(), device, dtype_name(dtype))
    return DTYPES.get(name, dtype)


def has_slow_products(tensor: Tensor) -> bool:
    """Whether this machine multiplies tensors like this one faster in another dtype."""
    return product_dtype(tensor.device.type, tensor.dtype) != tensor.dtype


def computing_in(model: PreTrainedModel, compute_dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context in which a model of float32 weights computes in `compute_dtype`; others compute as they are.

    Full fine-tuning keeps every weight in float32, since small steps vanish in 16 bits. (Frozen weights are in
    compute_dtype themselves, and quantized layers bring their own.)
    """
    float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if compute_dtype == torch.float32 or not float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype=compute_dtype)


def without_slow_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which products on a device ("cpu", "cuda") are in no dtype that this machine emulates."""
    dtype = torch.get_autocast_dtype(device)
    if torch.is_autocast_enabled(device) and product_dtype(device, dtype) != dtype:
        return torch.autocast(device, enabled=False)
    return nullcontext()
