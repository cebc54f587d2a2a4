"""Products in panels: every panel decoded in turn, forward and back, as one product with the whole weight."""

from ctypes import byref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lab.errors import KernelError, ShapeError
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora import reference as lora_reference
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_plan import Device
from qlora_lab.ops.native.cuda_streams import InOrder
from qlora_lab.ops.native.library import WeightView
from tests.cuda.test_cuda_kernels import normal, quantized

SMALL_CACHE = Device(multiprocessors=1, l2_bytes=2**14, capability=90)


class Turns(InOrder):
    """Checks that a panel's buffer is decoded into only after the product that read it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.events: list[str] = []

    def decoding(self, panel: int):  # type: ignore[no-untyped-def]
        self.events.append(f"decode {panel}")
        return super().decoding(panel)

    def multiplied(self, panel: int) -> None:
        self.events.append(f"multiply {panel}")

    def finish(self) -> None:
        self.events.append("finish")


class Additions(TorchDispatchMode):
    """Notes what is added to a part of a result by a product."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm_.default and kwargs.get("beta", 1) != 0:
            self._events.append("add")
        return func(*args, **kwargs)


@pytest.fixture
def small_cache(emulated: CudaLibrary, streams, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The ops on a GPU whose cache holds a few kilobytes, and the order in which their panels pass."""
    turns = Turns()
    monkeypatch.setattr(CudaLibrary, "device", lambda self, index: SMALL_CACHE)
    monkeypatch.setattr(streams, "ahead", lambda device, panels: turns)
    return CudaOps(emulated, streams), turns


@pytest.mark.parametrize("bias", [True, False])
def test_panels_make_the_whole_product(small_cache, bias: bool) -> None:  # type: ignore[no-untyped-def]
    ops, turns = small_cache
    weight, x = quantized("nf4", 384, 40, block_size=32), normal(2, 45, 40, seed=1)
    shift = normal(384, seed=2) if bias else None
    actual = ops.quantized_linear(x, *weight, shift)
    torch.testing.assert_close(actual, reference.quantized_linear(x, *weight, shift), rtol=1e-5, atol=1e-6)
    assert turns.events == ["decode 0", "decode 1", "multiply 0", "decode 2", "multiply 1", "multiply 2"]


def test_panels_make_the_whole_gradient(small_cache) -> None:  # type: ignore[no-untyped-def]
    ops, turns = small_cache
    weight, gradient = quantized("nf4", 40, 383, block_size=32), normal(90, 40, seed=1)
    actual = ops.quantized_linear_grad_input(gradient, *weight)
    expected = reference.quantized_linear_grad_input(gradient, *weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert turns.events == ["decode 0", "decode 1", "multiply 0", "multiply 1"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_is_added_to_each_panel_while_it_is_in_the_cache(small_cache, dropout: float) -> None:  # type: ignore[no-untyped-def]
    ops, turns = small_cache
    weight, x = quantized("nf4", 384, 256, block_size=32), normal(2, 45, 256, seed=1)
    A, B, shift, gradient = normal(4, 256, seed=3), normal(384, 4, seed=4), normal(384, seed=2), normal(2, 45, 384)
    adapter = (A, B, 0.5, dropout, 7)
    with Additions(turns.events):
        out, low = ops.lora_linear(x, *weight, shift, *adapter)
    expected, expected_low = lora_reference.lora_linear(x, *weight, shift, *adapter)
    torch.testing.assert_close((out, low), (expected, expected_low), rtol=1e-4, atol=1e-4)
    forward = ["decode 0", "decode 1", "multiply 0", "add", "decode 2", "multiply 1", "add", "multiply 2", "add"]
    assert turns.events == forward
    turns.events.clear()
    with Additions(turns.events):
        gradients = ops.lora_linear_backward(gradient, x, low, *weight, *adapter, True)
    expected = lora_reference.lora_linear_backward(gradient, x, low, *weight, *adapter, True)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    if dropout == 0.0:
        assert turns.events == ["decode 0", "decode 1", "multiply 0", "add", "multiply 1", "add"]


def test_a_product_that_fails_waits_for_the_panel_that_is_being_decoded(small_cache, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Else its buffer would go to somebody else while it is written."""
    ops, turns = small_cache
    weight, x = quantized("nf4", 384, 40, block_size=32), normal(90, 40, seed=1)

    def no_memory(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "mm", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        ops.quantized_linear(x, *weight, None)
    assert turns.events == ["decode 0", "decode 1", "finish"]


def test_inputs_may_require_gradients(ops: CudaOps) -> None:
    weight, x = quantized("nf4", 40, 96, block_size=32), normal(70, 96, seed=1).requires_grad_()
    adapter = (normal(4, 96, seed=3).requires_grad_(), normal(40, 4, seed=4).requires_grad_())
    with torch._C._AutoDispatchBelowAutograd():  # as the dispatcher calls what is registered for a device
        for rows in (x, x[:3]):
            out, _ = ops.lora_linear(rows, *weight, None, *adapter, 0.5, 0.0, 0)
            assert out.shape == (len(rows), 40)
            assert ops.quantized_linear_grad_input(out, *weight).shape == rows.shape


def test_empty_products(ops: CudaOps) -> None:
    weight = quantized("nf4", 8, 32)
    assert ops.quantized_linear(torch.zeros(0, 32), *weight, None).shape == (0, 8)
    assert ops.quantized_linear_grad_input(torch.zeros(2, 0, 8), *weight).shape == (2, 0, 32)


@pytest.mark.parametrize("rows", [1, 6, 70])
def test_a_weight_without_inputs_leaves_the_bias(ops: CudaOps, rows: int) -> None:
    """By whichever kernel: there are no codes to read."""
    weight = PackedWeight(torch.zeros(0, dtype=torch.uint8), torch.zeros(0), None, None, "nf4", 64, 64, 8, 0)
    bias = normal(8).bfloat16()
    assert torch.equal(ops.quantized_linear(torch.zeros(rows, 0).bfloat16(), *weight, bias), bias.expand(rows, 8))


def test_parts_on_another_device_are_refused_before_a_kernel_reads_them(emulated: CudaLibrary, streams) -> None:  # type: ignore[no-untyped-def]
    ops, weight, x = CudaOps(emulated, streams), quantized("nf4", 8, 32), normal(2, 32)
    A, B, far = normal(4, 32), normal(8, 4), torch.device("meta")
    adapter = (0.5, 0.0, 0)
    with pytest.raises(ShapeError, match="packed lies on meta, and what it is used with on cpu; move it there"):
        ops.quantized_linear(x, *weight._replace(packed=weight.packed.to(far)), None)
    with pytest.raises(ShapeError, match="offset lies on meta"):
        ops.quantized_linear_grad_input(normal(2, 8), *weight._replace(offset=torch.zeros((), device=far)))
    with pytest.raises(ShapeError, match="packed lies on cpu, and what it is used with on meta"):
        ops.dequantize_weight_into(*weight, torch.empty(8, 32, device=far))
    with pytest.raises(ShapeError, match="bias lies on meta"):
        ops.quantized_linear(x, *weight, torch.zeros(8, device=far))
    with pytest.raises(ShapeError, match="lora_B lies on meta"):
        ops.lora_linear(x, *weight, None, A, B.to(far), *adapter)
    with pytest.raises(ShapeError, match="absmax lies on meta"):
        ops.lora_linear_backward(
            normal(2, 8), x, normal(2, 4), *weight._replace(absmax=weight.absmax.to(far)), A, B, *adapter, True
        )
    with pytest.raises(ShapeError, match="offset lies on meta"):
        ops.quantize_absmax(normal(40), torch.zeros((), device=far), 32)
    with pytest.raises(ShapeError, match="offset lies on meta"):
        ops.dequantize_absmax(weight.absmax, weight.nested_absmax, torch.zeros((), device=far), 32)


def test_a_bad_status_is_an_error_in_words(emulated: CudaLibrary) -> None:
    with pytest.raises(KernelError, match="qlk_cuda_quantize: a block size must be a power of two"):
        emulated.qlk_cuda_quantize(0, 0, 64, 0, 48, 0, 0, None)
    with pytest.raises(KernelError, match="a pointer is null"):
        emulated.qlk_cuda_quantize(0, 0, 64, 0, 64, 0, 0, None)
    with pytest.raises(KernelError, match="no such number format"):
        emulated.qlk_cuda_quantize(0, 0, 64, 99, 64, 0, 0, None)
    nothing = WeightView(None, None, None, None, 8, 0, 64, 64, 0)
    with pytest.raises(KernelError, match="qlk_cuda_linear_tiles: a size is"):
        emulated.qlk_cuda_linear_tiles(0, 1, 8, byref(nothing), None, None, None, 16, None)
