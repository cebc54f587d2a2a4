"""The native gate of an MLP and its gradients are within a bound of those in float64, whatever the count."""

import ctypes
import itertools
import math
from ctypes import c_int64, c_void_p

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora_lab.ops.native.gate import NativeGate
from qlora_lab.ops.registry import KERNELS
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

# Roundings of a sigmoid: two units in the last place of the exponential, of which the sum with 1 keeps half, and of the
# sum, the quotient and a product. One of its two is multiplied into the other's products where the slope is made.
SIGMOID = 4 + 2 + 3
ROUNDINGS = SIGMOID + 2
SLOPE_ROUNDINGS = 2 * SIGMOID + 5
DENORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133}  # the least number, and what is lost below it
MANY = 20_000  # more than one thread takes


class Shifted(Output):
    """An output of one row that begins some elements later, for vectors that are not aligned."""

    def __init__(self, count: int, dtype: torch.dtype, shift: int) -> None:
        super().__init__((1, shift + count), dtype)
        self.shift = shift
        self.row = self.matrix[0, shift:]

    def checked(self) -> Tensor:
        assert super().checked()[0, : self.shift].isnan().all()
        return self.row


def silu_gate(library: ctypes.CDLL, gate: Tensor, up: Tensor, threads: int = 1, shift: int = 0) -> Tensor:
    out = Shifted(len(gate), gate.dtype, shift)
    status = library.qlk_cpu_silu_gate(
        *(c_void_p(pointer(gate)), c_void_p(pointer(up)), DTYPE_NUMBER[gate.dtype], c_int64(len(gate))),
        *(c_void_p(pointer(out.row)), threads),
    )
    assert status == OK
    return out.checked()


def backward_into(
    library: ctypes.CDLL, gradient: Tensor, gate: Tensor, up: Tensor, outputs: tuple[Tensor, Tensor], threads: int = 1
) -> None:
    status = library.qlk_cpu_silu_gate_backward(
        *(c_void_p(pointer(gradient)), c_void_p(pointer(gate)), c_void_p(pointer(up)), DTYPE_NUMBER[gate.dtype]),
        *(c_int64(len(gate)), *(c_void_p(pointer(output)) for output in outputs), threads),
    )
    assert status == OK


