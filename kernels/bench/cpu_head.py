"""Products with an output head, which is not quantized: python kernels/bench/cpu_head.py [--json FILE] [--only TEXT].

Logits in float32 and the gradient of what they are of, for the rows of a chunk of the loss (128) and for a few; beside
torch's dense products with the conversions that they need. See rounds.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from checks import PRODUCTS, Expected
from rounds import Cell, main

from qlora_lab.models.head_products import head_input_gradient, head_logits
from qlora_lab.ops.registry import KERNELS

HEADS = ((49152, 576), (32000, 4096))  # of SmolLM2-135M and LLaMA 7B
ROWS = (1, 16, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cells(wanted: str) -> Iterator[Cell]:
    """Yield the cells whose name contains `wanted`."""
    assert KERNELS.library is not None, "there are no native kernels to measure"
    for dtype_name, dtype in DTYPES.items():
        for shape in HEADS:
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            name = f"{dtype_name} {shape[0]}x{shape[1]}"
            for rows in ROWS:
                pair = (logits_cell(name, dtype_name, weight, rows), gradient_cell(name, dtype_name, weight, rows))
                yield from (cell for cell in pair if wanted in cell.name)


def logits_cell(name: str, dtype_name: str, weight: torch.Tensor, rows: int) -> Cell:
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    work = {"ours": lambda: head_logits(x, weight, None), "torch": lambda: F.linear(x, weight).float()}
    written = 4 * rows * weight.shape[0]
    flops = 2 * rows * weight.numel()
    expected = Expected(lambda: F.linear(x.float(), weight.float()), dict.fromkeys(work, PRODUCTS[dtype_name]))
    title, read = f"{name} logits of {rows} rows", weight.nbytes + x.nbytes
    return Cell(title, work, read, written, flops, dtype=dtype_name, expected=expected)


def gradient_cell(name: str, dtype_name: str, weight: torch.Tensor, rows: int) -> Cell:
    gradient = torch.randn(rows, weight.shape[0])
    work = {
        "ours": lambda: head_input_gradient(gradient, weight),
        "torch": lambda: gradient.to(weight.dtype) @ weight,
    }
    read, written = weight.nbytes + gradient.nbytes, 4 * rows * weight.shape[1]
    expected = Expected(lambda: gradient @ weight.float(), dict.fromkeys(work, PRODUCTS[dtype_name]))
    title, flops = f"{name} gradient of {rows} rows", 2 * rows * weight.numel()
    return Cell(title, work, read, written, flops, dtype=dtype_name, expected=expected)


if __name__ == "__main__":
    main(__doc__, cells)
