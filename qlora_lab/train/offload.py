"""Activations that wait for the backward pass in the host's memory instead of a GPU's."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST_BYTES = 2**20  # masks and rotary positions are shared by all layers and smaller than this: they stay
ON_THEIR_WAY = 2  # tensors whose copies the forward pass does not wait for: the memory model counts as many


class Copies(Protocol):
    """Copies in order, beside the computation. Both tensors of one must live until the computation waits for it."""

    def begin(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy after all that the computation has queued so far; return what `wait` takes."""

    def wait(self, copied: Any) -> None:
        """Let what the computation queues next wait for a copy."""


class SideStream:
    """`Copies` on a stream of their own. Target and source belong to the computation's stream, or are pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)

    def begin(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._beside):
            target.copy_(source, non_blocking=True)
        return self._beside.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)


@dataclass(eq=False)
class Kept:
    """One tensor that has gone to the host; `number` counts those of a forward pass."""

    number: int
    device: torch.device
    on_host: Tensor
    was_used: bool = False


class OffloadedActivations(saved_tensors_hooks):
    """Inside it, what a forward pass keeps goes to pinned host memory, and comes back in the backward pass.

    With gradient checkpointing that is the input of every layer. The model's own weights stay where they are. Copies
    run beside the computation: it waits for that of the tensor that left two before, and while one that has come back
    is used, the one that was kept before it is on its way. What a copy reads or writes is held here until the
    computation has waited for it, so its memory goes to nobody else before.

    Args:
        model: whose parameters and buffers are never moved.
        copies: how tensors of a device are copied.
        is_on_card: whether a tensor takes memory of a GPU.
        smallest_bytes: smaller tensors stay.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: Callable[[torch.device], Copies] = SideStream,
        is_on_card: Callable[[Tensor], bool] = lambda tensor: tensor.is_cuda,
        smallest_bytes: int = SMALLEST_BYTES,
    ) -> None:
        self._resident = {
            tensor.untyped_storage().data_ptr()
            for tensors in (model.parameters(), model.buffers())
            for tensor in tensors
        }
        self._is_on_card = is_on_card
        self._smallest_bytes = smallest_bytes
        self._make_copies = copies
        self._copies: dict[torch.device, Copies] = {}
        self._count = 0
        self._kept: WeakValueDictionary[int, Kept] = WeakValueDictionary()
        self._leaving: deque[tuple[Copies, Any, Tensor]] = deque()
        self._arriving: dict[Kept, tuple[Any, Tensor]] = {}
        super().__init__(self._to_host, self._to_card)

    def __enter__(self) -> None:
        for kept in list(self._arriving):  # of a backward pass that did not get to its end
            self._arrive(kept)
        self._count = 0
        self._kept.clear()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._let_leave(0)

    def _to_host(self, tensor: Tensor) -> Any:
        if (
            not self._is_on_card(tensor)
            or tensor.nbytes < self._smallest_bytes
            or tensor.untyped_storage().data_ptr() in self._resident
        ):
            return tensor
        on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies = self._copies_of(tensor.device)
        self._leaving.append((copies, copies.begin(on_host, tensor), tensor))
        self._let_leave(ON_THEIR_WAY)
        kept = Kept(self._count, tensor.device, on_host)
        self._kept[self._count] = kept
        self._count += 1
        return kept

    def _to_card(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        before = self._kept.get(kept.number - 1)
        if before is not None and not before.was_used:
            self._fetch(before)
        return self._arrive(kept)

    def _let_leave(self, most: int) -> None:
        """Wait for copies to the host until at most so many are on their way."""
        while len(self._leaving) > most:
            copies, copied, _ = self._leaving[0]
            copies.wait(copied)
            self._leaving.popleft()

    def _fetch(self, kept: Kept) -> None:
        if kept not in self._arriving:
            on_card = torch.empty_like(kept.on_host, device=kept.device)
            self._arriving[kept] = self._copies_of(kept.device).begin(on_card, kept.on_host), on_card

    def _arrive(self, kept: Kept) -> Tensor:
        copied, on_card = self._arriving[kept]
        self._copies_of(kept.device).wait(copied)
        del self._arriving[kept]
        kept.was_used = True
        return on_card

    def _copies_of(self, device: torch.device) -> Copies:
        if device not in self._copies:
            self._copies[device] = self._make_copies(device)
        return self._copies[device]
