"""The native adapter against float64 autograd with the reference's dropout mask, within a proven bound."""

import ctypes
from ctypes import byref, c_int64, c_void_p
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.lora.dropout import drop
from tests.kernels.linear_calls import (
    BAD_SIZE,
    NULL_POINTER,
    OK,
    Adapter,
    Weight,
    assert_within,
    linear,
    lora_linear,
    lora_linear_backward,
    multiplied,
    pointer,
    random_weight,
)

DTYPES = (torch.float32, torch.bfloat16)
EXTRA_ROUNDINGS = 32  # of scalings, dropout's factor, products, the sums of pieces
# (out_features, in_features), format, block size, rank, dropout
CASES = {
    "whole blocks": ((50, 320), "nf4", 64, 16, 0.0),
    "dropout": ((49, 128), "nf4", 64, 8, 0.1),
    "odd": ((37, 45), "int4", 32, 7, 0.5),
    "one rank": ((33, 70), "int8", 64, 1, 0.25),
    "large rank": ((60, 96), "fp4_e2m1", 32, 256, 0.05),
}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
repeatable = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(case: str) -> tuple[Weight, Adapter]:
    return layer_of(*CASES[case])


def layer_of(shape: tuple[int, int], fmt: str, block_size: int, rank: int, dropout: float) -> tuple[Weight, Adapter]:
    weight = random_weight(shape, fmt, block_size, nested=rank % 2 == 0)
    lora_A, lora_B = random(rank, shape[1], seed=2), random(shape[0], rank, seed=3)
    return weight, Adapter(lora_A, lora_B, scaling=0.75, dropout=dropout, seed=2**63 + 12345)


def check(library: ctypes.CDLL, weight: Weight, adapter: Adapter, rows: int, dtype: torch.dtype, threads: int) -> None:
    """Check output, `low` and all gradients; each magnitude is the same expression of absolute values."""
    out_features, in_features = weight.dense.shape
    x, grad = random(rows, in_features, dtype=dtype), random(rows, out_features, dtype=dtype, seed=4)
    bias = random(out_features, dtype=dtype, seed=5)
    out, low = lora_linear(library, x, weight, bias, adapter, threads)
    grad_x, grad_A, grad_B = lora_linear_backward(library, grad, x, low, weight, adapter, threads)

    mask = drop(torch.ones(rows, in_features), adapter.dropout, adapter.seed).double()
    roundings = in_features + out_features + rows + 2 * adapter.lora_A.shape[0] + EXTRA_ROUNDINGS
    dense = multiplied(library, weight, dtype)
    expected = Autograd(x, dense, bias, adapter, mask, grad, magnitudes=False)
    magnitude = Autograd(x, dense, bias, adapter, mask, grad, magnitudes=True)
    for actual, name in ((out, "out"), (low, "low"), (grad_x, "grad_x"), (grad_A, "grad_A"), (grad_B, "grad_B")):
        assert actual is not None
        assert_within(actual, getattr(expected, name), getattr(magnitude, name), roundings)
    without = lora_linear_backward(library, grad, x, low, weight, adapter, threads, needs_input=False)
    assert without[0] is None and torch.equal(without[1], grad_A) and torch.equal(without[2], grad_B)


class Autograd:
    """What torch gets in float64, of everything or (`magnitudes`) of everything's absolute values."""

    def __init__(
        self,
        x: Tensor,
        dense: Tensor,
        bias: Tensor,
        adapter: Adapter,
        mask: Tensor,
        grad: Tensor,
        *,
        magnitudes: bool,
    ) -> None:
        def leaf(tensor: Tensor) -> Tensor:
            double = tensor.double()
            return (double.abs() if magnitudes else double).clone().requires_grad_()

        values, lora_A, lora_B = leaf(x), leaf(adapter.lora_A), leaf(adapter.lora_B)
        low = (values * mask) @ lora_A.T
        out = values @ leaf(dense).T + leaf(bias) + adapter.scaling * (low @ lora_B.T)
        out.backward(leaf(grad).detach())
        self.low, self.out = low.detach(), out.detach()
        self.grad_x, self.grad_A, self.grad_B = values.grad, lora_A.grad, lora_B.grad


@cases
@dtypes
def test_adapter_is_within_the_bound(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    for rows, threads in ((1, 1), (3, 2), (7, 1), (20, 2), (64, 2)):
        check(library, *layer(case), rows, dtype, threads)


def test_many_rows(library: ctypes.CDLL) -> None:
    """More rows than pass through the workspace at once."""
    check(library, *layer("odd"), 1100, torch.float32, threads=2)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 200)),
    fmt=st.sampled_from(sorted(FORMATS)),
    block_size=st.sampled_from([32, 64, 256]),
    rank=st.integers(1, 80),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    rows=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 2),
)
@repeatable
def test_any_shape(
    library: ctypes.CDLL,
    shape: tuple[int, int],
    fmt: str,
    block_size: int,
    rank: int,
    dropout: float,
    rows: int,
    dtype: torch.dtype,
    threads: int,
) -> None:
    check(library, *layer_of(shape, fmt, block_size, rank, dropout), rows, dtype, threads)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
@dtypes
def test_dropout_drops_what_the_reference_drops(library: ctypes.CDLL, share: float, dtype: torch.dtype) -> None:
    """With the identity as lora_A, `low` is the dropped input itself."""
    for rows, features in ((3, 50), (40, 33), (1030, 17)):
        weight = random_weight((4, features))
        x = random(rows, features, dtype=dtype)
        for seed in (0, 1, 2**64 - 1):
            adapter = Adapter(torch.eye(features), torch.zeros(4, features), 1.0, share, seed)
            _, low = lora_linear(library, x, weight, None, adapter, threads=2)
            assert torch.equal(low, x.float() * drop(torch.ones(rows, features), share, seed))