def backward(
    library: ctypes.CDLL, gradient: Tensor, gate: Tensor, up: Tensor, threads: int = 1, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    of_gate, of_up = (Shifted(len(gate), gate.dtype, shift) for _ in range(2))
    backward_into(library, gradient, gate, up, (of_gate.row, of_up.row), threads)
    return of_gate.checked(), of_up.checked()


def assert_near(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    if actual.dtype == torch.bfloat16:
        bound = bound + BFLOAT16_UNIT * (expected.abs() + bound) + DENORMAL[torch.bfloat16]
    assert ((actual.double() - expected).abs() <= 1.001 * bound).all()


def check(library: ctypes.CDLL, gradient: Tensor, gate: Tensor, up: Tensor, threads: int = 1, shift: int = 0) -> None:
    """Compare with float64; where a number on the way is denormal, it may lack as much as the least one."""
    least, (d, x, y) = DENORMAL[torch.float32], (tensor.double() for tensor in (gradient, gate, up))
    sigmoid, other = torch.sigmoid(x), torch.sigmoid(-x)
    silu = x * sigmoid

    def bound_of_product(other_factor: Tensor) -> Tensor:
        lost = least * (2 * x.abs() * other_factor.abs() + other_factor.abs() + 1)
        return ROUNDINGS * UNIT * (silu * other_factor).abs() + lost

    assert_near(silu_gate(library, gate, up, threads, shift), silu * y, bound_of_product(y))
    of_gate, of_up = backward(library, gradient, gate, up, threads, shift)
    assert_near(of_up, d * silu, bound_of_product(d))
    magnitude = (d * y).abs() * sigmoid * (1 + x.abs() * other)
    lost = least * (3 * (1 + x.abs()) * (d * y).abs() + 3)
    assert_near(of_gate, d * y * sigmoid * (1 + x * other), SLOPE_ROUNDINGS * UNIT * magnitude + lost)


def inputs(count: int, dtype: torch.dtype, spread: float = 1.0, shift: int = 0) -> list[Tensor]:
    """Return the gradient of the product, gate and up."""
    scales = (1.0, spread, 1.0)
    return [(random(shift + count, seed=i) * scale).to(dtype)[shift:] for i, scale in enumerate(scales)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 15, 16, 17, 33, 1000, MANY])
@dtypes
def test_results_are_within_the_bound(library: ctypes.CDLL, count: int, dtype: torch.dtype) -> None:
    for spread in (0.1, 3.0, 60.0):
        check(library, *inputs(count, dtype, spread))


@given(
    count=st.integers(0, 300),
    many=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(1e-3, 200),
    shift=st.integers(0, 17),
)
@repeatable
def test_any_count(
    library: ctypes.CDLL, count: int, many: bool, threads: int, dtype: torch.dtype, spread: float, shift: int
) -> None:
    count += MANY if many else 0
    check(library, *inputs(count, dtype, spread, shift), threads, shift)


@dtypes
def test_gates_of_all_sizes(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """From those whose sigmoid is denormal, by way of the slope's zero, to those whose sigmoid is 1; tiny ones too."""
    gate, powers = torch.linspace(-110, 110, 100_001).to(dtype), (2.0 ** torch.arange(-149, 128)).to(dtype)
    ones = torch.ones_like(gate)
    check(library, ones, gate, ones)
    check(library, ones * 1e-20, gate, ones * 1e-18)  # and products that are denormal
    check(library, ones * 1e18, gate, ones * 1e19)
    for tiny_or_large in (powers, -powers):
        check(library, torch.ones_like(powers), tiny_or_large, torch.ones_like(powers))


@dtypes
def test_what_is_not_finite_is_as_torch_has_it(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    extreme = (math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0, -0.0, 1e-41, 200.0, -200.0)
    pairs = [*itertools.product(extreme, (1.0, -2.0, 0.0, math.nan)), (1.0, math.inf), (-1.0, -math.inf)]
    gate, up = torch.tensor(pairs * 3).to(dtype).T.contiguous()
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    expected = F.silu(leaves[0]) * leaves[1]
    expected.sum().backward()
    found = [silu_gate(library, gate, up), *backward(library, torch.ones_like(gate), gate, up)]
    for one, other in zip(found, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert other is not None
        torch.testing.assert_close(one, other, equal_nan=True)
        assert torch.equal(one.signbit()[~other.isnan()], other.signbit()[~other.isnan()])  # zeros too


@dtypes
def test_what_is_not_finite_stays_where_it_is(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    values = inputs(50, dtype)
    for tensor in values:
        spoiled = [each.clone() for each in values]
        for each, original in zip(spoiled, values, strict=True):
            if original is tensor:
                each[[7, 49]] = math.nan
        for found in (silu_gate(library, *spoiled[1:]), *backward(library, *spoiled)):
            assert found.isfinite().sum() >= 48 and found[:7].isfinite().all() and found[8:49].isfinite().all()


@pytest.mark.parametrize("count", [1, 15, 40, MANY])
@dtypes
def test_a_gradient_may_take_the_place_of_what_comes_in(library: ctypes.CDLL, count: int, dtype: torch.dtype) -> None:
    gradient, gate, up = inputs(count, dtype)
    expected = backward(library, gradient, gate, up)
    for which in (0, 1):
        shared, other = gradient.clone(), torch.full_like(gradient, math.nan)
        backward_into(library, shared, gate, up, (other, shared) if which else (shared, other), threads=2)
        assert torch.equal(shared, expected[which]) and torch.equal(other, expected[1 - which])


@dtypes
def test_threads_do_not_change_results(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    gradient, gate, up = inputs(MANY, dtype)
    assert torch.equal(silu_gate(library, gate, up), silu_gate(library, gate, up, threads=3))
    for one, other in zip(*(backward(library, gradient, gate, up, threads) for threads in (1, 3)), strict=True):
        assert torch.equal(one, other)


@dtypes
def test_tensors_in_any_order(isa: str, dtype: torch.dtype) -> None:
    """Also the gradient of the product may lie as it likes; where it is contiguous, that of up lies there then."""
    assert KERNELS.library is not None
    native, values = NativeGate(KERNELS.library), [tensor.view(6, 7) for tensor in inputs(42, dtype)]
    expected = [native.forward(*values[1:]), *native.backward(values[0].clone(), *values[1:])]
    for which in range(3):
        given = [tensor.clone() for tensor in values]
        given[which] = given[which].T.contiguous().T
        assert not given[which].is_contiguous() and NativeGate.takes(*given[1:])
        found = [native.forward(*given[1:]), *native.backward(*given)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert (found[2].data_ptr() == given[0].data_ptr()) == (which != 0)


def test_other_tensors_are_not_taken() -> None:
    gate = torch.ones(2, 3)
    assert NativeGate.takes(gate, gate) and NativeGate.takes(gate.bfloat16(), gate.bfloat16())
    for other in (gate.bfloat16(), gate[:1], gate.to("meta")):
        assert not NativeGate.takes(gate, other) and not NativeGate.takes(other, gate)
    assert not NativeGate.takes(gate.half(), gate.half()) and not NativeGate.takes(gate.double(), gate.double())


def test_bad_arguments_are_refused(library: ctypes.CDLL) -> None:
    values = {name: torch.ones(4) for name in ("grad_out", "gate", "up")}
    values |= {name: torch.full((4,), 5.0) for name in ("out", "grad_gate", "grad_up")}

    def forward_status(dtype: int = 0, count: int = 4, **changes: None) -> int:
        at = {name: c_void_p(pointer(tensor)) for name, tensor in (values | changes).items()}
        return library.qlk_cpu_silu_gate(at["gate"], at["up"], dtype, c_int64(count), at["out"], 1)

    def backward_status(dtype: int = 0, count: int = 4, **changes: None) -> int:
        at = {name: c_void_p(pointer(tensor)) for name, tensor in (values | changes).items()}
        inputs = (at["grad_out"], at["gate"], at["up"])
        return library.qlk_cpu_silu_gate_backward(*inputs, dtype, c_int64(count), at["grad_gate"], at["grad_up"], 1)

    assert [forward_status(**{name: None}) for name in ("gate", "up", "out")] == [NULL_POINTER] * 3
    names = ("grad_out", "gate", "up", "grad_gate", "grad_up")
    assert [backward_status(**{name: None}) for name in names] == [NULL_POINTER] * 5
    for status in (forward_status, backward_status):
        assert [status(dtype=dtype) for dtype in (2, 3, -1)] == [BAD_DTYPE] * 3
        assert [status(count=count) for count in (-1, -(2**63), 2**60, 2**63 - 1)] == [BAD_SIZE] * 4
        assert status(count=0) == OK
    assert forward_status(count=0, gate=None, up=None, out=None) == OK
    assert all(values[name].unique().tolist() == [5.0] for name in ("out", "grad_gate", "grad_up"))
