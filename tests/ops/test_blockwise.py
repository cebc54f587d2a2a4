"""Quantized bytes and expanded weights: against bitsandbytes where it is right, and an independent slow loop."""

import bitsandbytes.functional
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.blockwise.op import (
    dequantize_absmax,
    dequantize_blockwise,
    quantize_absmax,
    quantize_blockwise,
)
from qlora_lab.ops.blockwise.reference import CHUNK
from qlora_lab.ops.blockwise.tables import cell_of, midpoints
from qlora_lab.ops.formats import FORMATS
from tests.ops.slow_blockwise import slow_dequantize, slow_quantize, unpacked

THEIRS = {"nf4": "nf4", "fp4_e2m1": "fp4"}
every_format = pytest.mark.parametrize("fmt", FORMATS)
shared_format = pytest.mark.parametrize("fmt", THEIRS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_equals_bitsandbytes(weight: Tensor, fmt: str, block_size: int) -> None:
    packed, absmax = quantize_blockwise(weight, fmt, block_size)
    expected, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=THEIRS[fmt])
    assert torch.equal(packed, expected.flatten())
    assert torch.equal(absmax, state.absmax)


@shared_format
@dtypes
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *[((7, 96), 32), ((5, 576), 64), ((192, 576), 64), ((3, 640), 128), ((3, 2048), 256), ((3, 2048), 512)],
        *[((2, 4096), 1024), ((3, 4096), 2048), ((3, 4096), 4096)],
    ],
)
def test_quantize_equals_bitsandbytes(fmt: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int) -> None:
    assert_equals_bitsandbytes(normal(*shape, dtype=dtype), fmt, block_size)


def tricky_values(fmt: str) -> list[float]:
    """Levels, ties between them, both neighbours of each tie, zeros of both signs, and very small numbers."""
    levels = torch.tensor(FORMATS[fmt].levels)
    ties = midpoints(levels)
    neighbours = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-2.0, 2.0)]
    small = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-42, -1e-42])
    return torch.cat((levels, ties, *neighbours, small)).tolist()


@shared_format
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_quantize_equals_bitsandbytes_at_ties_and_in_strange_blocks(fmt: str, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    values = st.one_of(st.sampled_from(tricky_values(fmt)), st.floats(-1, 1, width=32))
    weight = torch.tensor(data.draw(st.lists(values, min_size=32 * rows, max_size=32 * rows))).view(rows, 32)
    # Scales by powers of two keep ties exact; a zero row is an all-zero block; 1e-40 is below the least absmax.
    scale = data.draw(st.lists(st.sampled_from([1.0, 0.25, 0.0, 3.7, 1e-40]), min_size=rows, max_size=rows))
    assert_equals_bitsandbytes(weight * torch.tensor(scale)[:, None], fmt, 32)


@pytest.mark.parametrize(("fmt", "byte"), [("nf4", 0x77), ("fp4_e2m1", 0x00), ("fp4_e3m0", 0x00), ("int4", 0x00)])
def test_all_zero_block_holds_the_code_of_zero(fmt: str, byte: int) -> None:
    packed, absmax = quantize_blockwise(torch.zeros(2, 64), fmt, 64)
    assert packed.unique().tolist() == [byte]
    assert absmax.tolist() == [0.0, 0.0]
    assert torch.equal(dequantize_blockwise(packed, absmax, fmt, 64, 128), torch.zeros(128))


@every_format
def test_a_tie_goes_to_the_lower_level_and_the_next_float_to_the_upper(fmt: str) -> None:
    levels = torch.tensor(FORMATS[fmt].levels)
    ties = midpoints(levels)
    above = torch.nextafter(ties, torch.full_like(ties, 2.0))
    weight = torch.cat((torch.ones(1), ties, above))  # absmax 1: scaling changes nothing
    packed, _ = quantize_blockwise(weight, fmt, 4096)
    codes = unpacked(packed, fmt, weight.numel())
    ranks = list(range(len(ties)))
    expected = [FORMATS[fmt].codes[rank] for rank in [len(ties), *ranks, *(rank + 1 for rank in ranks)]]
    assert codes == expected


@every_format
@dtypes
@pytest.mark.parametrize("shape", [(1,), (31,), (33,), (5, 13), (2, 3, 64), (7, 97)])
@pytest.mark.parametrize("block_size", [32, 256])
def test_any_length_equals_the_slow_loop(fmt: str, dtype: torch.dtype, shape: tuple[int, ...], block_size: int) -> None:
    weight = normal(*shape, dtype=dtype)
    codes, statistics = slow_quantize(weight, fmt, block_size)
    packed, absmax = quantize_blockwise(weight, fmt, block_size)
    assert packed.shape == (FORMATS[fmt].packed_bytes(weight.numel()),)
    assert unpacked(packed, fmt, weight.numel()) == codes
    assert absmax.tolist() == statistics

    actual = dequantize_blockwise(packed, absmax, fmt, block_size, weight.numel(), dtype)
    # One multiplication in float32 and one rounding: exact.
    assert torch.equal(actual, slow_dequantize(codes, statistics, fmt, block_size, dtype))


def test_blocks_run_across_rows_where_bitsandbytes_goes_wrong() -> None:
    weight = normal(6, 96)
    codes, statistics = slow_quantize(weight, "nf4", 128)
    packed, absmax = quantize_blockwise(weight, "nf4", 128)
    assert unpacked(packed, "nf4", weight.numel()) == codes
    expected = slow_dequantize(codes, statistics, "nf4", 128, torch.float32)
    assert torch.equal(dequantize_blockwise(packed, absmax, "nf4", 128, 576), expected)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_a_weight_longer_than_one_chunk_equals_its_parts(block_size: int) -> None:
    weight = normal(CHUNK + 4096 + 33)
    packed, absmax = quantize_blockwise(weight, "nf4", block_size)
    first, first_absmax = quantize_blockwise(weight[:CHUNK], "nf4", block_size)
    last, last_absmax = quantize_blockwise(weight[CHUNK:], "nf4", block_size)
    assert torch.equal(packed, torch.cat((first, last)))
    assert torch.equal(absmax, torch.cat((first_absmax, last_absmax)))


@every_format
def test_a_transposed_weight_is_read_in_its_own_order(fmt: str) -> None:
    weight = normal(40, 24).t()
    assert torch.equal(quantize_blockwise(weight, fmt, 32)[0], quantize_blockwise(weight.contiguous(), fmt, 32)[0])


@shared_format
@dtypes
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        *[((7, 96), 32), ((5, 576), 64), ((3, 640), 128), ((3, 2048), 256), ((3, 2048), 512)],
        *[((3, 4096), 1024), ((3, 4096), 2048), ((3, 4096), 4096)],
    ],
)
def test_dequantize_equals_bitsandbytes(fmt: str, dtype: torch.dtype, shape: tuple[int, int], block_size: int) -> None:
    weight = normal(*shape, dtype=dtype)
    packed, absmax = quantize_blockwise(weight, fmt, block_size)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=THEIRS[fmt])
    with torch.compiler.set_stance("force_eager"):  # it compiles for seconds from blocks of 2048 on
        expected = bitsandbytes.functional.dequantize_4bit(theirs, state)
    actual = dequantize_blockwise(packed, absmax, fmt, block_size, weight.numel(), dtype)
    assert torch.equal(actual.view(shape), expected)


