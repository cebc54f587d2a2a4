"""Native quantize and dequantize equal the reference byte for byte: every instruction set, format, dtype and length."""

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.tables import midpoints
from qlora_lab.ops.formats import FORMATS
from tests.kernels.quantize_calls import (
    DTYPE_NUMBER,
    OK,
    Native,
    assert_same,
    c_weight,
    dtypes,
    every_format,
    normal,
    repeatable,
)

LENGTHS = (1, 2, 31, 32, 33, 63, 65, 127, 1000, 4096, 4097, 12_321)
out_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
block_sizes = pytest.mark.parametrize("block_size", [32, 64, 4096])


def strange_weight(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return normal weights, among which lie runs of zeros and denormals, a NaN, infinities, and the largest number."""
    weight = normal(numel, dtype, seed)
    places = torch.randint(0, numel, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    if numel > 40:  # shorter ones stay finite, else there would be no ordinary ones
        weight[places[0] : places[0] + 150] = 0.0
        weight[places[1] : places[1] + 150] *= torch.finfo(dtype).tiny  # most become denormals
        weight[places[2] : places[2] + 70] *= -0.0
    if numel > 1000:
        weight[places[3]] = math.nan
        weight[places[4]] = math.inf
        weight[places[5]] = -math.inf
        weight[places[6]] = torch.finfo(dtype).max
        weight[places[7]] = torch.finfo(dtype).smallest_normal / 4
    return weight


def assert_equals_the_reference(
    native: Native, weight: Tensor, fmt: str, block_size: int, threads: int = 1, shift: int = 0
) -> None:
    """Quantize, then dequantize to both dtypes, with and without double quantization."""
    packed, absmax = native.quantize(weight, fmt, block_size, threads, shift)
    expected, expected_absmax = reference.quantize_blockwise(weight, fmt, block_size)
    assert_same(packed, expected)
    assert_same(absmax, expected_absmax)

    numel, nested_block_size = weight.numel(), 32
    offset = absmax.nan_to_num(0.1, 0.2).mean()
    codes, nested_absmax = reference.quantize_absmax(absmax, offset, nested_block_size)
    for dtype in (torch.float32, torch.bfloat16):
        for first, nested in ((absmax, None), (codes, (nested_absmax, offset))):
            state = c_weight(packed, first, nested, fmt, block_size, nested_block_size, numel)
            actual = native.dequantize(state, dtype, threads, shift)
            parts = (packed, first, *(nested or (None, None)), fmt, block_size, nested_block_size, 1, numel, dtype)
            assert_same(actual, reference.dequantize_weight(*parts).view(-1))


@every_format
@dtypes
@block_sizes
def test_every_length_equals_the_reference(native: Native, fmt: str, dtype: torch.dtype, block_size: int) -> None:
    for numel in LENGTHS:
        assert_equals_the_reference(native, strange_weight(numel, dtype, seed=numel), fmt, block_size)


@repeatable
@given(
    fmt=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(list(DTYPE_NUMBER)),
    block_size=st.sampled_from([32 << i for i in range(8)]),
    numel=st.integers(1, 70_000),
    threads=st.integers(0, 4),
    shift=st.integers(0, 17),
)
def test_random_shapes_threads_and_addresses_equal_the_reference(
    native: Native, fmt: str, dtype: torch.dtype, block_size: int, numel: int, threads: int, shift: int
) -> None:
    weight = strange_weight(numel + shift, dtype, seed=numel)[shift:]
    assert_equals_the_reference(native, weight, fmt, block_size, threads, shift)


def every_value_up_to_one(dtype: torch.dtype) -> Tensor:
    """Return all numbers of a 16-bit dtype in [-1, 1], zeros of both signs and denormals among them."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.abs() <= 1]


def in_blocks(values: Tensor, block_size: int, absmax: float) -> Tensor:
    """Return the values in rows of whole blocks, each of which begins with its absmax."""
    count = block_size - 1
    rows = torch.nn.functional.pad(values.clamp(-absmax, absmax), (0, -len(values) % count)).view(-1, count)
    return torch.nn.functional.pad(rows, (1, 0), value=absmax)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_every_16_bit_value_equals_the_reference(native: Native, fmt: str, dtype: torch.dtype, block_size: int) -> None:
    for absmax in (1.0, 0.75):  # scaled by one, and by a reciprocal that is rounded
        weight = in_blocks(every_value_up_to_one(dtype), block_size, absmax)
        packed, _ = native.quantize(weight, fmt, block_size)
        assert_same(packed, reference.quantize_blockwise(weight, fmt, block_size)[0])


def ties_and_neighbours(fmt: str) -> Tensor:
    ties = midpoints(torch.tensor(FORMATS[fmt].levels))
    around = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-2.0, 2.0)]
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    return torch.cat((torch.ones(1), ties, *around, torch.tensor(FORMATS[fmt].levels), zeros))


@every_format
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100, 0.3])
def test_ties_and_their_neighbours_equal_the_reference(native: Native, fmt: str, scale: float) -> None:
    values = ties_and_neighbours(fmt) * scale
    for shift in range(0, 32, 5):  # in every lane
        cut_short = torch.cat((normal(shift).clamp(-1, 1) * scale, values))
        for weight, block_size in ((cut_short, 4096), (in_blocks(values, 64, scale).roll(shift, dims=1), 64)):
            packed, _ = native.quantize(weight, fmt, block_size)
            assert_same(packed, reference.quantize_blockwise(weight, fmt, block_size)[0])


