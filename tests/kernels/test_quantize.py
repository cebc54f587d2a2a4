"""Native quantize and dequantize equal the reference byte for byte: every instruction set, format, dtype and length."""

import ctypes
import math
from collections.abc import Iterator

import bitsandbytes.functional
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.tables import midpoints
from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.native.library import WeightView

OK, BAD_FORMAT, BAD_BLOCK_SIZE, BAD_DTYPE, BAD_SIZE, NULL_POINTER = range(6)
FORMAT_NUMBER = {name: number for number, name in enumerate(FORMATS)}
DTYPE_NUMBER = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
THEIRS = {"nf4": "nf4", "fp4_e2m1": "fp4"}
LENGTHS = (1, 2, 31, 32, 33, 63, 65, 127, 1000, 4096, 4097, 12_321)
GUARD_BYTES = 128
GUARD = 0xA5

every_format = pytest.mark.parametrize("fmt", FORMATS)
shared_format = pytest.mark.parametrize("fmt", THEIRS)
dtypes = pytest.mark.parametrize("dtype", DTYPE_NUMBER, ids=str)
out_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
block_sizes = pytest.mark.parametrize("block_size", [32, 64, 4096])
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


@pytest.fixture
def native(library: ctypes.CDLL) -> Native:
    return Native(library)


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


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_equals_the_reference(native: Native, fmt: str, dtype: torch.dtype) -> None:
    values = every_value_up_to_one(dtype)
    rows = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    for absmax in (1.0, 0.75):  # scaled by one, and by a reciprocal that is rounded
        weight = torch.cat((rows.clamp(-absmax, absmax), torch.full((len(rows), 1), absmax, dtype=dtype)), dim=1)
        packed, _ = native.quantize(weight, fmt, 32)
        assert_same(packed, reference.quantize_blockwise(weight, fmt, 32)[0])


def ties_and_neighbours(fmt: str) -> Tensor:
    ties = midpoints(torch.tensor(FORMATS[fmt].levels))
    around = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-2.0, 2.0)]
    zeros = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    return torch.cat((torch.ones(1), ties, *around, torch.tensor(FORMATS[fmt].levels), zeros))


@every_format
@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 2.0**100, 0.3])
def test_ties_and_their_neighbours_equal_the_reference(native: Native, fmt: str, scale: float) -> None:
    values = ties_and_neighbours(fmt) * scale
    for shift in range(0, 32, 5):  # in every lane, and in the rest of a block
        weight = torch.cat((normal(shift).clamp(-1, 1) * scale, values))
        packed, _ = native.quantize(weight, fmt, 4096)
        assert_same(packed, reference.quantize_blockwise(weight, fmt, 4096)[0])


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


@shared_format
@dtypes
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [((7, 96), 32), ((5, 576), 64), ((192, 576), 64), ((3, 640), 128), ((2, 4096), 1024), ((3, 4096), 4096)],
)
def test_equals_bitsandbytes(
    native: Native, fmt: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int
) -> None:
    weight = normal(shape[0] * shape[1], dtype).view(shape)
    weight.view(-1)[:block_size] = 0.0
    packed, absmax = native.quantize(weight, fmt, block_size)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=THEIRS[fmt])
    assert_same(packed, theirs.flatten())
    assert_same(absmax, state.absmax)
    if dtype != torch.float16:
        ours = native.dequantize(c_weight(packed, absmax, None, fmt, block_size, 0, weight.numel()), dtype)
        assert_same(ours, bitsandbytes.functional.dequantize_4bit(theirs, state).flatten())


@shared_format
def test_a_nested_state_equals_bitsandbytes(native: Native, fmt: str) -> None:
    weight = normal(192 * 576).view(192, 576) * 0.03
    theirs, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=THEIRS[fmt], compress_statistics=True
    )
    packed, absmax = native.quantize(weight, fmt, 64)
    codes, nested_absmax = native.quantize_absmax(absmax, absmax.mean(), 256)
    assert_same(packed, theirs.flatten())
    assert_same(codes, state.absmax)
    assert_same(nested_absmax, state.state2.absmax)
    nested = c_weight(packed, codes, (nested_absmax, state.offset), fmt, 64, 256, weight.numel())
    expected = bitsandbytes.functional.dequantize_4bit(theirs, state)
    assert_same(native.dequantize(nested, torch.float32), expected.flatten())


def assert_absmax_equals_the_reference(
    native: Native, absmax: Tensor, offset: Tensor, block_size: int, threads: int = 1, shift: int = 0
) -> None:
    codes, nested_absmax = native.quantize_absmax(absmax, offset, block_size, threads, shift)
    expected, expected_absmax = reference.quantize_absmax(absmax, offset, block_size)
    assert_same(codes, expected)
    assert_same(nested_absmax, expected_absmax)
    actual = native.dequantize_absmax(codes, nested_absmax, offset, block_size, threads, shift)
    assert_same(actual, reference.dequantize_absmax(codes, nested_absmax, offset, block_size))


@repeatable
@given(
    blocks=st.integers(1, 40_000),
    block_size=st.sampled_from([32 << i for i in range(8)]),
    threads=st.integers(0, 4),
    shift=st.integers(0, 17),
)
def test_double_quantization_equals_the_reference(
    native: Native, blocks: int, block_size: int, threads: int, shift: int
) -> None:
    absmax = normal(blocks + shift, seed=blocks).abs()[shift:] * 0.05
    assert_absmax_equals_the_reference(native, absmax, absmax.mean(), block_size, threads, shift)


@pytest.mark.parametrize("block_size", [32, 256])
@pytest.mark.parametrize("special", [math.nan, math.inf, 3.4e38, 1e-45])
def test_double_quantization_of_strange_absmax(native: Native, block_size: int, special: float) -> None:
    absmax = normal(1003).abs()
    absmax[500] = special
    assert_absmax_equals_the_reference(native, absmax, absmax.mean(), block_size)
    assert_absmax_equals_the_reference(native, absmax, torch.tensor(0.5), block_size)


def test_equal_absmax_survives_double_quantization(native: Native) -> None:
    absmax = torch.full((301,), 0.5)
    codes, nested_absmax = native.quantize_absmax(absmax, absmax.mean(), 256)
    assert codes.unique().tolist() == [0]
    assert_same(native.dequantize_absmax(codes, nested_absmax, absmax.mean(), 256), absmax)


def test_every_step_of_the_grid_of_double_quantization(native: Native) -> None:
    # Between and on the 65,536 steps; one value in each block is 1, so that nothing is scaled.
    values = torch.linspace(-1, 1, 4 * reference.DYNAMIC_GRID + 1)
    rows = torch.nn.functional.pad(values, (0, -len(values) % 4095)).view(-1, 4095)
    absmax = torch.cat((rows, torch.ones(len(rows), 1)), dim=1).view(-1)
    assert_absmax_equals_the_reference(native, absmax, torch.zeros(()), 4096)


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
