"""The C functions refuse arguments that they would read or write outside of memory with, and then write nothing."""

import ctypes

import torch

from qlora_lab.ops.formats import FORMATS
from tests.kernels.quantize_calls import (
    BAD_BLOCK_SIZE,
    BAD_DTYPE,
    BAD_FORMAT,
    BAD_SIZE,
    NULL_POINTER,
    OK,
    Native,
    c_weight,
)


def test_quantize_refuses_bad_arguments(native: Native) -> None:
    weight, packed, absmax = torch.ones(64), torch.zeros(32, dtype=torch.uint8), torch.zeros(1)
    good = (weight.data_ptr(), 0, 64, 0, 64, packed.data_ptr(), absmax.data_ptr(), 1)

    def status(**changes: int | None) -> int:
        names = ("weight", "dtype", "numel", "format", "block_size", "packed", "absmax", "threads")
        return native.quantize_status(*(changes.get(name, value) for name, value in zip(names, good, strict=True)))

    assert [status(weight=None), status(packed=None), status(absmax=None)] == [NULL_POINTER] * 3
    assert [status(dtype=3), status(dtype=-1)] == [BAD_DTYPE] * 2
    assert [status(format=len(FORMATS)), status(format=-1)] == [BAD_FORMAT] * 2
    assert [status(block_size=size) for size in (48, 16, 0, -64, 8192, 2**40)] == [BAD_BLOCK_SIZE] * 6
    assert [status(numel=numel) for numel in (-1, -(2**63), 2**63 - 1, 2**60)] == [BAD_SIZE] * 4
    assert packed.sum() == 0 and absmax.sum() == 0
    assert status(numel=0, weight=None, packed=None, absmax=None) == OK
    assert [status(threads=threads) for threads in (-5, 0, 1000)] == [OK] * 3
    assert absmax == 1


def test_dequantize_refuses_bad_arguments(native: Native) -> None:
    packed, absmax, codes = torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    offset, out = torch.ones(()), torch.full((64,), 5.0)

    def status(dtype: int = 0, out_pointer: int | None = out.data_ptr(), **changes: int | None) -> int:
        weight = c_weight(packed, absmax, None, "nf4", 64, 0, 64)
        for name, value in changes.items():
            setattr(weight, name, value)
        return native.dequantize_status(ctypes.byref(weight), dtype, out_pointer, 1)

    assert native.dequantize_status(None, 0, out.data_ptr(), 1) == NULL_POINTER
    assert [status(packed=None), status(absmax=None), status(out_pointer=None)] == [NULL_POINTER] * 3
    assert [status(dtype=dtype) for dtype in (2, 3, -1)] == [BAD_DTYPE] * 3
    assert [status(format=number) for number in (len(FORMATS), -1)] == [BAD_FORMAT] * 2
    assert [status(block_size=size) for size in (48, 16, 0, -64, 8192)] == [BAD_BLOCK_SIZE] * 5
    sizes = ((-1, 64), (1, -64), (-1, -64), (2**32, 2**32), (2**62, 2), (2**31, 2**31))
    assert [status(out_features=rows, in_features=columns) for rows, columns in sizes] == [BAD_SIZE] * 6
    nested = {"absmax": codes.data_ptr(), "nested_absmax": absmax.data_ptr(), "nested_block_size": 256}
    assert status(**nested) == NULL_POINTER  # no offset
    assert status(**nested | {"offset": offset.data_ptr(), "nested_block_size": 100}) == BAD_BLOCK_SIZE
    assert out.unique().tolist() == [5.0]
    assert status(**nested, offset=offset.data_ptr()) == OK
    assert status(out_features=0, packed=None, absmax=None, out_pointer=None) == OK


def test_double_quantization_refuses_bad_arguments(native: Native) -> None:
    absmax, codes, nested, offset = torch.ones(4), torch.zeros(4, dtype=torch.uint8), torch.ones(1), torch.zeros(())
    pointers = [tensor.data_ptr() for tensor in (absmax, codes, nested, offset)]

    def quantize(blocks: int = 4, block_size: int = 256, missing: int = -1) -> int:
        first, second, third, _ = (None if i == missing else pointer for i, pointer in enumerate(pointers))
        return native.quantize_absmax_status(first, blocks, block_size, 0.0, second, third, 1)

    def dequantize(blocks: int = 4, block_size: int = 256, missing: int = -1) -> int:
        first, second, third, fourth = (None if i == missing else pointer for i, pointer in enumerate(pointers))
        return native.dequantize_absmax_status(second, third, fourth, blocks, block_size, first, 1)

    for status, arguments in ((quantize, 3), (dequantize, 4)):
        assert [status(missing=i) for i in range(arguments)] == [NULL_POINTER] * arguments
        assert [status(block_size=size) for size in (48, 16, 0, -256, 8192)] == [BAD_BLOCK_SIZE] * 5
        assert [status(blocks=blocks) for blocks in (-1, 2**63 - 1, 2**60)] == [BAD_SIZE] * 3
        assert [status(blocks=0, missing=i) for i in range(4)] == [OK] * 4
        assert status() == OK
