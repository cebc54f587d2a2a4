"""The CUDA kernels, measured: python kernels/bench/cuda_ops.py [--json FILE] [--only TEXT].

Beside ours: torch with a dense weight, and bitsandbytes where it is installed. Every call is recorded in a CUDA graph
over several copies of the weight, more than the second-level cache holds, so that neither Python nor the cache shows;
what cannot be recorded is called in a loop. Implementations take turns, as in rounds.py.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.adamw.optimizer import AdamwKernels
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_absmax, quantize_blockwise, quantized_linear
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora.op import lora_linear
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.registry import CUDA_KERNELS

try:
    import bitsandbytes.functional as bnb
    from bitsandbytes import matmul_4bit
except ImportError:
    bnb = None

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
ROWS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
DROPOUT = 0.1  # of the adapter's inputs, as in conf/adapter/qlora_paper.yaml
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
PAST_CACHE_BYTES = 256 * 2**20  # what the copies take together
CODE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight in NF4 with double quantization
Work = Callable[[int], Any]  # of the copy with that number


@dataclass
class Cell:
    """The same work by name of the implementation; one is `ours`. `bytes` is the least that must move.

    What waits for the device or takes host memory cannot be recorded.
    """

    name: str
    copies: int
    bytes: float
    work: dict[str, Work]
    recorded: bool = True


class Timed:
    """One implementation, recorded once."""

    def __init__(self, work: Work, copies: int, recorded: bool = True) -> None:
        self._copies = copies
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work(0)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if not recorded:
            return
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._all()
            self._graph = graph
        except RuntimeError as error:
            print(f"  called in a loop: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()

    def _all(self) -> None:
        for copy in range(self._copies):
            self._work(copy)

    def seconds(self) -> float:
        """Return the time of one call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._all()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self._copies


def measure(cell: Cell, rounds: int, copy_rate: float) -> dict[str, Any]:
    """Return the medians of one cell."""
    timed = {name: Timed(work, cell.copies, cell.recorded) for name, work in cell.work.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 2):
        for name, implementation in timed.items():
            took = implementation.seconds()
            if number > 1:  # the first two warm up
                seconds[name].append(took)
    ours = statistics.median(seconds["ours"])
    return {
        "cell": cell.name,
        "us": {name: round(1e6 * statistics.median(values), 2) for name, values in seconds.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(values, seconds["ours"], strict=True)), 3)
            for name, values in seconds.items()
            if name != "ours"
        },
        "GBps": round(cell.bytes / ours / 1e9, 1),
        "share_of_copy": round(cell.bytes / ours / copy_rate, 3),
    }


