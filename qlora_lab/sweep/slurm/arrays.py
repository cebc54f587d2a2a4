"""Which runs go into which submission: few arrays, within the site's limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.sweep.chunk import ARRAY, POOL, resource_class

MANY = 64  # workers of a pool, unless told otherwise


@dataclass(frozen=True)
class Group:
    """Runs that ask the same of the cluster.

    Attributes:
        runs: positions in the list of all runs.
        proven: whether one of them, or of those before, has finished: no canary is needed.
    """

    resources: SlurmConfig
    runs: tuple[int, ...]
    proven: bool = False


@dataclass(frozen=True)
class Batch:
    """One submission.

    Attributes:
        group: position of its group.
        canary: whether the others of its group wait for it to end well.
        tasks: of the array.
    """

    group: int
    mode: str
    runs: tuple[int, ...]
    tasks: int
    canary: bool = False


def groups_of(resources: Sequence[SlurmConfig]) -> list[Group]:
    """Group the runs that ask for the same, keeping their order."""
    found: dict[str, list[int]] = {}
    for position, wanted in enumerate(resources):
        found.setdefault(resource_class(wanted), []).append(position)
    return [Group(resources[runs[0]], tuple(runs)) for runs in found.values()]


def batches_of(
    groups: Sequence[Group], *, max_array: int, free: int | None, pool: bool, per_gpu: int, parallel: int | None
) -> list[Batch]:
    """Divide groups into as few submissions as the limits allow; what is above a submit limit goes into pools.

    Args:
        max_array: tasks of an array at most.
        free: jobs that may be submitted now; None: any number.
        pool: whether runs go into pools anyhow.
        per_gpu: processes of each task of a pool.
        parallel: tasks that should run at once; None: no wish.

    Returns:
        Canaries first. Where `free` is less than what the groups need at least, only the first groups.
    """
    everything = sum(len(group.runs) for group in groups)
    if free is not None and everything > free:
        pool = True
    batches: list[Batch] = []
    left = free if free is not None else everything + len(groups)
    for number, group in enumerate(groups):
        runs = group.runs
        needs_canary = not group.proven and len(runs) > 1
        if left < 1 + needs_canary:
            break
        if needs_canary:
            batches.append(Batch(number, ARRAY, runs[:1], 1, canary=True))
            runs, left = runs[1:], left - 1
        if pool:
            share = left if free is None else max(1, left // (len(groups) - number))
            tasks = min(math.ceil(len(runs) / per_gpu), parallel or MANY, share, max_array)
            batches.append(Batch(number, POOL, runs, tasks))
            left -= tasks
        else:
            for first in range(0, len(runs), max_array):
                part = runs[first : first + max_array]
                batches.append(Batch(number, ARRAY, part, len(part)))
            left -= len(runs)
    return sorted(batches, key=lambda batch: not batch.canary)


def shares_of(tasks: Sequence[int], parallel: int) -> list[int]:
    """Divide the tasks that may run at once among arrays by size, so that all of them end at about the same time.

    SLURM throttles each array by itself; so each has one at least, also where that is more than `parallel` together.

    Example:
        >>> shares_of([1000, 1000, 99], 64)
        [31, 30, 3]
    """
    whole = sum(tasks)
    shares = [max(1, parallel * size // whole) for size in tasks]
    by_need = sorted(range(len(tasks)), key=lambda array: shares[array] / tasks[array])
    for array in by_need[: max(0, parallel - sum(shares))]:
        shares[array] += 1
    return shares
