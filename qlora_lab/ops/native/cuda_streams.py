"""The streams of a CUDA device: where the kernels are queued, and how decoding runs beside products."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Streams(Protocol):
    """Where work is queued; what tests on a CPU replace."""

    def queue(self, device: torch.device) -> AbstractContextManager[int]:
        """Make `device` the current one, and yield the handle of torch's current stream on it."""

    def ahead(self, device: torch.device, panels: int) -> "Ahead":
        """Return what runs decoding ahead of the products of `panels` panels."""


class Ahead(Protocol):
    """Two buffers that take turns: while one is multiplied, the other is decoded into."""

    def decoding(self, panel: int) -> AbstractContextManager[int]:
        """Queue what follows on the decoding stream, after the buffer's last product; yield its handle."""

    def decoded(self, panel: int) -> None:
        """Let the current stream wait for what `decoding` queued."""

    def multiplied(self, panel: int) -> None:
        """Note that the buffer's product is queued."""

    def finish(self) -> None:
        """Let the current stream, in whose order memory is used again, wait for everything that decodes."""


class CudaStreams:
    """torch's streams: products on the current one, decoding on one beside it.

    Args:
        use_device: makes a device the current one of the library's own runtime.
    """

    def __init__(self, use_device: Callable[[int], object]) -> None:
        self._use_device = use_device
        self._beside: dict[int, torch.cuda.Stream] = {}

    @contextmanager
    def queue(self, device: torch.device) -> Iterator[int]:
        with torch.cuda.device(device):
            self._use_device(torch.cuda.current_device())
            yield torch.cuda.current_stream(device).cuda_stream

    def ahead(self, device: torch.device, panels: int) -> Ahead:
        if panels == 1:
            return InOrder(torch.cuda.current_stream(device).cuda_stream)
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index not in self._beside:
            self._beside[index] = torch.cuda.Stream(device)
        return CudaAhead(torch.cuda.current_stream(device), self._beside[index])


class CudaAhead:
    """Events between the current stream and the one beside it."""

    def __init__(self, current: torch.cuda.Stream, beside: torch.cuda.Stream) -> None:
        self._current, self._beside = current, beside
        self._products: dict[int, torch.cuda.Event] = {}
        self._decoded: dict[int, torch.cuda.Event] = {}
        beside.wait_stream(current)  # the buffers' memory may still be in use

    @contextmanager
    def decoding(self, panel: int) -> Iterator[int]:
        if panel - 2 in self._products:
            self._beside.wait_event(self._products.pop(panel - 2))
        yield self._beside.cuda_stream
        self._decoded[panel] = self._beside.record_event()

    def decoded(self, panel: int) -> None:
        self._current.wait_event(self._decoded.pop(panel))

    def multiplied(self, panel: int) -> None:
        self._products[panel] = self._current.record_event()

    def finish(self) -> None:
        self._current.wait_stream(self._beside)


class InOrder:
    """Everything on one stream, for a weight that is decoded at once."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    @contextmanager
    def decoding(self, panel: int) -> Iterator[int]:
        yield self._stream

    def decoded(self, panel: int) -> None:
        """Streams keep their order."""

    def multiplied(self, panel: int) -> None:
        """Streams keep their order."""

    def finish(self) -> None:
        """Streams keep their order."""