class Weights:
    """Copies of a random weight, as every implementation keeps it."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.numel = out_features * in_features
        self.copies = max(2, -(-PAST_CACHE_BYTES // int(self.numel * CODE_BYTES)))
        self.dense_copies = max(2, -(-PAST_CACHE_BYTES // (2 * self.numel)))
        self.shape = (out_features, in_features)
        self.dense = [torch.randn(self.shape, device=DEVICE, dtype=DTYPE) * 0.02 for _ in range(self.dense_copies)]
        self.ours = [self._quantized(self.dense[copy % self.dense_copies]) for copy in range(self.copies)]
        self.theirs = []
        if bnb is not None:
            settings = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
            self.theirs = [bnb.quantize_4bit(self.dense[c % self.dense_copies], **settings) for c in range(self.copies)]

    def _quantized(self, dense: Tensor) -> PackedWeight:
        packed, absmax = quantize_blockwise(dense, "nf4", 64)
        return PackedWeight(packed, *quantize_absmax(absmax, 256), "nf4", 64, 256, *self.shape)

    def dense_of(self, copy: int) -> Tensor:
        return self.dense[copy % self.dense_copies]


def weight_cells(name: str, weights: Weights) -> Iterator[Cell]:
    """Yield quantize and dequantize."""
    work: dict[str, Work] = {"ours": lambda copy: quantize_blockwise(weights.dense_of(copy), "nf4", 64)}
    if bnb is not None:
        work["bitsandbytes"] = lambda copy: bnb.quantize_4bit(weights.dense_of(copy), quant_type="nf4", blocksize=64)
    moved = weights.numel * (2 + 0.5 + 4 / 64)
    yield Cell(f"{name} quantize", weights.dense_copies, moved, work)
    outs = [torch.empty_like(dense) for dense in weights.dense]
    work = {"ours": lambda copy: dequantize_weight(weights.ours[copy], out=outs[copy % len(outs)])}
    if bnb is not None:
        work["bitsandbytes"] = lambda copy: bnb.dequantize_4bit(*weights.theirs[copy], out=outs[copy % len(outs)])
    yield Cell(f"{name} dequantize nested", weights.copies, weights.numel * (2 + CODE_BYTES), work)


def product_cell(name: str, weights: Weights, rows: int) -> Cell:
    out_features, in_features = weights.shape
    x = torch.randn(rows, in_features, device=DEVICE, dtype=DTYPE)
    work: dict[str, Work] = {
        "ours": lambda copy: quantized_linear(x, weights.ours[copy]),
        "torch dense": lambda copy: F.linear(x, weights.dense_of(copy)),
    }
    if bnb is not None:
        work["bitsandbytes"] = lambda copy: matmul_4bit(x, weights.theirs[copy][0].t(), weights.theirs[copy][1])
    moved = weights.numel * CODE_BYTES + 2 * rows * (out_features + in_features)
    return Cell(f"{name} forward {rows} rows", weights.copies, moved, work)


def training_cell(name: str, weights: Weights, rows: int, rank: int = 16, dropout: float = 0.0) -> Cell:
    """Forward and the gradients of x and a bfloat16 rank-16 adapter, beside the dense products without one."""
    out_features, in_features = weights.shape
    x = torch.randn(rows, in_features, device=DEVICE, dtype=DTYPE, requires_grad=True)
    gradient = torch.randn(rows, out_features, device=DEVICE, dtype=DTYPE)
    A = torch.randn(rank, in_features, device=DEVICE, requires_grad=True)
    B = torch.randn(out_features, rank, device=DEVICE, requires_grad=True)
    short = [matrix.detach().to(DTYPE).requires_grad_() for matrix in (A, B)]

    def ours(copy: int, adapter: Sequence[Tensor] = (A, B)) -> Any:
        out = lora_linear(x, weights.ours[copy], None, *adapter, scaling=0.5, dropout=dropout, seed=copy)
        return torch.autograd.grad(out, (x, *adapter), gradient)

    def dense(copy: int) -> Any:
        return torch.autograd.grad(F.linear(x, weights.dense_of(copy)), x, gradient)

    work: dict[str, Work] = {
        "ours": lambda copy: ours(copy, short),  # adapter.dtype=bfloat16
        "ours with a float32 adapter": ours,
        "torch dense without adapter": dense,
    }
    if bnb is not None:

        def theirs(copy: int) -> Any:
            packed, state = weights.theirs[copy]
            out = matmul_4bit(x, packed.t(), state)
            wide = x.float()  # as PEFT computes it
            seen = F.dropout(wide, dropout) if dropout else wide
            out = out + 0.5 * F.linear(F.linear(seen, A), B).to(DTYPE)
            return torch.autograd.grad(out, (x, A, B), gradient)

        work["PEFT's way with bitsandbytes"] = theirs
    copies = min(4, weights.copies)
    kind = f"forward+backward {rows} rows, adapter" + (f" with dropout {dropout}" if dropout else "")
    return Cell(f"{name} {kind}", copies, 2 * weights.numel * CODE_BYTES, work, recorded=False)


def adamw_cells(kernels: AdamwKernels, width: int = 4096, wider: int = 11008, layers: int = 32) -> Iterator[Cell]:
    """Yield the update of a model's adapters at rank 16 on all linears: 448 tensors of 7B."""
    widths = [width] * 11 + [wider] * 3
    parameters = [torch.randn(16, each, device=DEVICE) * 0.02 for _ in range(layers) for each in widths]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    numel = sum(parameter.numel() for parameter in parameters)
    theirs = [parameter.clone().requires_grad_() for parameter in parameters]
    for parameter, gradient in zip(theirs, gradients, strict=True):
        parameter.grad = gradient
    fused = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
    for bits in (32, 8):
        states = [_states(parameter, bits) for parameter in parameters]
        tensors = [
            AdamwTensor(parameter, gradient, *state, weight_decay=0.0)
            for parameter, gradient, state in zip(parameters, gradients, states, strict=True)
        ]
        step = AdamwStep(1e-4, 0.9, 0.999, 1e-8, 10)

        def ours(copy: int, tensors: list[AdamwTensor] = tensors, step: AdamwStep = step) -> None:
            kernels.update(tensors, step)

        moved = numel * (28 if bits == 32 else 16)
        yield Cell(
            f"AdamW {bits} bits, {len(parameters)} tensors",
            1,
            moved,
            {"ours": ours, "torch fused": lambda copy: fused.step()},
            recorded=False,
        )


def _states(parameter: Tensor, bits: int) -> tuple[Tensor | None, ...]:
    if bits == 32:
        return torch.zeros_like(parameter), torch.zeros_like(parameter), None, None
    blocks = -(-parameter.numel() // 256)
    codes = [torch.full_like(parameter, value, dtype=torch.uint8) for value in (127, 0)]
    return *codes, torch.zeros(blocks, device=DEVICE), torch.zeros(blocks, device=DEVICE)


def copy_rate() -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timed = Timed(lambda copy: target.copy_(source), 4)
    return 2 * source.numel() / statistics.median(timed.seconds() for _ in range(7))


def cells(wanted: str) -> Iterator[Cell]:
    for shape in SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        weights = Weights(*shape)
        candidates = [*weight_cells(name, weights), *(product_cell(name, weights, rows) for rows in ROWS)]
        candidates += [training_cell(name, weights, 4096, dropout=dropout) for dropout in (0.0, DROPOUT)]
        yield from (cell for cell in candidates if wanted in cell.name)
        del weights, candidates
        torch.cuda.empty_cache()
    assert CUDA_KERNELS.library is not None and CUDA_KERNELS.streams is not None
    kernels = CudaAdamw(CUDA_KERNELS.library, CUDA_KERNELS.streams)
    yield from (cell for cell in adamw_cells(kernels) if wanted in cell.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if CUDA_KERNELS.library is None:
        sys.exit(f"there is nothing to measure: {CUDA_KERNELS}")
    rate = copy_rate()
    results: dict[str, Any] = {
        "kernels": str(CUDA_KERNELS),
        "gpu": torch.cuda.get_device_name(),
        "copy_GBps": round(rate / 1e9, 1),
        "bitsandbytes": None if bnb is None else sys.modules["bitsandbytes"].__version__,
        "rounds": options.rounds,
        "cells": [],
    }
    print(f"{results['kernels']} on {results['gpu']}; a copy moves {results['copy_GBps']} GB/s")
    for cell in cells(options.only):
        result = measure(cell, options.rounds, rate)
        results["cells"].append(result)
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratio"].items())
        print(f"{cell.name:<44} {result['us']['ours']:>9.1f} us {result['share_of_copy']:>6.2f}  {ratios}", flush=True)
        if options.json:  # after each cell: what was measured stays when time runs out
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