@every_format
@dtypes
def test_a_block_that_is_not_finite_gets_the_code_of_zero(native: Native, fmt: str, dtype: torch.dtype) -> None:
    zero = reference.quantize_blockwise(torch.zeros(32), fmt, 32)[0][0].item()
    in_block = FORMATS[fmt].packed_bytes(32)
    for place in (0, 17, 31):
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            weight = normal(96, dtype)
            weight[32 + place] = bad
            packed, absmax = native.quantize(weight, fmt, 32)
            assert packed[in_block : 2 * in_block].unique().tolist() == [zero]
            assert math.isnan(absmax[1]) if math.isnan(bad) else absmax[1] == math.inf
            assert absmax.isfinite().tolist() == [True, False, True]
        assert_equals_the_reference(native, weight, fmt, 32)


@dtypes
@pytest.mark.parametrize("block_size", [32, 64])
def test_every_nan_leaves_the_same_bits(native: Native, dtype: torch.dtype, block_size: int) -> None:
    as_bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    weight = normal(4 * block_size, dtype)
    for block, bits_more in enumerate((1, 5, 1)):  # an infinity's and more
        weight[block * block_size + 7] = math.inf if block < 2 else -math.inf
        weight.view(as_bits)[block * block_size + 7] += bits_more
    assert weight.isnan().sum() == 3
    _, absmax = native.quantize(weight, "nf4", block_size)
    assert absmax.view(torch.int32)[:3].tolist() == [0x7FC00000] * 3
    assert absmax[3].isfinite()


@every_format
def test_zeros_have_an_absmax_of_zero_and_come_back(native: Native, fmt: str) -> None:
    for weight in (torch.zeros(65), torch.full((65,), -0.0)):
        packed, absmax = native.quantize(weight, fmt, 32)
        assert absmax.tolist() == [0.0, 0.0, 0.0]
        assert packed.unique().numel() == 1
        out = native.dequantize(c_weight(packed, absmax, None, fmt, 32, 0, 65), torch.float32)
        assert_same(out, torch.zeros(65))


@every_format
def test_an_odd_last_code_shares_its_byte_with_zero(native: Native, fmt: str) -> None:
    if FORMATS[fmt].bits == 8:
        pytest.skip("one code a byte")
    padded = torch.cat((normal(33), torch.zeros(1)))
    assert_same(native.quantize(padded[:33], fmt, 64)[0], native.quantize(padded, fmt, 64)[0])


@every_format
@out_dtypes
def test_every_byte_decodes_as_in_the_reference(native: Native, fmt: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    numel = 256 * 8 // FORMATS[fmt].bits
    for scale in (1.0, 0.3, 0.0, 1e-41, 3e38, math.inf, math.nan):
        absmax = torch.full((numel // 64,), scale)
        actual = native.dequantize(c_weight(packed, absmax, None, fmt, 64, 0, numel), dtype)
        expected = reference.dequantize_weight(packed, absmax, None, None, fmt, 64, 0, 1, numel, dtype)
        assert_same(actual, expected.view(-1))


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@out_dtypes
@pytest.mark.parametrize("shift", [0, 1])
def test_results_too_large_for_the_caches(native: Native, fmt: str, dtype: torch.dtype, shift: int) -> None:
    # Over 1 MB, and written past the caches where they lie on a multiple of 64 bytes.
    numel = 2**20 // dtype.itemsize + 8229
    packed = torch.randint(0, 256, (FORMATS[fmt].packed_bytes(numel),), generator=torch.Generator().manual_seed(0))
    packed, absmax = packed.to(torch.uint8), normal(-(-numel // 64)).abs()
    actual = native.dequantize(c_weight(packed, absmax, None, fmt, 64, 0, numel), dtype, threads=2, shift=shift)
    expected = reference.dequantize_weight(packed, absmax, None, None, fmt, 64, 0, 1, numel, dtype)
    assert_same(actual, expected.view(-1))


@every_format
def test_instruction_sets_give_the_same_bytes(library: ctypes.CDLL, native: Native, fmt: str) -> None:
    # Those of the reference, as all other tests say; here also the bits of every NaN.
    weight = strange_weight(5003, torch.float32, seed=1)
    results = []
    for _ in every_instruction_set(library):
        packed, absmax = native.quantize(weight, fmt, 32)
        state = c_weight(packed, absmax, None, fmt, 32, 0, 5003)
        out = native.dequantize(state, torch.bfloat16)
        results.append((packed, absmax.view(torch.int32), out.view(torch.int16)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def every_instruction_set(library: ctypes.CDLL) -> Iterator[str]:
    """Switch the library to each instruction set of this machine, and back."""
    names = ctypes.CFUNCTYPE(ctypes.c_char_p)
    before = names(("qlk_cpu_isa", library))()
    try:
        for name in names(("qlk_cpu_isas", library))().split():
            assert library.qlk_cpu_use_isa(name) == OK
            yield name.decode()
    finally:
        assert library.qlk_cpu_use_isa(before) == OK
