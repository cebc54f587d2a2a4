"""Native root mean square norms are within a bound of those in float64, whatever the shape."""

import ctypes
from ctypes import c_float, c_int64, c_void_p

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.linear_calls import (
    BAD_DTYPE,
    BAD_SIZE,
    BFLOAT16_UNIT,
    DTYPE_NUMBER,
    NULL_POINTER,
    OK,
    UNIT,
    Output,
    pointer,
)
from tests.kernels.test_linear import DTYPES, dtypes, random, repeatable

EPS = 1e-5
EXTRA_ROUNDINGS = 8  # of the mean, the root, the quotient and the products


def rms_norm(library: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float = EPS, threads: int = 1) -> list[Tensor]:
    """Return the norm and the scales."""
    out, scales = Output((len(x), x.shape[1]), x.dtype), Output((len(x), 1))
    status = library.qlk_cpu_rms_norm(
        *(c_void_p(pointer(x)), DTYPE_NUMBER[x.dtype], c_int64(len(x)), c_int64(x.shape[1]), c_void_p(pointer(weight))),
        *(c_float(eps), c_void_p(pointer(out.matrix)), c_void_p(pointer(scales.matrix)), threads),
    )
    assert status == OK
    return [out.checked(), scales.checked()]


def backward(
    library: ctypes.CDLL, gradient: Tensor, x: Tensor, weight: Tensor, scales: Tensor, threads: int = 1
) -> Tensor:
    out = Output((len(x), x.shape[1]), x.dtype)
    status = library.qlk_cpu_rms_norm_backward(
        *(c_void_p(pointer(gradient)), c_void_p(pointer(x)), DTYPE_NUMBER[x.dtype], c_int64(len(x))),
        *(c_int64(x.shape[1]), c_void_p(pointer(weight)), c_void_p(pointer(scales))),
        *(c_void_p(pointer(out.matrix)), threads),
    )
    assert status == OK
    return out.checked()


def check(library: ctypes.CDLL, rows: int, columns: int, dtype: torch.dtype, threads: int = 1) -> None:
    x, weight = random(rows, columns, dtype=dtype), random(columns, dtype=dtype, seed=2)
    gradient = random(rows, columns, dtype=dtype, seed=3)
    out, scales = rms_norm(library, x, weight, threads=threads)
    wide, by = x.double(), weight.double()
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    rounding = BFLOAT16_UNIT if dtype == torch.bfloat16 else 0.0
    gamma = (columns + EXTRA_ROUNDINGS) * UNIT
    assert ((scales.double() - scale).abs() <= gamma * scale).all()
    expected = by * (wide * scale)
    assert ((out.double() - expected).abs() <= (2.01 * rounding + 2 * gamma) * expected.abs()).all()
    products = by * gradient.double()
    mean = (products * wide).mean(-1, keepdim=True)
    expected = scale * (products - wide * scale**2 * mean)
    magnitude = (products * wide).abs().mean(-1, keepdim=True)
    bound = 4 * gamma * scale * (products.abs() + wide.abs() * scale**2 * magnitude) + rounding * expected.abs()
    found = backward(library, gradient, x, weight, scales, threads)
    assert ((found.double() - expected).abs() <= 1.01 * bound).all()


@pytest.mark.parametrize("columns", [1, 7, 16, 64, 576, 1000])
@dtypes
def test_results_are_within_the_bound(library: ctypes.CDLL, columns: int, dtype: torch.dtype) -> None:
    for rows in (0, 1, 5):
        check(library, rows, columns, dtype)


@given(rows=st.integers(1, 60), columns=st.integers(1, 300), threads=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
@repeatable
def test_any_shape(library: ctypes.CDLL, rows: int, columns: int, threads: int, dtype: torch.dtype) -> None:
    check(library, rows, columns, dtype, threads)


@dtypes
def test_it_rounds_where_transformers_does(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x, weight = random(5, 70, dtype=dtype), random(70, dtype=dtype, seed=2)
    out, scales = rms_norm(library, x, weight)
    assert torch.equal(out, weight * (x.float() * scales).to(dtype))


@dtypes
def test_a_row_of_zeros_is_one_of_zeros(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(1, 20, dtype=dtype), torch.ones(20, dtype=dtype)
    out, scales = rms_norm(library, x, weight)
    assert not out.any() and scales.item() == pytest.approx(EPS**-0.5)
    found = backward(library, torch.ones_like(x), x, weight, scales)
    assert found.float() == pytest.approx(EPS**-0.5, rel=0.01)


@dtypes
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x, weight = random(3, 40, dtype=dtype), random(40, dtype=dtype)
    x[1, 7] = float("nan")
    out, scales = rms_norm(library, x, weight)
    found = backward(library, torch.ones_like(x), x, weight, scales)
    for each in (out, found):
        assert each[1].isnan().all() and each[[0, 2]].isfinite().all()


def test_bad_arguments_are_refused(library: ctypes.CDLL) -> None:
    x, weight, scales = torch.ones(2, 4), torch.ones(4), torch.ones(2)
    out = torch.full((2, 4), 5.0)

    def statuses(**changes: int | None) -> list[int]:
        values = {"x": x, "weight": weight, "scales": scales, "out": out, "dtype": 0, "rows": 2, "columns": 4}
        values |= changes
        at = {name: c_void_p(v.data_ptr() if isinstance(v, Tensor) else v) for name, v in values.items()}
        sizes = (values["dtype"], c_int64(values["rows"]), c_int64(values["columns"]))
        return [
            library.qlk_cpu_rms_norm(at["x"], *sizes, at["weight"], c_float(EPS), at["out"], at["scales"], 1),
            library.qlk_cpu_rms_norm_backward(at["x"], at["x"], *sizes, at["weight"], at["scales"], at["out"], 1),
        ]

    assert all(statuses(**{name: None}) == [NULL_POINTER] * 2 for name in ("x", "weight", "scales", "out"))
    assert all(statuses(dtype=dtype) == [BAD_DTYPE] * 2 for dtype in (2, 3, -1))
    assert statuses(columns=0) == [BAD_SIZE] * 2
    for name in ("rows", "columns"):
        assert all(statuses(**{name: size}) == [BAD_SIZE] * 2 for size in (-1, -(2**63), 2**62))
    assert out.unique().tolist() == [5.0]
