"""Unified memory of a CUDA device: optimizer states whose pages move between the GPU and the host."""

from collections import deque
from collections.abc import Sequence
from ctypes import byref, c_int, c_void_p
from mmap import PAGESIZE

import torch
from torch import Tensor

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.cuda_library import CudaLibrary
from qlora_lab.ops.native.cuda_streams import Streams
from qlora_lab.ops.paging import merge_ranges

SLAB_BYTES = 256 * 2**20  # of addresses at a time: only pages that were written take memory
ALIGNMENT = 256
HOST, NOWHERE = -1, -2  # NOWHERE: not all pages to the same place
TYPES = {torch.float32: "<f4", torch.uint8: "|u1"}


class Slab:
    """A piece of unified memory, given back when the last tensor in it is gone."""

    def __init__(self, library: CudaLibrary, size: int, device: int) -> None:
        self._library = library
        pointer = c_void_p()
        library.qlk_cuda_managed_allocate(size, device, byref(pointer))
        self.address, self.left = int(pointer.value or 0), size
        self._next = self.address

    def take(self, size: int) -> int:
        """Return the address of `size` bytes more."""
        address = self._next
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        self._next += rounded
        self.left -= rounded
        return address

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._library.qlk_cuda_managed_free(self.address)


class SlabArray:
    """Part of a slab as torch takes over foreign memory: it keeps the slab alive."""

    def __init__(self, slab: Slab, address: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.slab = slab
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": TYPES[dtype],
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class Pages:
    """The unified memory of one device: handed out in slabs, moved by pages.

    Neighbouring states lie side by side, so a window of many small tensors moves with one call.
    """

    def __init__(self, library: CudaLibrary, device: int) -> None:
        self._library = library
        self.device = device
        self._slab: Slab | None = None

    def take(self, size: int) -> tuple[Slab, int]:
        """Return the address of `size` bytes more, and the slab that they are part of."""
        if self._slab is None or self._slab.left < size + ALIGNMENT:
            self._slab = Slab(self._library, max(SLAB_BYTES, size + ALIGNMENT), self.device)
        return self._slab, self._slab.take(size)

    def send(self, states: Sequence[Tensor], to: int, stream: int) -> None:
        """Queue on a stream that states move to a device, or to the HOST."""
        ranges = [(state.data_ptr(), state.nbytes) for state in states if state.numel()]
        for address, size in merge_ranges(ranges, gap=ALIGNMENT):
            self._library.qlk_cuda_managed_prefetch(address, size, to, stream)

    def location(self, state: Tensor) -> tuple[int, int]:
        """Return where the pages of a state should lie, and where they were last sent: a device, HOST or NOWHERE."""
        preferred, last_sent_to = c_int(), c_int()
        first = state.data_ptr() // PAGESIZE * PAGESIZE
        self._library.qlk_cuda_managed_location(
            *(first, state.data_ptr() + state.nbytes - first, byref(preferred), byref(last_sent_to))
        )
        return preferred.value, last_sent_to.value


class ManagedPager:
    """`ops.paging.Pager` of one CUDA device: pages move on a stream of their own.

    Every call of the library happens with that device as the current one, which is put back after it.
    """

    def __init__(self, library: CudaLibrary, streams: Streams, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._device = torch.device("cuda", index)
        self._streams = streams
        self.pages = Pages(library, index)
        self._beside = torch.cuda.Stream(self._device)
        self._arrivals: deque[torch.cuda.Event] = deque()

    def full(self, shape: torch.Size, value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if not shape.numel():
            return torch.empty(shape, dtype=dtype, device=device)  # no address, so nothing to take over
        with self._streams.queue(self._device):
            slab, address = self.pages.take(shape.numel() * dtype.itemsize)
        tensor = torch.as_tensor(SlabArray(slab, address, shape, dtype), device=self._device)
        if tensor.data_ptr() != address:
            raise KernelError(f"torch copied unified memory of {self._device} instead of taking it over")
        return tensor.fill_(value)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def fetch(self, states: Sequence[Tensor]) -> None:
        with self._streams.queue(self._device):
            self.pages.send(states, self.pages.device, self._beside.cuda_stream)
        self._arrivals.append(self._beside.record_event())

    def fetched(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrivals.popleft())

    def hand_back(self, states: Sequence[Tensor]) -> None:
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with self._streams.queue(self._device):
            self.pages.send(states, HOST, self._beside.cuda_stream)
