"""Attention while training: python kernels/bench/cpu_attention.py [--json FILE] [--only TEXT].

Forward and backward of causal rows, beside what transformers calls for "sdpa": torch's own, which wants a copy of each
key head for the queries that share it. The operations are those of keys that a query sees. See rounds.py.

Give both sides memory that they had before, as a training process has, with MALLOC_MMAP_THRESHOLD_=1000000000 and
MALLOC_TRIM_THRESHOLD_=2000000000: fresh pages cost either as much as a short row's attention.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from checks import Expected
from rounds import Cell, main
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_lab.models.attention import cpu_attention
from qlora_lab.ops.registry import KERNELS

# rows, heads, key heads, tokens, head size: of SmolLM2-135M, and a quarter of LLaMA 7B's heads
SHAPES = ((16, 9, 3, 32, 64), (4, 9, 3, 128, 64), (1, 9, 3, 512, 64), (1, 9, 3, 2048, 64), (1, 8, 8, 1024, 128))
PRODUCTS = {"forward": 2, "forward+backward": 7}
TOLERANCES = {"fp32": 1e-5, "bf16": 2**-6}  # torch rounds the gradients of repeated key heads before it adds them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Layer(nn.Module):
    """What both read from the module that calls them."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def cells(wanted: str) -> Iterator[Cell]:
    """Yield the cells whose name contains `wanted`."""
    assert KERNELS.library is not None, "there are no native kernels to measure"
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES:
            rows, heads, key_heads, tokens, size = shape
            parts = [
                torch.randn(rows, tokens, of, size).to(dtype).transpose(1, 2) for of in (heads, key_heads, key_heads)
            ]
            gradient = torch.randn(rows, tokens, heads, size).to(dtype)
            flops = rows * heads * tokens * (tokens + 1) * size
            moved = sum(part.nbytes for part in parts) + gradient.nbytes
            for step, products in PRODUCTS.items():
                name = f"{dtype_name} {rows}x{tokens}x{heads}x{size} {step}"
                if wanted in name:
                    work = works(parts, gradient, backward=products > 2)
                    expected = Expected(
                        works([part.double() for part in parts], gradient.double(), backward=products > 2)["torch"],
                        dict.fromkeys(work, TOLERANCES[dtype_name]),
                    )
                    yield Cell(
                        name, work, moved, gradient.nbytes, products * flops, dtype=dtype_name, expected=expected
                    )


def works(parts: list[Tensor], gradient: Tensor, *, backward: bool) -> dict[str, Callable[[], Any]]:
    layer, (query, key, value) = Layer(parts[0].shape[1] // parts[1].shape[1]), parts

    def work(forward: Callable[..., tuple[Tensor, None]]) -> Callable[[], Any]:
        def run() -> Any:
            leaves = [part.detach().requires_grad_(backward) for part in (query, key, value)]
            output, _ = forward(layer, *leaves, None, scaling=query.shape[-1] ** -0.5)
            return torch.autograd.grad(output, leaves, gradient) if backward else output

        return run

    return {"ours": work(cpu_attention), "torch": work(sdpa_attention_forward)}


if __name__ == "__main__":
    main(__doc__, cells)
