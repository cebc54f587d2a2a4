"""Native products with a dense matrix are within a proven bound of the product in float64, whatever is in its rows."""

import ctypes
from ctypes import c_int64, c_void_p

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.linear_calls import (
    BAD_DTYPE,
    BAD_SIZE,
    DTYPE_NUMBER,
    NULL_POINTER,
    OK,
    Output,
    assert_within,
    pointer,
)
from tests.kernels.test_linear import DTYPES, EXTRA_ROUNDINGS, dtypes, random, repeatable

# (out_features, in_features): whole panels and tails of them, pairs and single elements, more than one piece of the
# inner dimension and more than pass through the workspace at once
SHAPES = [(48, 64), (49, 576), (130, 37), (1, 77), (33, 1), (7, 1600), (3200, 40), (3081, 50)]


def dense_linear(library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None, threads: int = 1) -> Tensor:
    out = Output((len(x), len(weight)))
    status = library.qlk_cpu_dense_linear(
        *(c_void_p(pointer(x)), c_int64(len(x)), c_void_p(pointer(weight)), DTYPE_NUMBER[weight.dtype]),
        *(c_int64(weight.shape[0]), c_int64(weight.shape[1]), c_void_p(pointer(bias))),
        *(c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked()


def dense_grad_input(library: ctypes.CDLL, grad_output: Tensor, weight: Tensor, threads: int = 1) -> Tensor:
    out = Output((len(grad_output), weight.shape[1]))
    status = library.qlk_cpu_dense_grad_input(
        *(c_void_p(pointer(grad_output)), c_int64(len(grad_output)), c_void_p(pointer(weight))),
        *(DTYPE_NUMBER[weight.dtype], c_int64(weight.shape[0]), c_int64(weight.shape[1])),
        *(c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked()


def check(library: ctypes.CDLL, isa: str, rows: int, weight: Tensor, threads: int = 1) -> None:
    """Compare both products with those in float64; the bound of sums in float32 holds, as nothing is rounded before."""
    dtype, (out_features, in_features) = weight.dtype, weight.shape
    x, bias = random(rows, in_features, dtype=dtype), random(out_features, dtype=dtype)
    shift = bias if rows % 2 else None
    wide = weight.double()
    expected = x.double() @ wide.T + (0 if shift is None else shift.double())
    magnitude = x.double().abs() @ wide.T.abs() + (0 if shift is None else shift.double().abs())
    found = dense_linear(library, x, weight, shift, threads)
    assert_within(found, expected, magnitude, in_features + EXTRA_ROUNDINGS)
    grad = random(rows, out_features)
    if dtype == torch.bfloat16 and isa == "avx512_bf16":
        grad_met = grad.bfloat16().double()
    else:
        grad_met = grad.double()
    found = dense_grad_input(library, grad, weight, threads)
    assert_within(found, grad_met @ wide, grad_met.abs() @ wide.abs(), out_features + EXTRA_ROUNDINGS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_products_are_within_the_bound(
    library: ctypes.CDLL, isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random(*shape, dtype=dtype)
    for rows in (0, 1, 2, 9, 40):
        check(library, isa, rows, weight)


@dtypes
def test_more_rows_than_pass_through_the_workspace_at_once(library: ctypes.CDLL, isa: str, dtype: torch.dtype) -> None:
    check(library, isa, 1100, random(130, 45, dtype=dtype), threads=2)


@given(
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 900),
    rows=st.integers(0, 40),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
@repeatable
def test_any_shape(
    library: ctypes.CDLL, isa: str, out_features: int, in_features: int, rows: int, threads: int, dtype: torch.dtype
) -> None:
    check(library, isa, rows, random(out_features, in_features, dtype=dtype), threads)


@dtypes
def test_threads_do_not_change_results(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight = random(3300, 128, dtype=dtype)
    x, grad = random(40, 128, dtype=dtype), random(40, 3300)
    for threads in (2, 3):
        assert torch.equal(dense_linear(library, x, weight, None), dense_linear(library, x, weight, None, threads))
        assert torch.equal(dense_grad_input(library, grad, weight), dense_grad_input(library, grad, weight, threads))


@dtypes
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight, x, grad = random(65, 64, dtype=dtype), random(9, 64, dtype=dtype), random(9, 65)
    x[4, 3] = grad[4, 3] = float("nan")
    for found in (dense_linear(library, x, weight, None), dense_grad_input(library, grad, weight)):
        assert found[4].isnan().all()
        assert found[:4].isfinite().all() and found[5:].isfinite().all()


def test_products_of_nothing_are_zero_or_the_bias(library: ctypes.CDLL) -> None:
    bias = random(5)
    assert torch.equal(dense_linear(library, torch.empty(2, 0), torch.empty(5, 0), bias), bias.expand(2, 5))
    assert not dense_grad_input(library, torch.empty(2, 0), torch.empty(0, 3)).any()


def test_bad_arguments_are_refused(library: ctypes.CDLL) -> None:
    x, weight, out = torch.ones(2, 4), torch.ones(3, 4), torch.full((2, 4), 5.0)

    def status(entry: str, **changes: int | None) -> int:
        values = {"left": x.data_ptr(), "rows": 2, "weight": weight.data_ptr(), "dtype": 0, "outs": 3, "ins": 4}
        values |= {"bias": None, "out": out.data_ptr()} | changes
        return int(
            getattr(library, entry)(
                *(c_void_p(values["left"]), c_int64(values["rows"]), c_void_p(values["weight"]), values["dtype"]),
                *(c_int64(values["outs"]), c_int64(values["ins"])),
                *((c_void_p(values["bias"]),) if entry.endswith("linear") else ()),
                *(c_void_p(values["out"]), 1),
            )
        )

    for entry in ("qlk_cpu_dense_linear", "qlk_cpu_dense_grad_input"):
        assert [status(entry, **{name: None}) for name in ("left", "weight", "out")] == [NULL_POINTER] * 3
        assert [status(entry, dtype=dtype) for dtype in (2, 3, -1)] == [BAD_DTYPE] * 3
        for name in ("rows", "outs", "ins"):
            assert [status(entry, **{name: size}) for size in (-1, -(2**63), 2**62)] == [BAD_SIZE] * 3
    assert out.unique().tolist() == [5.0]
