"""What torch expects of every op, whatever runs it: schema, fake kernel, autograd, and one graph when compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qlora_lab.ops.blockwise import reference as blockwise
from qlora_lab.ops.lora import reference as lora
from qlora_lab.ops.native.ctypes_ops import CtypesOps
from qlora_lab.ops.native.load import DIFFERENTIABLE, OPS, kernel_of
from qlora_lab.ops.registry import KERNELS
from tests.ops.op_calls import arguments

# The inputs that gradients flow to, by their position in the schema.
GRADIENTS = {"quantized_linear": (0, 10), "quantized_linear_grad_input": (0,), "lora_linear": (0, 11, 12)}
ADAPTER = (11, 12)  # of them, where a lora_linear has lora_A and lora_B
REGISTERED = (*OPS, *map(kernel_of, DIFFERENTIABLE))
every_op = pytest.mark.parametrize("op", REGISTERED)
KINDS = [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)]  # of activations; double quantization
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # they are overridden on purpose


@pytest.fixture(params=["stable ABI", "ctypes", "reference"])
def binding(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs the ops during the test, registered as it is where nothing better loads."""
    if request.param != "reference" and KERNELS.library is None:
        pytest.skip(f"no native kernels: {KERNELS.reason}")
    if request.param == "stable ABI":
        if KERNELS.binding != "stable ABI":
            pytest.skip(f"the binding does not load: {KERNELS.reason}")
        yield request.param
        return
    registered = torch.library.Library("qlora_lab", "IMPL")
    for name in OPS:
        if request.param == "reference":
            call = getattr(lora if name.startswith("lora") else blockwise, name)
        else:
            assert KERNELS.library is not None
            call = getattr(CtypesOps(KERNELS.library), name)
        registered.impl(kernel_of(name), call, "CPU", allow_override=True)
    yield request.param
    registered._destroy()  # what was registered before runs again


def test_every_op_is_tested() -> None:
    names = {name.removeprefix("qlora_lab::") for name in torch._C._dispatch_get_all_op_names() if "qlora_lab" in name}
    assert names == set(REGISTERED) and set(GRADIENTS) == set(DIFFERENTIABLE)


def given(op: str, dtype: torch.dtype, nested: bool, adapter: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return arguments of an op; those that gradients flow to ask for them. `adapter`: the dtype of a trained one."""
    values = list(arguments(op, dtype, nested=nested))
    for position in GRADIENTS.get(op, ()):
        if values[position] is not None:
            if position in ADAPTER:
                values[position] = values[position].to(adapter)
            values[position].requires_grad_()
    return tuple(values)


@every_op
@pytest.mark.parametrize(("dtype", "nested"), KINDS[::2], ids=str)
def test_it_is_well_registered(binding: str, op: str, dtype: torch.dtype, nested: bool) -> None:
    opcheck(getattr(torch.ops.qlora_lab, op).default, given(op, dtype, nested))


def outputs_and_gradients(call: Any, values: tuple[Any, ...]) -> list[Tensor]:
    """Return everything that a call of the op gives: outputs, what it wrote into, gradients."""
    result = call(*values)
    outputs = list(result) if isinstance(result, tuple) else [values[-1] if result is None else result]
    leaves = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(outputs[0].sum(), leaves) if leaves else ()
    return [*outputs, *gradients]


def assert_compiles_into_one_graph(op: str, *kind: Any) -> None:
    torch._dynamo.reset()

    def call(*values: Any) -> Any:
        return getattr(torch.ops.qlora_lab, op)(*values)

    compiled = outputs_and_gradients(torch.compile(call, fullgraph=True), given(op, *kind))
    for actual, expected in zip(compiled, outputs_and_gradients(call, given(op, *kind)), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@every_op
@pytest.mark.parametrize(("dtype", "nested"), KINDS[:2], ids=str)
def test_it_compiles_into_one_graph(binding: str, op: str, dtype: torch.dtype, nested: bool) -> None:
    assert_compiles_into_one_graph(op, dtype, nested)


def test_an_adapter_in_bfloat16_is_well_registered_and_compiles_into_one_graph(binding: str) -> None:
    kind = (torch.bfloat16, True, torch.bfloat16)
    opcheck(torch.ops.qlora_lab.lora_linear.default, given("lora_linear", *kind))
    assert_compiles_into_one_graph("lora_linear", *kind)
    *_, grad_A, grad_B = outputs_and_gradients(torch.ops.qlora_lab.lora_linear, given("lora_linear", *kind))
    assert grad_A.dtype == grad_B.dtype == torch.bfloat16


def strided(value: Any) -> Any:
    """Return a tensor's values as every second element of a larger one."""
    return torch.stack((value, value), dim=-1)[..., 0] if isinstance(value, Tensor) and value.dim() else value


@every_op
def test_strided_arguments_are_read_in_their_own_order(binding: str, op: str) -> None:
    values = list(arguments(op, torch.float32))
    apart = [strided(value) for value in values]
    if op == "dequantize_weight_into":
        apart[-1] = torch.empty_like(values[-1])  # what is written must be contiguous
    call = getattr(torch.ops.qlora_lab, op)
    expected, actual = call(*values), call(*apart)
    if expected is None:
        expected, actual = values[-1], apart[-1]
    for found, right in zip(*(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(found, right)  # torch's own products may sum by stride
