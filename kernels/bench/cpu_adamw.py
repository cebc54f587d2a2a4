"""AdamW updates: python kernels/bench/cpu_adamw.py [--json FILE] [--only TEXT].

One large tensor, and the 420 adapter tensors of SmolLM2-135M at rank 16. Beside ours: bitsandbytes and torch's fused
update. See rounds.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import torch
from rounds import Cell, main
from torch import nn

from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.native.adamw import NativeAdamw
from qlora_lab.ops.registry import KERNELS

RANK = 16
LINEARS = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # out, in
CASES = {
    "16.8M in one tensor": [(4096, 4096)],
    "4.9M in 420 tensors": [shape for out, in_ in LINEARS * 30 for shape in ((RANK, in_), (out, RANK))],
}
# A value's bytes read (the parameter, its gradient, two states) and written (all but the gradient) in their place, and
# its operations: a root and a division are one each; decoding and encoding two states are three each at least.
LEAST = {"32-bit": (16, 12, 15), "8-bit": (10, 6, 21), "gradient norm": (4, 0, 2)}


def parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def cells(wanted: str) -> Iterator[Cell]:
    assert KERNELS.library is not None
    native = NativeAdamw(KERNELS.library)
    for name, shapes in CASES.items():
        numel = sum(out * in_ for out, in_ in shapes)
        steps: dict[str, dict[str, Callable[[], Any]]] = {
            "32-bit": {
                "ours": AdamW(parameters(shapes), kernels=native).step,
                "bitsandbytes": bitsandbytes.optim.AdamW32bit(parameters(shapes)).step,
                "torch fused": torch.optim.AdamW(parameters(shapes), fused=True).step,
            },
            "8-bit": {
                "ours": AdamW(parameters(shapes), bits=8, kernels=native).step,
                "bitsandbytes": bitsandbytes.optim.AdamW8bit(parameters(shapes)).step,
            },
        }
        for bits, work in steps.items():
            if wanted in (title := f"{bits} {name}"):
                yield Cell(title, work, *(numel * least for least in LEAST[bits]), in_place=True)
        with_gradients = AdamW(parameters(shapes), kernels=native)
        gradients = [parameter.grad for group in with_gradients.param_groups for parameter in group["params"]]
        if wanted in (title := f"gradient norm {name}"):
            yield Cell(
                title,
                {
                    "ours": with_gradients.gradient_norm,
                    "torch": lambda gradients=gradients: float(torch.nn.utils.get_total_norm(gradients)),
                },
                *(numel * least for least in LEAST["gradient norm"]),
            )


if __name__ == "__main__":
    main(__doc__, cells)
