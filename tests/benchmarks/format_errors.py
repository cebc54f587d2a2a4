"""Root mean square error of 4-bit formats beside the weights' own, in blocks of 64, of simulated weights and a model's.

    python tests/benchmarks/format_errors.py [--weights FILE.safetensors] [--every 16]

`--weights` takes the projections of a checkpoint, every so many blocks of them. `largest` is a block's largest weight
beside its root mean square, on average.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributions import StudentT

from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_blockwise
from qlora_lab.ops.blockwise.weight import PackedWeight

FORMATS = ("nf4", "int4", "fp4_e2m1", "fp4_e3m0")
BLOCK, BLOCKS = 64, 4000
DEGREES = (6, 4, 3)


def simulated() -> Iterator[tuple[str, Tensor]]:
    """Yield (name, blocks) of each distribution."""
    torch.manual_seed(0)
    yield "normal", torch.randn(BLOCKS, BLOCK)
    for degrees in DEGREES:
        yield f"Student's t, {degrees} degrees of freedom", StudentT(degrees).sample((BLOCKS, BLOCK))


def of_checkpoint(file: Path, every: int) -> Tensor:
    """Return blocks of a checkpoint's projections; those of zeros are left out."""
    with safe_open(file, "pt") as opened:
        names = sorted(opened.keys())
        parts = [opened.get_tensor(name).float().view(-1, BLOCK)[::every] for name in names if "proj" in name]
    blocks = torch.cat(parts)
    return blocks[blocks.abs().amax(1) > 0]


def relative_error(blocks: Tensor, fmt: str) -> float:
    packed, absmax = quantize_blockwise(blocks, fmt, BLOCK)
    weight = PackedWeight(packed, absmax, None, None, fmt, BLOCK, 256, *blocks.shape)
    difference = dequantize_weight(weight, torch.float32) - blocks
    return float(difference.double().norm() / blocks.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="FILE")
    parser.add_argument("--every", type=int, default=16)
    options = parser.parse_args()
    rows = list(simulated())
    if options.weights is not None:
        rows.insert(0, (options.weights.parent.name, of_checkpoint(options.weights, options.every)))
    print(f"{'weights':<36}" + "".join(f"{fmt:>10}" for fmt in (*FORMATS, "largest")))
    for name, blocks in rows:
        largest = float((blocks.abs().amax(1) / blocks.square().mean(1).sqrt()).mean())
        print(f"{name:<36}" + "".join(f"{relative_error(blocks, fmt):>10.3f}" for fmt in FORMATS) + f"{largest:>10.2f}")


if __name__ == "__main__":
    main()
