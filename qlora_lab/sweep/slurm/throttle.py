"""How many tasks of each array may run at once, where later commands queue arrays beside earlier ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lab.sweep.chunk import ARRAY
from qlora_lab.sweep.scheduler import Job
from qlora_lab.sweep.slurm.arrays import shares_of
from qlora_lab.sweep.slurm.script import nonce_of


@dataclass(frozen=True)
class Throttle:
    """A new number of tasks at once for an array, by the nonce of its submission and its job's id."""

    nonce: str
    job: str
    parallel: int


def throttles(queue: Sequence[Job], entries: Mapping[str, Mapping[str, Any]], parallel: int) -> list[Throttle]:
    """Return what must change so that a plan's arrays share `parallel` by the tasks that each has left.

    An array keeps the throttle that it was submitted with: what was queued beside a full one would go on one task at a
    time when the other has long ended. Nothing changes unless an array gets twice as many as now, at least; those with
    one task left, canaries among them, need none.

    Args:
        queue: the user's jobs.
        entries: of the plan's journal.
    """
    left: Counter[str] = Counter()
    jobs: dict[str, str] = {}
    for job in queue:
        nonce = nonce_of(job.comment)
        if nonce is not None and "job" in entries.get(nonce, ()) and job.goes_on:
            left[nonce] += len(job.ids)
            jobs[nonce] = job.job
    now = {nonce: min(entries[nonce].get("parallel") or tasks, tasks) for nonce, tasks in left.items()}
    arrays = [nonce for nonce, tasks in left.items() if tasks > 1 and entries[nonce]["mode"] == ARRAY]
    taken = sum(now[nonce] for nonce in left if entries[nonce]["mode"] != ARRAY)  # pools keep theirs
    shares = dict(zip(arrays, shares_of([left[nonce] for nonce in arrays], max(1, parallel - taken)), strict=True))
    if not any(min(share, left[nonce]) >= 2 * now[nonce] for nonce, share in shares.items()):
        return []
    changed = [nonce for nonce, share in shares.items() if min(share, left[nonce]) != now[nonce]]
    changed.sort(key=lambda nonce: shares[nonce] - now[nonce])  # who makes room first
    return [Throttle(nonce, jobs[nonce], shares[nonce]) for nonce in changed]