def test_dropped_share_and_independence() -> None:
    """Counts are within five standard deviations: of elements, of two seeds, of neighbours, of far elements."""
    numel, share = 400_000, 0.2
    first, second = (drop(torch.ones(numel), share, seed) == 0 for seed in (7, 8))
    samples = (
        (share, first),
        (share**2, first & second),
        (share**2, first[:-1] & first[1:]),
        (share**2, first[: numel // 2] & first[numel // 2 :]),
    )
    for expected, sample in samples:
        deviation = (expected * (1 - expected) / sample.numel()) ** 0.5
        assert abs(sample.double().mean().item() - expected) < 5 * deviation


def test_threads_do_not_change_results(library: ctypes.CDLL) -> None:
    weight, adapter = layer("dropout")
    x, grad = random(300, 128), random(300, 49)
    out, low = lora_linear(library, x, weight, None, adapter, threads=1)
    one = lora_linear_backward(library, grad, x, low, weight, adapter, threads=1)
    for threads in (2, 3):
        assert all(map(torch.equal, (out, low), lora_linear(library, x, weight, None, adapter, threads)))
        more = lora_linear_backward(library, grad, x, low, weight, adapter, threads)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True) if a is not None and b is not None)


@dtypes
def test_what_is_not_finite_stays_in_its_row(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight, adapter = layer("odd")
    for rows in (3, 40):
        x, grad = random(rows, 45, dtype=dtype), random(rows, 37, dtype=dtype)
        _, low = lora_linear(library, x, weight, None, adapter)
        x[1, 7:20] = grad[1, 3] = float("nan")  # half of x is dropped
        out, spoilt_low = lora_linear(library, x, weight, None, adapter)
        grad_x, *others = lora_linear_backward(library, grad, x, low, weight, adapter)
        for result in (out, spoilt_low, grad_x):
            assert result is not None
            assert not result[1].isfinite().any() and result[0].isfinite().all() and result[2:].isfinite().all()
        assert not any(gradient.isfinite().all() for gradient in others)


@dtypes
def test_off_the_usual_alignment(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight, adapter = layer("dropout")

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)

    moved = replace(adapter, lora_A=shifted(adapter.lora_A), lora_B=shifted(adapter.lora_B))
    for rows in (2, 20):
        x, grad = random(rows, 128, dtype=dtype), random(rows, 49, dtype=dtype)
        out, low = lora_linear(library, x, weight, None, adapter)
        assert all(map(torch.equal, (out, low), lora_linear(library, shifted(x), weight, None, moved)))
        expected = lora_linear_backward(library, grad, x, low, weight, adapter)
        actual = lora_linear_backward(library, shifted(grad), shifted(x), shifted(low), weight, moved)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True) if a is not None and b is not None)


def test_empty_products(library: ctypes.CDLL) -> None:
    """No rank, no inputs, no outputs."""
    for shape, rank in (((5, 64), 0), ((5, 0), 3), ((0, 64), 3)):
        weight = random_weight(shape)
        adapter = Adapter(random(rank, shape[1]), random(shape[0], rank), 1.0, 0.5, 3)
        x, grad = random(4, shape[1]), random(4, shape[0])
        out, low = lora_linear(library, x, weight, None, adapter)
        assert low.isfinite().all() and torch.equal(out, linear(library, x, weight))
        grad_x, grad_A, grad_B = lora_linear_backward(library, grad, x, low, weight, adapter)
        assert grad_x is not None and grad_x.isfinite().all() and not grad_A.any() and not grad_B.any()


def test_no_rows(library: ctypes.CDLL) -> None:
    weight, adapter = layer("dropout")
    x, grad = torch.empty(0, 128), torch.empty(0, 49)
    out, low = lora_linear(library, x, weight, None, adapter)
    assert out.shape == (0, 49) and low.shape == (0, 8)
    _, grad_A, grad_B = lora_linear_backward(library, grad, x, low, weight, adapter)
    assert not grad_A.any() and not grad_B.any()


def test_bad_arguments_give_a_status(library: ctypes.CDLL) -> None:
    weight, adapter = layer("dropout")
    x, out, low = random(2, 128), torch.zeros(2, 49), torch.zeros(2, 8)
    grad_A, grad_B = torch.empty(8, 128), torch.empty(49, 8)

    def status(low: Tensor | None = low, rows: int = 2, **changes: float | None) -> int:
        view = adapter.view
        for name, value in changes.items():
            setattr(view, name, value)
        found = library.qlk_cpu_lora_linear(
            *(c_void_p(pointer(x)), 0, c_int64(rows), byref(weight.view), None, byref(view)),
            *(c_void_p(pointer(low)), c_void_p(pointer(out)), 1),
        )
        assert found == library.qlk_cpu_lora_linear_backward(
            *(c_void_p(pointer(out)), c_void_p(pointer(x)), c_void_p(pointer(low)), 0, c_int64(rows)),
            *(byref(weight.view), byref(view), None, c_void_p(pointer(grad_A)), c_void_p(pointer(grad_B)), 1),
        )
        return found

    assert status() == OK
    assert status(rows=-1) == status(rows=2**60) == status(rows=2**63 - 1) == BAD_SIZE
    assert status(dropout=1.0) == status(dropout=-0.5) == status(dropout=float("nan")) == BAD_SIZE
    assert status(rank=-1) == status(rank=2**60) == BAD_SIZE
    assert status(lora_A=None) == status(lora_B=None) == status(low=None) == NULL_POINTER
