"""AdamW updates: python kernels/bench/cpu_adamw.py [--json FILE] [--only TEXT].

One large tensor, and the 420 adapter tensors of SmolLM2-135M at rank 16. Beside ours: bitsandbytes and torch's fused
update. See rounds.py.
"""

import math
from collections.abc import Callable, Iterator

import bitsandbytes
import torch
from checks import BYTES_EQUAL, Expected
from rounds import Cell, main
from torch import Tensor, nn

from qlora_lab.ops.adamw.optimizer import AdamW, ReferenceKernels
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
STEPS = 3  # the one whose result is checked: no state is zero before it
TOLERANCE = 1e-5  # of parameters about as large as their updates: rounding in another order


def parameters(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(1e-3 * torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def stepped(optimizer: torch.optim.Optimizer) -> Callable[[], list[Tensor]]:
    """Return work that takes a step and returns the parameters."""
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> list[Tensor]:
        optimizer.step()
        return updated

    for _ in range(STEPS - 1):
        step()
    return step


def update_cell(title: str, bits: int, shapes: list[tuple[int, int]], native: NativeAdamw) -> Cell:
    theirs = {32: bitsandbytes.optim.AdamW32bit, 8: bitsandbytes.optim.AdamW8bit}[bits]
    work = {
        "ours": stepped(AdamW(parameters(shapes), bits=bits, kernels=native)),
        "bitsandbytes": stepped(theirs(parameters(shapes))),
    }
    if bits == 32:
        work["torch fused"] = stepped(torch.optim.AdamW(parameters(shapes), fused=True))
    least = [sum(map(math.prod, shapes)) * each for each in LEAST[f"{bits}-bit"]]
    expected = Expected(
        lambda: stepped(AdamW(parameters(shapes), bits=bits, kernels=ReferenceKernels()))(),
        # bitsandbytes rounds 8-bit states to a coarser grid on CPUs: it updates otherwise
        {"ours": BYTES_EQUAL, **(dict.fromkeys(("bitsandbytes", "torch fused"), TOLERANCE) if bits == 32 else {})},
    )
    return Cell(title, work, *least, in_place=True, expected=expected)


def norm_cell(title: str, shapes: list[tuple[int, int]], native: NativeAdamw) -> Cell:
    optimizer = AdamW(made := parameters(shapes), kernels=native)
    gradients = [parameter.grad for parameter in made]
    work = {
        "ours": lambda: optimizer.gradient_norm()[0],
        "torch": lambda: float(torch.nn.utils.get_total_norm(gradients)),
    }
    expected = Expected(
        lambda: float(torch.stack([gradient.double().norm() for gradient in gradients]).norm()),
        {"ours": 1e-9, "torch": 5e-3},  # torch adds squares in float32
    )
    least = [sum(map(math.prod, shapes)) * each for each in LEAST["gradient norm"]]
    return Cell(title, work, *least, expected=expected)


def cells(wanted: str) -> Iterator[Cell]:
    assert KERNELS.library is not None
    native = NativeAdamw(KERNELS.library)
    for name, shapes in CASES.items():
        for bits in (32, 8):
            if wanted in (title := f"{bits}-bit {name}"):
                yield update_cell(title, bits, shapes, native)
        if wanted in (title := f"gradient norm {name}"):
            yield norm_cell(title, shapes, native)


if __name__ == "__main__":
    main(__doc__, cells)
