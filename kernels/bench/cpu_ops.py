"""Quantize, dequantize and 4-bit products: python kernels/bench/cpu_ops.py [--json FILE] [--only TEXT].

The matrix of two dtypes, four shapes and four numbers of rows. Beside ours: bitsandbytes, torch with a dense weight
(for quantize a copy into memory that is there), oneDNN with a dense weight that was laid out for it before, and torchao
where it is installed; on CPUs with bfloat16 units also what bitsandbytes does in inference alone, with a weight that it
packs anew. See rounds.py.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from checks import BYTES_EQUAL, PRODUCTS, QUANTIZATION, Expected
from rounds import Cell, main
from torch import Tensor, nn, no_grad

from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_absmax, quantize_blockwise, quantized_linear
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora.op import lora_linear

try:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4  # of torchao 0.18
except ImportError:
    to_nf4 = None

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096))
ROWS = (1, 16, 256, 1024)
TRAINING_ROWS = 256
RANK, SCALING = 16, 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Weights:
    """One random weight, as every implementation keeps it."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype) -> None:
        self.dense = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        packed, absmax = quantize_blockwise(self.dense, "nf4", 64)
        self.ours = PackedWeight(packed, absmax, None, None, "nf4", 64, 256, out_features, in_features)
        self.nested = self.ours._replace(absmax=None)._replace(
            **dict(zip(("absmax", "nested_absmax", "offset"), quantize_absmax(absmax), strict=True))
        )
        self.bitsandbytes = quantized_by_bitsandbytes(self.dense)
        self.inference = self.to_inference() if dtype == torch.bfloat16 and bnb.has_avx512bf16() else None
        self.torchao = self.to_torchao() if to_nf4 is not None else None

    def to_inference(self) -> nn.Module:
        """Return what bitsandbytes makes of a layer on CPUs with bfloat16 units, as long as nobody trains it."""
        out_features, in_features = self.dense.shape
        layer = Linear4bit(in_features, out_features, False, self.dense.dtype, False, "nf4")
        layer.weight.data = self.dense.clone()
        return layer.to("cpu").eval()

    def in_onednn(self, x: Tensor) -> Callable[[], Tensor] | None:
        """Return a product with the dense weight as torch.compile's freezing keeps it: what no decoding could beat."""
        if not torch.backends.mkldnn.is_available():
            return None
        if x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        laid_out = torch.ops.mkldnn._reorder_linear_weight(self.dense, len(x))
        return lambda: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")

    def to_torchao(self) -> Any:
        """Quantize as torchao does, which wants whole second-level blocks."""
        return to_nf4(self.dense, 64, math.gcd(self.dense.numel() // 64, 256))

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dense.dtype)

    @property
    def expanded(self) -> Tensor:
        """What bitsandbytes makes of its codes, which are ours too."""
        return bnb.dequantize_4bit(*self.bitsandbytes)

    def expected(self, of: Callable[[Tensor], Any]) -> Expected:
        """Expect of every implementation the products `of` the float32 values of the weight."""
        product = PRODUCTS[self.dtype_name]
        tolerances = {"ours": product, "bitsandbytes": product}
        others = dict.fromkeys(("bitsandbytes inference", "torch dense", "oneDNN", "torchao"), QUANTIZATION)
        return Expected(lambda: of(self.expanded.float()), {**tolerances, **others})

    @property
    def dense_bytes(self) -> int:
        return self.dense.nbytes

    def packed_bytes(self, *, nested: bool = False) -> int:
        return sum(part.nbytes for part in (self.nested if nested else self.ours)[:4] if part is not None)


def quantized_by_bitsandbytes(dense: Tensor, *, nested: bool = False) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=nested)


def quantize_cell(name: str, weights: Weights) -> Cell:
    copy = torch.empty_like(weights.dense)
    work = {
        "ours": lambda: quantize_blockwise(weights.dense, "nf4", 64),
        "bitsandbytes": lambda: quantized_by_bitsandbytes(weights.dense),
        "torch copy": lambda: copy.copy_(weights.dense),
    }
    if to_nf4 is not None:
        work["torchao"] = weights.to_torchao
    codes, state = weights.bitsandbytes
    return Cell(
        f"{name} quantize",
        work,
        weights.dense_bytes,
        weights.packed_bytes(),
        2 * weights.dense.numel(),  # an operation a weight to find the largest, and one to scale by it
        expected=Expected(lambda: (codes.flatten(), state.absmax), {"ours": BYTES_EQUAL}),
    )


def dequantize_cells(name: str, weights: Weights) -> Iterator[Cell]:
    dtype = weights.dense.dtype
    out = torch.empty_like(weights.dense)
    others = {
        "bitsandbytes": lambda: bnb.dequantize_4bit(*weights.bitsandbytes),
        "torch clone": lambda: weights.dense.clone(),
    }
    if weights.torchao is not None:
        others["torchao"] = lambda: weights.torchao.to(dtype)
    least = (weights.packed_bytes(), weights.dense_bytes, weights.dense.numel())  # one multiplication a weight
    alike = {"ours": BYTES_EQUAL, "torchao": QUANTIZATION}
    expected = Expected(lambda: weights.expanded, alike)
    work = {"ours": lambda: dequantize_weight(weights.ours, dtype), **others}
    yield Cell(f"{name} dequantize", work, *least, expected=expected)
    work = {"ours": lambda: dequantize_weight(weights.ours, out=out), **others}
    yield Cell(f"{name} dequantize out=", work, *least, expected=expected)
    work = {"ours": lambda: dequantize_weight(weights.nested, out=out), **others}
    nested = Expected(lambda: bnb.dequantize_4bit(*quantized_by_bitsandbytes(weights.dense, nested=True)), alike)
    yield Cell(f"{name} dequantize nested out=", work, weights.packed_bytes(nested=True), *least[1:], expected=nested)


