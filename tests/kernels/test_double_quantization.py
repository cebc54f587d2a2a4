"""Native double quantization equals the reference byte for byte."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.blockwise import reference
from tests.kernels.quantize_calls import Native, assert_same, normal, repeatable


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
