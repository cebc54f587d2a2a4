"""What waits for what: decoding beside products, and pages on their way beside updates, without a GPU."""

import ctypes
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lab.ops.adamw.optimizer import AdamW
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor
from qlora_lab.ops.blockwise import reference
from qlora_lab.ops.native.cuda_adamw import CudaAdamw
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_ops import CudaOps
from qlora_lab.ops.native.cuda_pager import HOST, TYPES, ManagedPager, SlabArray
from qlora_lab.ops.native.cuda_streams import CudaAhead
from qlora_lab.ops.paging import PagedKernels, PagingPolicy
from tests.cuda.queues import Event, OneDevice, Queue
from tests.cuda.test_cuda_kernels import normal, quantized
from tests.cuda.test_paged_states import parameters, take_steps
from tests.cuda.test_panels import SMALL_CACHE

CURRENT, BESIDE = 1, 2  # handles of the two streams


class TwoQueues(OneDevice):
    """Products on the current stream, decoding on one beside it."""

    def __init__(self) -> None:
        super().__init__(Queue("current", CURRENT))
        self.beside = Queue("beside", BESIDE)

    def ahead(self, device: torch.device, panels: int) -> CudaAhead:
        assert panels > 1
        return CudaAhead(self.current, self.beside)  # type: ignore[arg-type]


class WatchedOps(CudaOps):
    """Every panel is decoded when nobody needs what its buffer held before."""

    def __init__(self, library: CudaLibrary, queues: TwoQueues) -> None:
        super().__init__(library, queues)
        self.queues = queues
        self.before = queues.current.work()  # of whoever had the buffers' memory
        self.written: dict[int, Event] = {}
        self.read: dict[int, Event] = {}

    def _decode(self, view: Any, rows: Any, columns: Any, out: Tensor, stream: int) -> None:
        buffer = out.untyped_storage().data_ptr()
        assert stream == BESIDE and self.queues.beside.comes_after(self.before)
        assert self.queues.beside.comes_after(self.read.get(buffer, Counter()))
        super()._decode(view, rows, columns, out, stream)
        self.written[buffer] = self.queues.beside.work()

    def multiply(self, left: Tensor, dense: Tensor, *, out: Tensor) -> Tensor:
        buffer = dense.untyped_storage().data_ptr()
        assert self.queues.current.comes_after(self.written[buffer])
        self.read[buffer] = self.queues.current.work()
        return out.copy_(left @ dense)


def test_a_panel_waits_for_its_buffer_and_a_product_for_its_panel(
    emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaLibrary, "device", lambda self, index: SMALL_CACHE)
    queues = TwoQueues()
    ops = WatchedOps(emulated, queues)
    monkeypatch.setattr(torch, "mm", ops.multiply)
    weight, x = quantized("nf4", 640, 40, block_size=32), normal(90, 40, seed=1)
    actual = ops.quantized_linear(x, *weight, None)
    torch.testing.assert_close(actual, reference.quantized_linear(x, *weight, None), rtol=1e-5, atol=1e-6)
    weight, gradient = quantized("nf4", 40, 640, block_size=32), normal(90, 40, seed=1)
    ops.before = queues.current.work()
    actual = ops.quantized_linear_grad_input(gradient, *weight)
    expected = reference.quantized_linear_grad_input(gradient, *weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert queues.beside.ended["beside"] == 10  # panels, of 128 rows or columns
    assert queues.current.comes_after(queues.beside.record_event())  # or their buffers would go to others too early


class WatchedLibrary:
    """Pages move with their device as the current one, on the stream beside, and to the host after their update."""

    def __init__(self, library: CudaLibrary, queues: TwoQueues) -> None:
        self._library, self._queues = library, queues
        self.fetched: list[tuple[range, Event]] = []  # addresses, the latest last
        self.handed_back = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def qlk_cuda_managed_allocate(self, *arguments: Any) -> int:
        assert self._queues.is_current
        return self._library.qlk_cuda_managed_allocate(*arguments)

    def qlk_cuda_managed_prefetch(self, address: int, size: int, to: int, stream: int) -> int:
        assert self._queues.is_current and stream == BESIDE
        if to == HOST:
            assert self._queues.beside.comes_after(self._queues.current.record_event())
            self.handed_back += size
        moved = self._queues.beside.work()
        if to != HOST:
            self.fetched.append((range(address, address + size), moved))
        return self._library.qlk_cuda_managed_prefetch(address, size, to, stream)


class WatchedAdamw(CudaAdamw):
    """Every update waits for the states that it reads."""

    def __init__(self, library: WatchedLibrary, queues: TwoQueues) -> None:
        super().__init__(library, queues)  # type: ignore[arg-type]
        self._fetched, self._queues = library.fetched, queues

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        for tensor in tensors:
            for state in (tensor.exp_avg, tensor.exp_avg_sq):
                arrived = next(event for pages, event in reversed(self._fetched) if state.data_ptr() in pages)
                assert self._queues.current.comes_after(arrived)
        super().update(tensors, step)
        self._queues.current.work()


def taken_over(array: SlabArray, device: torch.device) -> Tensor:
    """Return foreign memory as a tensor, as torch does on a GPU."""
    interface = array.__cuda_array_interface__
    (dtype,) = (dtype for dtype, name in TYPES.items() if name == interface["typestr"])
    size = math.prod(interface["shape"]) * dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(interface["data"][0])
    memory.array = array  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=dtype).view(interface["shape"])


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("free_bytes", [0, 2**40])
def test_an_update_waits_for_its_pages_and_they_leave_after_it(
    emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch, free_bytes: int, bits: int
) -> None:
    queues = TwoQueues()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: queues.beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: queues.current)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 2**41))
    monkeypatch.setattr(torch, "as_tensor", taken_over)
    library, weights = WatchedLibrary(emulated, queues), parameters("cpu")
    pager = ManagedPager(library, queues, torch.device("cuda", 0))  # type: ignore[arg-type]
    kernels = PagedKernels(WatchedAdamw(library, queues), pager, PagingPolicy(2**18, reserve_bytes=2**30))
    optimizer = AdamW(weights, bits=bits, kernels=kernels, memory=pager)
    expected = AdamW([weight.detach().clone().requires_grad_() for weight in weights], bits=bits)
    take_steps(optimizer, weights, range(3))
    take_steps(expected, expected.param_groups[0]["params"], range(3))
    for weight, other in zip(weights, expected.param_groups[0]["params"], strict=True):
        assert torch.equal(weight, other)
    assert (library.handed_back > 0) == (free_bytes == 0)
    assert pager.full(torch.Size([0, 4]), 0, torch.float32, torch.device("cpu")).shape == (0, 4)
