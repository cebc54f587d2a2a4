"""Paged optimizer states: which part of them is brought to the GPU when, and when it is handed back.

States in unified memory move by pages. A step updates them a window of tensors at a time; while one window is updated
the next is already on its way, and where the GPU is short of memory a window goes back to the host as soon as it is
done. The policy is arithmetic on sizes; a pager moves the pages.

Source: Dettmers et al. 2023, "QLoRA", section 3 (paged optimizers).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qlora_lab.ops.adamw.optimizer import AdamwKernels, StateMemory
from qlora_lab.ops.adamw.reference import AdamwStep, AdamwTensor

WINDOW_BYTES = 64 * 2**20  # of states: some milliseconds of the bus, so that the first window is not long in coming
RESERVE_SHARE = 1 / 16  # of the GPU's memory that must be free for states to stay


@dataclass(frozen=True)
class PagingPolicy:
    """How far states are moved.

    Attributes:
        window_bytes: of states that are brought, updated and handed back together.
        reserve_bytes: with less free memory than this on the GPU, states go back to the host after their update.
    """

    window_bytes: int
    reserve_bytes: int

    def windows(self, sizes: Sequence[int]) -> list[range]:
        """Cut tensors with these bytes of states into windows, in order; a larger tensor is a window of its own."""
        windows: list[range] = []
        first, held = 0, 0
        for index, size in enumerate(sizes):
            if index > first and held + size > self.window_bytes:
                windows.append(range(first, index))
                first, held = index, 0
            held += size
        if first < len(sizes):
            windows.append(range(first, len(sizes)))
        return windows

    def hands_back(self, free_bytes: int) -> bool:
        """Return whether states go back to the host after an update that begins with so much free memory."""
        return free_bytes < self.reserve_bytes


class Pager(StateMemory, Protocol):
    """Memory whose pages move. Nothing here waits for the GPU."""

    def free_bytes(self) -> int:
        """Return how much of the GPU's memory nobody uses."""

    def fetch(self, states: Sequence[Tensor]) -> None:
        """Begin to bring states to the GPU."""

    def fetched(self) -> None:
        """Let what is queued next wait for the oldest `fetch` not yet waited for."""

    def hand_back(self, states: Sequence[Tensor]) -> None:
        """Begin to bring states to the host, after everything queued so far."""


class PagedKernels:
    """`ops.adamw.optimizer.AdamwKernels` that update paged states window by window, with kernels of ordinary ones."""

    def __init__(self, kernels: AdamwKernels, pager: Pager, policy: PagingPolicy) -> None:
        self._kernels = kernels
        self._pager = pager
        self._policy = policy

    def gradient_norm(self, gradients: Sequence[Tensor], gradient_scale: float) -> tuple[float, int | None]:
        return self._kernels.gradient_norm(gradients, gradient_scale)

    def update(self, tensors: Sequence[AdamwTensor], step: AdamwStep) -> None:
        states = [_states(tensor) for tensor in tensors]
        windows = self._policy.windows([sum(state.nbytes for state in of_tensor) for of_tensor in states])
        hands_back = self._policy.hands_back(self._pager.free_bytes())

        def within(window: range) -> list[Tensor]:
            return [state for index in window for state in states[index]]

        for number, window in enumerate(windows):
            if number == 0:
                self._pager.fetch(within(window))
            if number + 1 < len(windows):
                self._pager.fetch(within(windows[number + 1]))
            self._pager.fetched()
            self._kernels.update([tensors[index] for index in window], step)
            if hands_back:
                self._pager.hand_back(within(window))


def _states(tensor: AdamwTensor) -> list[Tensor]:
    """Return the states of a tensor, which are what pages; parameters and gradients are not."""
    of_tensor = (tensor.exp_avg, tensor.exp_avg_sq, tensor.exp_avg_absmax, tensor.exp_avg_sq_absmax)
    return [state for state in of_tensor if state is not None]


def merge_ranges(ranges: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Join (address, bytes) of memory that lies at most `gap` bytes apart, so that few calls move it all."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        if merged and address - sum(merged[-1]) <= gap:
            start, before = merged[-1]
            merged[-1] = (start, max(before, address + size - start))
        else:
            merged.append((address, size))
    return merged


def policy_for(device_bytes: int) -> PagingPolicy:
    """Return the policy on a GPU with so much memory."""
    return PagingPolicy(WINDOW_BYTES, int(device_bytes * RESERVE_SHARE))
