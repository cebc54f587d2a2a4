"""Products in panels: every panel decoded in turn, forward and back, as one product with the whole weight."""

import pytest
import torch

from qlora_lab.errors import KernelError
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_plan import Device
from qlora_lab.ops.native.cuda_streams import InOrder
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


def test_a_bad_status_is_an_error_in_words(emulated: CudaLibrary) -> None:
    with pytest.raises(KernelError, match="qlk_cuda_quantize: a block size must be a power of two"):
        emulated.qlk_cuda_quantize(0, 0, 64, 0, 48, 0, 0, None)
    with pytest.raises(KernelError, match="a pointer is null"):
        emulated.qlk_cuda_quantize(0, 0, 64, 0, 64, 0, 0, None)
    with pytest.raises(KernelError, match="no such number format"):
        emulated.qlk_cuda_quantize(0, 0, 64, 99, 64, 0, 0, None)
