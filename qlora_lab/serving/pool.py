"""Which adapters are ready on the device of their base, under a budget of bytes; the others stay on the host.

On the host an adapter is its safetensors file mapped into memory: the pages that are read stay in the system's cache
as long as there is room. On a machine without a GPU the ready copy lies in the same memory, and evicting it gives back
that copy alone.
"""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import torch

from qlora_lab.adapters.saved_adapter import SavedAdapter
from qlora_lab.errors import ModelError, unknown_name
from qlora_lab.serving.layers import Matrices, ReadyAdapter

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Registered:
    """An adapter that can be asked for by its name.

    Attributes:
        saved: its matrices on the host.
        prompt_format: in which it was trained.
        description: where it came from, for people.
        notes: what to know about it on this base.
    """

    name: str
    saved: SavedAdapter
    prompt_format: str
    description: str
    notes: tuple[str, ...] = ()

    @cached_property
    def ready_bytes(self) -> int:
        """Memory of its ready copy."""
        matrices = [tensor for pair in self.saved.weights.values() for tensor in pair.values()]
        return sum(tensor.numel() * FLOAT32_BYTES for tensor in matrices)


class AdapterPool:
    """Adapters by name, the most recently used of them ready.

    Args:
        device: where the base computes.
        budget_bytes: most memory of all ready copies; None: no limit.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        self.registered: dict[str, Registered] = {}
        self.budget_bytes = budget_bytes
        self._device = device
        self._ready: OrderedDict[str, ReadyAdapter] = OrderedDict()

    @property
    def ready_names(self) -> list[str]:
        """The adapters that are ready, the one that was used longest ago first."""
        return list(self._ready)

    @property
    def ready_adapters(self) -> Collection[ReadyAdapter]:
        return self._ready.values()

    @property
    def ready_bytes(self) -> int:
        return self._bytes(self._ready)

    def add(self, adapter: Registered) -> None:
        """Register an adapter.

        Raises:
            ModelError: its name is taken, or it does not fit into the budget alone.
        """
        if adapter.name in self.registered:
            raise ModelError(f"there is an adapter '{adapter.name}' already; give this one another name")
        if self.budget_bytes is not None and adapter.ready_bytes > self.budget_bytes:
            raise ModelError(
                f"adapter '{adapter.name}' takes {adapter.ready_bytes:,} bytes, more than the whole budget of "
                f"{self.budget_bytes:,}; raise the budget"
            )
        self.registered[adapter.name] = adapter

    def find(self, name: str) -> Registered:
        """Return an adapter by its name.

        Raises:
            ModelError: there is none.
        """
        if name not in self.registered:
            raise ModelError(unknown_name("the adapter", name, self.registered))
        return self.registered[name]

    def fit_together(self, names: Collection[str]) -> bool:
        """Whether adapters can be ready at the same time."""
        return self.budget_bytes is None or self._bytes(set(names)) <= self.budget_bytes

    def ready(self, names: Collection[str]) -> dict[str, ReadyAdapter]:
        """Return adapters by name, ready; others are evicted for them, the longest unused first.

        Raises:
            ModelError: there is none of that name, or the budget does not hold them all at a time.
        """
        wanted = dict.fromkeys(names)
        for name in wanted:
            self.find(name)
        if not self.fit_together(wanted):
            raise ModelError(
                f"{len(wanted)} adapters at a time take {self._bytes(wanted):,} bytes, more than the budget of "
                f"{self.budget_bytes:,}; raise it, or use fewer of them in one batch"
            )
        for name in [name for name in self._ready if name not in wanted]:
            if self.fit_together([*self._ready, *wanted]):
                break
            del self._ready[name]
        for name in wanted:
            if name not in self._ready:
                self._ready[name] = self._on_device(self.registered[name].saved)
            self._ready.move_to_end(name)
        return {name: self._ready[name] for name in wanted}

    def _bytes(self, names: Collection[str]) -> int:
        return sum(self.registered[name].ready_bytes for name in names)

    @torch.no_grad()
    def _on_device(self, saved: SavedAdapter) -> ReadyAdapter:
        layers = {
            path: Matrices(
                *(pair[name].to(self._device, torch.float32, copy=True).contiguous() for name in ("lora_A", "lora_B"))
            )
            for path, pair in saved.weights.items()
        }
        return ReadyAdapter(saved.scaling, layers)
