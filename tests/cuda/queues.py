"""Streams without a device: what must have ended before what, followed through events."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Event = Counter[str]  # how much of each stream has ended when it has


class Queue:
    """A stream of torch's that only counts. `ended` says how much of each stream is over before what is queued next."""

    def __init__(self, name: str, handle: int) -> None:
        self.name, self.cuda_stream = name, handle
        self.ended: Event = Counter()

    def work(self) -> Event:
        """Queue something; return what has ended when it has."""
        self.ended[self.name] += 1
        return self.record_event()

    def record_event(self) -> Event:
        return Counter(self.ended)

    def wait_event(self, event: Event) -> None:
        self.ended |= event

    def wait_stream(self, other: "Queue") -> None:
        self.wait_event(other.record_event())

    def comes_after(self, event: Event) -> bool:
        """Return whether what is queued next begins when all of `event` has ended."""
        return event <= self.ended


class OneDevice:
    """`cuda_streams.Streams` that knows whether its device is the current one."""

    def __init__(self, current: Queue) -> None:
        self.current, self.is_current = current, False

    @contextmanager
    def queue(self, device: torch.device) -> Iterator[int]:
        self.is_current = True
        yield self.current.cuda_stream
        self.is_current = False
