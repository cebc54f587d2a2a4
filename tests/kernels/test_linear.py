"""Native matrix products with a quantized weight are within a proven bound of the product in float64."""

import ctypes
import os
import subprocess
import sys
from ctypes import byref, c_int64, c_void_p

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.registry import KERNELS
from tests.kernels.linear_calls import (
    BAD_BLOCK_SIZE,
    BAD_DTYPE,
    BAD_FORMAT,
    BAD_SIZE,
    NULL_POINTER,
    OK,
    Weight,
    assert_within,
    linear,
    linear_grad_input,
    multiplied,
    pointer,
    random_weight,
)

ROWS = (0, 1, 2, 3, 5, 8, 11, 16, 17, 40, 64)
DTYPES = (torch.float32, torch.bfloat16)
EXTRA_ROUNDINGS = 16  # of a product, its pieces' sums, the bias

# (out_features, in_features), format, block size, nested: whole blocks in a row, blocks across rows, rows that begin in
# the middle of a byte, tails of panels and of pieces of the inner dimension, more blocks than are scaled at once
WEIGHTS = {
    "whole blocks": ((50, 320), "nf4", 64, False),
    "whole blocks, nested": ((49, 576), "nf4", 64, True),
    "small blocks": ((33, 96), "fp4_e2m1", 32, True),
    "many blocks": ((18, 2112), "nf4", 32, True),
    "blocks across rows": ((65, 100), "fp4_e3m0", 64, False),
    "odd": ((37, 45), "int4", 32, True),
    "one large block": ((20, 31), "nf4", 4096, False),
    "large blocks across rows": ((9, 1500), "nf4", 1024, False),
    "bytes": ((37, 130), "int8", 64, True),
    "one column": ((1, 77), "nf2", 32, False),
    "one row": ((130, 1), "nf3", 32, False),
}
weights = pytest.mark.parametrize("case", WEIGHTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
repeatable = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_forward(library: ctypes.CDLL, weight: Weight, x: Tensor, bias: Tensor | None, threads: int = 1) -> None:
    dense = multiplied(library, weight, x.dtype)
    expected, magnitude = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert_within(linear(library, x, weight, bias, threads), expected, magnitude, dense.shape[1] + EXTRA_ROUNDINGS)


def check_grad_input(library: ctypes.CDLL, weight: Weight, grad: Tensor, threads: int = 1) -> None:
    dense = multiplied(library, weight, grad.dtype)
    expected, magnitude = grad.double() @ dense, grad.double().abs() @ dense.abs()
    roundings = dense.shape[0] + EXTRA_ROUNDINGS
    assert_within(linear_grad_input(library, grad, weight, threads), expected, magnitude, roundings)


@weights
@dtypes
def test_products_are_within_the_bound(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    shape, fmt, block_size, nested = WEIGHTS[case]
    weight = random_weight(shape, fmt, block_size, nested=nested)
    bias = random(shape[0], dtype=dtype)
    for rows in ROWS:
        check_forward(library, weight, random(rows, shape[1], dtype=dtype), bias if rows % 2 else None)
        check_grad_input(library, weight, random(rows, shape[0], dtype=dtype))


def test_every_format_is_tested() -> None:
    assert {fmt for _, fmt, _, _ in WEIGHTS.values()} == set(FORMATS)


@pytest.mark.parametrize("case", ["whole blocks, nested", "odd"])
@dtypes
def test_many_rows_are_within_the_bound(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    """More rows than one rectangle of the output, and than pass through the workspace at once."""
    shape, fmt, block_size, nested = WEIGHTS[case]
    weight = random_weight(shape, fmt, block_size, nested=nested)
    for rows in (300, 1100):
        check_forward(library, weight, random(rows, shape[1], dtype=dtype), random(shape[0], dtype=dtype), threads=2)
        check_grad_input(library, weight, random(rows, shape[0], dtype=dtype), threads=2)


@given(
    out_features=st.integers(1, 120),
    in_features=st.integers(1, 300),
    rows=st.integers(0, 40),
    block_size=st.sampled_from([32, 64, 256]),
    fmt=st.sampled_from(sorted(FORMATS)),
    nested=st.booleans(),
    threads=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
)
@repeatable
def test_any_shape(
    library: ctypes.CDLL,
    out_features: int,
    in_features: int,
    rows: int,
    block_size: int,
    fmt: str,
    nested: bool,
    threads: int,
    dtype: torch.dtype,
) -> None:
    weight = random_weight((out_features, in_features), fmt, block_size, nested=nested)
    check_forward(library, weight, random(rows, in_features, dtype=dtype), random(out_features, dtype=dtype), threads)
    check_grad_input(library, weight, random(rows, out_features, dtype=dtype), threads)


@dtypes
def test_threads_do_not_change_results(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight = random_weight((200, 128))
    for rows in (1, 3, 40, 300):
        x, grad = random(rows, 128, dtype=dtype), random(rows, 200, dtype=dtype)
        for threads in (2, 3):
            assert torch.equal(linear(library, x, weight, None, 1), linear(library, x, weight, None, threads))
            one, more = (linear_grad_input(library, grad, weight, count) for count in (1, threads))
            assert torch.equal(one, more)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["whole blocks", "odd"])
@dtypes
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, case: str, value: float, dtype: torch.dtype) -> None:
    shape, fmt, block_size, nested = WEIGHTS[case]
    weight = random_weight(shape, fmt, block_size, nested=nested)
    for rows in (1, 3, 20):
        x, grad = random(rows, shape[1], dtype=dtype), random(rows, shape[0], dtype=dtype)
        x[rows // 2, shape[1] - 1] = grad[rows // 2, shape[0] - 1] = value
        for result in (linear(library, x, weight), linear_grad_input(library, grad, weight)):
            finite = result.isfinite()
            assert not finite[rows // 2].all()
            finite[rows // 2] = True
            assert finite.all()


@pytest.mark.parametrize("value", [0.0, 1e-40, float("inf"), float("nan")])
def test_a_block_of_a_strange_weight(library: ctypes.CDLL, value: float) -> None:
    """Of zeros, denormals, and what came from infinities: the second block of the first of three rows."""
    weight = random_weight((3, 160), "nf4", 32, odd_absmax=value)
    for rows in (1, 3, 40):
        x, grad = random(rows, 160) * 1e6, random(rows, 3) * 1e6  # large enough for results that are no denormals
        if value < 1:
            check_forward(library, weight, x, None)
            check_grad_input(library, weight, grad)
            continue
        out, grad_input = linear(library, x, weight), linear_grad_input(library, grad, weight)
        assert not out[:, 0].isfinite().any() and out[:, 1:].isfinite().all()
        spoilt = torch.zeros(160, dtype=torch.bool)
        spoilt[32:64] = True
        assert not grad_input[:, spoilt].isfinite().any() and grad_input[:, ~spoilt].isfinite().all()


@dtypes
def test_what_is_off_the_usual_alignment(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight = random_weight((49, 64))
    shifted = [torch.cat((part[:1], part))[1:] for part in weight.parts[:2] if part is not None]
    weight.view.packed, weight.view.absmax = (pointer(part) for part in shifted)
    for rows in (2, 20):
        x, grad = random(rows * 64 + 1, dtype=dtype)[1:], random(rows * 49 + 1, dtype=dtype)[1:]
        check_forward(library, weight, x.view(rows, 64), random(50, dtype=dtype)[1:])
        check_grad_input(library, weight, grad.view(rows, 49))


def test_denormal_inputs_are_not_flushed(library: ctypes.CDLL) -> None:
    weight = random_weight((33, 96))
    for rows in (1, 20):
        x, grad = random(rows, 96) * 1e-41, random(rows, 33) * 1e-41
        for actual, expected in (
            (linear(library, x, weight), x.double() @ weight.dense.double().T),
            (linear_grad_input(library, grad, weight), grad.double() @ weight.dense.double()),
        ):
            assert (actual.double() - expected).abs().max() < 200 * 2.0**-149  # one rounding to a denormal a term
            assert actual.any()


def test_empty_products(library: ctypes.CDLL) -> None:
    without_inputs = random_weight((5, 0))
    bias = random(5)
    for rows in (1, 9):
        x = torch.empty(rows, 0)
        assert torch.equal(linear(library, x, without_inputs, bias), bias.expand(rows, 5))
        assert torch.equal(linear(library, x, without_inputs), torch.zeros(rows, 5))
        assert linear_grad_input(library, random(rows, 5), without_inputs).shape == (rows, 0)
    without_outputs = random_weight((0, 5))
    assert linear(library, random(3, 5), without_outputs).shape == (3, 0)
    assert torch.equal(linear_grad_input(library, torch.empty(3, 0), without_outputs), torch.zeros(3, 5))


def test_bad_arguments_give_a_status(library: ctypes.CDLL) -> None:
    matrix = random(2, 64)
    full = c_void_p(pointer(matrix))

    def status(rows: int = 2, dtype: int = 0, x: c_void_p = full, out: c_void_p = full, **changes: int | None) -> int:
        weight = random_weight((64, 64), nested=True)
        for name, value in changes.items():
            setattr(weight.view, name, value)
        view = byref(weight.view)
        found = library.qlk_cpu_linear(x, dtype, c_int64(rows), view, None, out, 1)
        assert found == library.qlk_cpu_linear_grad_input(x, dtype, c_int64(rows), view, out, 1)
        return found

    assert status() == OK
    assert status(format=99) == status(format=-1) == BAD_FORMAT
    assert status(block_size=48) == status(block_size=0) == status(nested_block_size=8192) == BAD_BLOCK_SIZE
    assert status(dtype=2) == status(dtype=-1) == BAD_DTYPE
    assert status(rows=-1) == status(in_features=-1) == status(rows=2**60) == BAD_SIZE
    assert status(out_features=2**40, in_features=2**40) == BAD_SIZE
    null = c_void_p(None)
    assert status(x=null) == status(out=null) == status(packed=None) == status(offset=None) == NULL_POINTER
    assert library.qlk_cpu_linear(full, 0, c_int64(2), None, None, full, 1) == NULL_POINTER


PEAK_OF_A_PRODUCT = """
import resource, torch
from qlora_lab.ops.blockwise.op import quantized_linear
from qlora_lab.ops.blockwise.weight import PackedWeight

OUT, IN = 11008, 4096
codes, absmax = torch.zeros(OUT * IN // 2, dtype=torch.uint8), torch.ones(OUT * IN // 64)
weight = PackedWeight(codes, absmax, None, None, "nf4", 64, 256, OUT, IN)
x, out = torch.ones(64, IN, requires_grad=True), torch.ones(64, OUT)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantized_linear(x, weight).backward(out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * OUT * IN))
"""


@pytest.mark.skipif(KERNELS.library is None, reason=f"no native kernels: {KERNELS.reason}")
@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="under a sanitizer memory is not what the library takes")
def test_a_product_never_has_the_whole_dense_weight() -> None:
    """The library's own memory, which torch does not see."""
    done = subprocess.run([sys.executable, "-c", PEAK_OF_A_PRODUCT], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.25
