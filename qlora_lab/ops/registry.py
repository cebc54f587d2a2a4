"""Where the ops of this package are registered, with the kernels that run them."""

from collections.abc import Callable
from typing import Any

import torch

from qlora_lab.ops.native.load import load_cuda_kernels, load_kernels

LIBRARY = torch.library.Library("qlora_lab", "FRAGMENT")
KERNELS = load_kernels(LIBRARY)  # of CPU tensors
CUDA_KERNELS = load_cuda_kernels(LIBRARY)  # of CUDA tensors; on other devices the references run


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op: the reference runs it wherever no native kernel does, `fake` says what its result looks like."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qlora_lab::{name}", fake, lib=LIBRARY)
