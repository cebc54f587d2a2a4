"""The C functions that quantize and dequantize, called on tensors with every byte around the results watched."""

import ctypes
import math

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.native.library import WeightView

OK, BAD_FORMAT, BAD_BLOCK_SIZE, BAD_DTYPE, BAD_SIZE, NULL_POINTER = range(6)
FORMAT_NUMBER = {name: number for number, name in enumerate(FORMATS)}
DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GUARD_BYTES = 128
GUARD = 0xA5

every_format = pytest.mark.parametrize("fmt", FORMATS)
dtypes = pytest.mark.parametrize("dtype", DTYPE_NUMBER, ids=str)
# Examples are drawn the same way in every run; the library keeps no state between them.
repeatable = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Outputs:
    """Results that start as NaN between guard bytes; `check` fails if anything around them was written.

    They lie `shift` elements off a multiple of 64 bytes.
    """

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self._all: list[tuple[Tensor, slice]] = []

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        size = dtype.itemsize
        whole = torch.full((numel * size + 2 * GUARD_BYTES + 64 * (size + 1),), GUARD, dtype=torch.uint8)
        start = GUARD_BYTES + -(whole.data_ptr() + GUARD_BYTES) % 64 + self.shift * size
        inside = slice(start, start + numel * size)
        self._all.append((whole, inside))
        values = whole[inside].view(dtype)
        return values.fill_(math.nan) if dtype.is_floating_point else values

    def check(self) -> None:
        for whole, inside in self._all:
            assert (whole[: inside.start] == GUARD).all()
            assert (whole[inside.stop :] == GUARD).all()


class Native:
    """The C functions on tensors. Two runs into differently filled memory must agree: all of it was written."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

        def function(name: str, *arguments: type) -> ctypes._CFuncPtr:
            return ctypes.CFUNCTYPE(number, *arguments)((name, library))

        self.quantize_status = function(
            "qlk_cpu_quantize", pointer, number, size, number, size, pointer, pointer, number
        )
        self.dequantize_status = function("qlk_cpu_dequantize", pointer, number, pointer, number)
        self.quantize_absmax_status = function(
            "qlk_cpu_quantize_absmax", pointer, size, size, ctypes.c_float, pointer, pointer, number
        )
        self.dequantize_absmax_status = function(
            "qlk_cpu_dequantize_absmax", pointer, pointer, pointer, size, size, pointer, number
        )

    def quantize(
        self, weight: Tensor, fmt: str, block_size: int, threads: int = 1, shift: int = 0
    ) -> tuple[Tensor, Tensor]:
        outputs, numel = Outputs(shift), weight.numel()
        runs = []
        for fill in (0x00, 0xFF):
            packed = outputs.empty(FORMATS[fmt].packed_bytes(numel), torch.uint8).fill_(fill)
            absmax = outputs.empty(-(-numel // block_size), torch.float32)
            status = self.quantize_status(
                *(weight.data_ptr(), DTYPE_NUMBER[weight.dtype], numel, FORMAT_NUMBER[fmt], block_size),
                *(packed.data_ptr(), absmax.data_ptr(), threads),
            )
            assert status == OK
            runs.append((packed, absmax))
        outputs.check()
        assert torch.equal(runs[0][0], runs[1][0])
        return runs[0]

    def dequantize(self, weight: WeightView, dtype: torch.dtype, threads: int = 1, shift: int = 0) -> Tensor:
        outputs, numel = Outputs(shift), weight.out_features * weight.in_features
        out, again = outputs.empty(numel, dtype), outputs.empty(numel, dtype).zero_()
        for result in (out, again):
            status = self.dequantize_status(ctypes.byref(weight), DTYPE_NUMBER[dtype], result.data_ptr(), threads)
            assert status == OK
        outputs.check()
        assert_same(out, again)
        return out

    def quantize_absmax(
        self, absmax: Tensor, offset: Tensor, block_size: int, threads: int = 1, shift: int = 0
    ) -> tuple[Tensor, Tensor]:
        outputs, blocks = Outputs(shift), absmax.numel()
        runs = []
        for fill in (0x00, 0xFF):
            codes = outputs.empty(blocks, torch.uint8).fill_(fill)
            nested_absmax = outputs.empty(-(-blocks // block_size), torch.float32)
            status = self.quantize_absmax_status(
                *(absmax.data_ptr(), blocks, block_size, offset.item(), codes.data_ptr(), nested_absmax.data_ptr()),
                threads,
            )
            assert status == OK
            runs.append((codes, nested_absmax))
        outputs.check()
        assert torch.equal(runs[0][0], runs[1][0])
        return runs[0]

    def dequantize_absmax(
        self, codes: Tensor, nested_absmax: Tensor, offset: Tensor, block_size: int, threads: int = 1, shift: int = 0
    ) -> Tensor:
        outputs = Outputs(shift)
        absmax = outputs.empty(codes.numel(), torch.float32)
        status = self.dequantize_absmax_status(
            *(codes.data_ptr(), nested_absmax.data_ptr(), offset.data_ptr(), codes.numel(), block_size),
            *(absmax.data_ptr(), threads),
        )
        assert status == OK
        outputs.check()
        return absmax


def c_weight(
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor] | None,
    fmt: str,
    block_size: int,
    nested_block_size: int,
    numel: int,
) -> WeightView:
    pointers = [tensor.data_ptr() for tensor in (packed, absmax, *(nested or ()))]
    pointers += [None] * (4 - len(pointers))
    return WeightView(*pointers, 1, numel, block_size, nested_block_size, FORMAT_NUMBER[fmt])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, so that -0 is not 0; but all NaN count as the same."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        bits = {2: torch.int16, 4: torch.int32}[actual.dtype.itemsize]
        actual, expected = (t.masked_fill(t.isnan(), 0.0).view(bits) for t in (actual, expected))
    assert torch.equal(actual, expected)


def normal(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)
