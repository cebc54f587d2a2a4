"""The ops for CPU tensors, calling the C library through ctypes: where torch's stable ABI cannot be used.

Every call checks what it hands over, as the stable binding does: an op can be called by its own name, without the
function that checks its arguments.
"""

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from qlora_lab.errors import ShapeError
from qlora_lab.ops.blockwise.checks import check_block_size, check_dtype, check_nested, check_weight, dtype_name
from qlora_lab.ops.blockwise.weight import WEIGHT_PARTS, PackedWeight, check_input
from qlora_lab.ops.formats import format_named
from qlora_lab.ops.lora.checks import check_adapter, check_lora_gradients
from qlora_lab.ops.native.library import AdapterView, Library, WeightView

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CtypesOps:
    """One method per op, named and called as the op is."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def quantize_blockwise(self, weight: Tensor, fmt: str, block_size: int) -> tuple[Tensor, Tensor]:
        check_block_size("block_size", block_size)
        check_weight(weight)
        source = weight.contiguous()
        numel = source.numel()
        packed = torch.empty(format_named(fmt).packed_bytes(numel), dtype=torch.uint8)
        absmax = torch.empty(-(-numel // block_size))
        self._library.qlk_cpu_quantize(
            *(source.data_ptr(), DTYPE_CODES[source.dtype], numel, self._library.format_index[fmt], block_size),
            *(packed.data_ptr(), absmax.data_ptr(), torch.get_num_threads()),
        )
        return packed, absmax

    def dequantize_weight(self, *parts: Any) -> Tensor:
        *weight_parts, dtype = parts
        weight = PackedWeight(*weight_parts)
        weight.check()
        check_dtype("dtype", dtype)
        out = torch.empty(weight.out_features, weight.in_features, dtype=dtype)
        self._library.qlk_cpu_expect_writes(out.data_ptr(), out.nbytes)
        self._expand(weight, out)
        return out

    def dequantize_weight_into(self, *parts: Any) -> None:
        *weight_parts, out = parts
        weight = PackedWeight(*weight_parts)
        weight.check()
        weight.check_out(out)
        self._expand(weight, out)

    def _expand(self, weight: PackedWeight, out: Tensor) -> None:
        target = out.float() if out.dtype == torch.float16 else out
        view = self._view(weight)
        self._library.qlk_cpu_dequantize(
            byref(view), DTYPE_CODES[target.dtype], target.data_ptr(), torch.get_num_threads()
        )
        if target is not out:
            out.copy_(target)

    def quantize_absmax(self, absmax: Tensor, offset: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        check_block_size("block_size", block_size)
        if absmax.dtype != torch.float32 or offset.numel() != 1:
            raise ShapeError(f"absmax must be float32 and offset one number; got {absmax.dtype} and {offset.numel()}")
        source = absmax.contiguous()
        blocks = source.numel()
        codes = torch.empty(blocks, dtype=torch.uint8)
        nested_absmax = torch.empty(-(-blocks // block_size))
        self._library.qlk_cpu_quantize_absmax(
            *(source.data_ptr(), blocks, block_size, float(offset)),
            *(codes.data_ptr(), nested_absmax.data_ptr(), torch.get_num_threads()),
        )
        return codes, nested_absmax

    def dequantize_absmax(self, codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int) -> Tensor:
        check_block_size("block_size", block_size)
        check_nested(codes, nested_absmax, offset, block_size)
        source, scales = codes.contiguous(), nested_absmax.contiguous()
        absmax = torch.empty(source.numel())
        self._library.qlk_cpu_dequantize_absmax(
            *(source.data_ptr(), scales.data_ptr(), offset.data_ptr(), source.numel(), block_size),
            *(absmax.data_ptr(), torch.get_num_threads()),
        )
        return absmax

    def quantized_linear(self, x: Tensor, *parts: Any) -> Tensor:
        weight, bias = PackedWeight(*parts[:WEIGHT_PARTS]), parts[WEIGHT_PARTS]
        weight.check_linear(x, bias)
        source = as_input(x)
        shift = bias_like(bias, source)
        view = self._view(weight)
        out = source.new_empty((*source.shape[:-1], weight.out_features))
        self._library.qlk_cpu_linear(
            *(source.data_ptr(), DTYPE_CODES[source.dtype], rows_of(source), byref(view)),
            *(None if shift is None else shift.data_ptr(), out.data_ptr(), torch.get_num_threads()),
        )
        return out.to(x.dtype)

    def quantized_linear_grad_input(self, grad_output: Tensor, *parts: Any) -> Tensor:
        weight = PackedWeight(*parts)
        weight.check()
        check_input("grad_output", grad_output, weight.out_features)
        source = as_input(grad_output)
        view = self._view(weight)
        out = source.new_empty((*source.shape[:-1], weight.in_features))
        self._library.qlk_cpu_linear_grad_input(
            *(source.data_ptr(), DTYPE_CODES[source.dtype], rows_of(source), byref(view)),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        return out.to(grad_output.dtype)

    def lora_linear(self, x: Tensor, *parts: Any) -> tuple[Tensor, Tensor]:
        weight, (bias, *adapter_parts) = PackedWeight(*parts[:WEIGHT_PARTS]), parts[WEIGHT_PARTS:]
        weight.check_linear(x, bias)
        adapter = adapter_view(weight, *adapter_parts)
        source = as_input(x)
        shift = bias_like(bias, source)
        view = self._view(weight)
        low = torch.empty(rows_of(source), adapter.rank)
        out = source.new_empty((*source.shape[:-1], weight.out_features))
        self._library.qlk_cpu_lora_linear(
            *(source.data_ptr(), DTYPE_CODES[source.dtype], rows_of(source), byref(view)),
            *(None if shift is None else shift.data_ptr(), byref(adapter)),
            *(low.data_ptr(), out.data_ptr(), torch.get_num_threads()),
        )
        return out.to(x.dtype), low

    def lora_linear_backward(self, grad_output: Tensor, x: Tensor, low: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        weight, (*adapter_parts, needs_grad_x) = PackedWeight(*parts[:WEIGHT_PARTS]), parts[WEIGHT_PARTS:]
        adapter = adapter_view(weight, *adapter_parts)
        check_lora_gradients(grad_output, x, low, weight, adapter.rank)
        source, inputs, projected = as_input(grad_output), as_input(x), low.contiguous()
        view = self._view(weight)
        grad_x = torch.empty_like(inputs) if needs_grad_x else inputs.new_empty(0)
        grad_A, grad_B = (torch.empty_like(matrix) for matrix in adapter.tensors)
        self._library.qlk_cpu_lora_linear_backward(
            *(source.data_ptr(), inputs.data_ptr(), projected.data_ptr(), DTYPE_CODES[source.dtype]),
            *(rows_of(source), byref(view), byref(adapter)),
            *(grad_x.data_ptr() if needs_grad_x else None, grad_A.data_ptr(), grad_B.data_ptr()),
            torch.get_num_threads(),
        )
        return grad_x.to(x.dtype), grad_A, grad_B

    def _view(self, weight: PackedWeight) -> WeightView:
        """Return a weight as the library takes it; the view keeps the tensors it points into."""
        parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
        tensors = [None if part is None else part.contiguous() for part in parts]
        view = WeightView(
            *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
            *(weight.out_features, weight.in_features, weight.block_size, weight.nested_block_size),
            self._library.format_index[weight.format],
        )
        view.tensors = tensors
        return view


def adapter_view(
    weight: PackedWeight, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float, seed: int
) -> AdapterView:
    """Return an adapter as the library takes it; the view keeps the tensors it points into."""
    check_adapter(weight, lora_A, lora_B, dropout)
    if lora_A.dtype != torch.float32:
        raise ShapeError(f"lora_A and lora_B must be float32 for the CPU's kernels; got {dtype_name(lora_A.dtype)}")
    A, B = lora_A.contiguous(), lora_B.contiguous()
    view = AdapterView(A.data_ptr(), B.data_ptr(), len(A), scaling, dropout, seed)
    view.tensors = (A, B)
    return view


def as_input(x: Tensor) -> Tensor:
    """Return x as the kernels read it; float16, which no CPU trains in, goes through float32."""
    return (x.float() if x.dtype == torch.float16 else x).contiguous()


def rows_of(matrix: Tensor) -> int:
    """Return how many rows a (..., columns) tensor has."""
    return matrix.shape[:-1].numel()


def bias_like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the bias in the dtype of x."""
    return None if bias is None else bias.to(x.dtype).contiguous()