@every_format
def test_a_level_times_a_power_of_two_survives(fmt: str) -> None:
    levels = torch.tensor(FORMATS[fmt].levels)
    packed, absmax = quantize_blockwise(levels / 8, fmt, 4096)
    assert torch.equal(dequantize_blockwise(packed, absmax, fmt, 4096, levels.numel()), levels / 8)


@every_format
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_block_that_is_not_finite_decodes_to_nan_and_spares_its_neighbours(fmt: str, bad: float) -> None:
    weight = normal(4, 32)
    weight[1, 5] = bad
    packed, absmax = quantize_blockwise(weight, fmt, 32)
    values = dequantize_blockwise(packed, absmax, fmt, 32, 128).view(4, 32)
    assert values.isnan().any(dim=1).tolist() == [False, True, False, False]


@every_format
def test_cells_separate_midpoints(fmt: str) -> None:
    cells = cell_of(midpoints(torch.tensor(FORMATS[fmt].levels)))
    assert (cells.diff() > 0).all()


@pytest.mark.parametrize("numel", [1, 5, 255, 256, 257, 13824, 40000])
def test_double_quantization_equals_bitsandbytes(numel: int) -> None:
    absmax = normal(numel, seed=numel).abs() * 0.05
    codes, nested_absmax, offset = quantize_absmax(absmax, 256)
    expected, state = bitsandbytes.functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(offset, absmax.mean())
    assert torch.equal(codes, expected)
    assert torch.equal(nested_absmax, state.absmax)
    restored = bitsandbytes.functional.dequantize_blockwise(expected, state) + absmax.mean()
    assert torch.equal(dequantize_absmax(codes, nested_absmax, offset, 256), restored)


@shared_format
def test_nested_state_of_a_weight_equals_bitsandbytes(fmt: str) -> None:
    weight = normal(192, 576) * 0.03
    packed, absmax = quantize_blockwise(weight, fmt, 64)
    codes, nested_absmax, offset = quantize_absmax(absmax)
    theirs, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=THEIRS[fmt], compress_statistics=True
    )
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(codes, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_double_quantization_in_other_blocks_equals_bitsandbytes(block_size: int) -> None:
    absmax = normal(10_001).abs()
    codes, nested_absmax, offset = quantize_absmax(absmax, block_size)
    expected, state = bitsandbytes.functional.quantize_blockwise(absmax - offset, blocksize=block_size)
    assert torch.equal(codes, expected)
    assert torch.equal(nested_absmax, state.absmax)


def test_equal_absmax_survives_double_quantization() -> None:
    absmax = torch.full((300,), 0.5)
    assert torch.equal(dequantize_absmax(*quantize_absmax(absmax)), absmax)


def test_double_quantization_error_is_small() -> None:
    absmax = normal(5000).abs() + 1
    restored = dequantize_absmax(*quantize_absmax(absmax))
    largest_step = 0.015  # between the two widest levels of the map, of the block's largest deviation
    assert (restored - absmax).abs().max() <= largest_step / 2 * (absmax - absmax.mean()).abs().max() * 1.01