def linear_cell(name: str, weights: Weights, rows: int) -> Cell:
    x = torch.randn(rows, weights.dense.shape[1]).to(weights.dense.dtype)
    packed, state = weights.bitsandbytes
    work = {
        "ours": lambda: quantized_linear(x, weights.ours),
        "bitsandbytes": lambda: matmul_4bit(x, packed.t(), state),
        "torch dense": lambda: F.linear(x, weights.dense),
    }
    if (in_onednn := weights.in_onednn(x)) is not None:
        work["oneDNN"] = in_onednn
    if weights.inference is not None:
        work["bitsandbytes inference"] = no_grad()(lambda: weights.inference(x))
    if weights.torchao is not None:
        work["torchao"] = lambda: linear_nf4(x, weights.torchao)
    written = rows * weights.dense.shape[0] * x.element_size()
    return Cell(
        f"{name} forward {rows} rows",
        work,
        weights.packed_bytes() + x.nbytes,
        written,
        2 * rows * weights.dense.numel(),
        dtype=weights.dtype_name,
        expected=weights.expected(lambda weight: F.linear(x.float(), weight)),
    )


def training_cell(name: str, weights: Weights, rows: int) -> Cell:
    x = torch.randn(rows, weights.dense.shape[1]).to(weights.dense.dtype).requires_grad_()
    gradient = torch.randn(rows, weights.dense.shape[0]).to(weights.dense.dtype)
    packed, state = weights.bitsandbytes

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), x, gradient)

    work = {
        "ours": both(lambda: quantized_linear(x, weights.ours)),
        "bitsandbytes": both(lambda: matmul_4bit(x, packed.t(), state)),
        "torch dense": both(lambda: F.linear(x, weights.dense)),
    }
    if weights.torchao is not None:
        work["torchao"] = both(lambda: linear_nf4(x, weights.torchao))
    return Cell(
        f"{name} forward+backward {rows} rows",
        work,
        2 * weights.packed_bytes() + x.nbytes + gradient.nbytes,
        x.nbytes + gradient.nbytes,
        4 * rows * weights.dense.numel(),
        dtype=weights.dtype_name,
        expected=weights.expected(lambda weight: gradient.float() @ weight),
    )


def adapter_cell(name: str, weights: Weights, rows: int) -> Cell:
    """Forward and backward with an adapter, whose products bitsandbytes' users add in float32 as PEFT does."""
    dtype = weights.dense.dtype
    x = torch.randn(rows, weights.dense.shape[1]).to(dtype).requires_grad_()
    lora_A = torch.randn(RANK, weights.dense.shape[1]).requires_grad_()
    lora_B = torch.randn(weights.dense.shape[0], RANK).requires_grad_()
    gradient = torch.randn(rows, weights.dense.shape[0]).to(dtype)
    packed, state = weights.bitsandbytes

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), (x, lora_A, lora_B), gradient)

    def in_float32(weight: Tensor) -> Any:
        wide = x.detach().float().requires_grad_()
        output = F.linear(wide, weight) + F.linear(F.linear(wide, lora_A), lora_B) * SCALING
        return torch.autograd.grad(output, (wide, lora_A, lora_B), gradient.float())

    def adapted(base: Tensor) -> Tensor:
        return base + (F.linear(F.linear(x.float(), lora_A), lora_B) * SCALING).to(dtype)

    work = {
        "ours": both(lambda: lora_linear(x, weights.ours, None, lora_A, lora_B, scaling=SCALING)),
        "bitsandbytes": both(lambda: adapted(matmul_4bit(x, packed.t(), state))),
        "torch dense": both(lambda: adapted(F.linear(x, weights.dense))),
    }
    if weights.torchao is not None:
        work["torchao"] = both(lambda: adapted(linear_nf4(x, weights.torchao)))
    adapter = lora_A.numel() + lora_B.numel()
    read = 2 * weights.packed_bytes() + 2 * x.nbytes + gradient.nbytes + 2 * 4 * adapter
    written = x.nbytes + gradient.nbytes + 4 * adapter
    # Products with the weight and the adapter in both directions, and two for the adapter's own gradients.
    flops = 4 * rows * weights.dense.numel() + 6 * rows * adapter
    title, expected = f"{name} the same with rank {RANK}", weights.expected(in_float32)
    return Cell(title, work, read, written, flops, dtype=weights.dtype_name, expected=expected)


def cells(wanted: str) -> Iterator[Cell]:
    """Yield the cells whose name contains `wanted`; a weight is made only when one of its cells is."""
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES:
            name = f"{dtype_name} {shape[0]}x{shape[1]}"
            kinds = ["quantize", "dequantize", "dequantize out=", "dequantize nested out="]
            kinds += [f"forward {rows} rows" for rows in ROWS] + [f"forward+backward {TRAINING_ROWS} rows"]
            kinds += [f"the same with rank {RANK}"]
            if any(wanted in f"{name} {kind}" for kind in kinds):
                yield from (cell for cell in cells_of(name, Weights(*shape, dtype)) if wanted in cell.name)


def cells_of(name: str, weights: Weights) -> Iterator[Cell]:
    yield quantize_cell(name, weights)
    yield from dequantize_cells(name, weights)
    yield from (linear_cell(name, weights, rows) for rows in ROWS)
    yield training_cell(name, weights, TRAINING_ROWS)
    yield adapter_cell(name, weights, TRAINING_ROWS)


if __name__ == "__main__":
    main(__doc__, cells)
