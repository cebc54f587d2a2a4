"""Many runs, read by several processes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from analysis.sources.row_table import RowTable

Item = TypeVar("Item")
FEW = 64  # runs are read before another process has started
CHUNK = 100


def read_in_processes(read: Callable[[Sequence[Item]], RowTable], keys: Sequence[Item]) -> RowTable:
    """Return what `read` makes of the keys; of many, with as many processes as there are cores."""
    processes = len(os.sched_getaffinity(0))
    if len(keys) < FEW or processes < 2:
        return read(keys)
    size = min(CHUNK, -(-len(keys) // processes))
    chunks = [keys[start : start + size] for start in range(0, len(keys), size)]
    with ProcessPoolExecutor(min(processes, len(chunks))) as pool:
        return RowTable.joined(list(pool.map(read, chunks)))
