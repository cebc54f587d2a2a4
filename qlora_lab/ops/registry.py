"""Where the ops of this package are registered, with the kernels that run them."""

from collections.abc import Callable
from typing import Any

import torch

from qlora_lab.ops.native.load import DIFFERENTIABLE, kernel_of, load_cuda_kernels, load_kernels

LIBRARY = torch.library.Library("qlora_lab", "FRAGMENT")
KERNELS = load_kernels(LIBRARY)  # of CPU tensors
CUDA_KERNELS = load_cuda_kernels(LIBRARY)  # of CUDA tensors; on other devices the references run


def register(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op: the reference runs it wherever no native kernel does, `fake` says what its result looks like."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qlora_lab::{name}", fake, lib=LIBRARY)


def register_differentiable(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], differentiable: Callable[..., Any]
) -> Any:
    """Define an op that gradients flow through, as two: the kernel, which has none, and the op, made of the kernel.

    `torch.library.register_autograd` makes do with one op, at 9 us a call more, and 50 to 100 more with gradients.

    Args:
        schema: of both; the kernel's name is the op's and a suffix.
        reference, fake: of the kernel, as in `register`.
        differentiable: the op: calls the kernel where no gradient is wanted, elsewhere a `torch.autograd.Function`.

    Returns:
        The kernel, ready to be called.
    """
    name = schema[: schema.index("(")]
    assert name in DIFFERENTIABLE
    register(kernel_of(name) + schema.removeprefix(name), reference, fake)
    LIBRARY.impl(kernel_of(name), torch.library.fallthrough_kernel, "Autograd")
    LIBRARY.impl(LIBRARY.define(schema), differentiable, "CompositeImplicitAutograd")
    return getattr(torch.ops.qlora_lab, kernel_of(name)).default
