"""What becomes of a run whose process ended without a word, and whether a run gets another attempt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lab.errors import LaunchError
from qlora_lab.runs.causes import CODE, INFRASTRUCTURE, RULES
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder
from qlora_lab.runs.lease import Claim


def settle(folder: RunFolder, cause: str, *, dead: Path | None = None) -> None:
    """Record why a run that died without a word ended: as interrupted, or as failed where it is out of tries.

    Args:
        dead: a lease of a job that is over by the scheduler's word: a process of it that is left over on a node nobody
            reaches loses it here. Any other is taken only from who is dead or silent.
    """
    lease = Claim(folder.path, last_attempt=folder.attempts, dead=dead).attempt()
    if lease is None:
        return  # somebody else is settling or executing it
    with folder.holding(lease):
        if (folder.status() or {}).get("state") != RUNNING:
            return
        end_for(folder, cause)


def end_for(folder: RunFolder, cause: str, error: Exception | None = None) -> None:
    """Record why the attempt ended that is recorded as running; the caller holds the run."""
    folder.end(INTERRUPTED, folder.elapsed_s(), error, cause=cause)
    if not may_go_on(folder.status()):
        folder.end(FAILED, folder.elapsed_s(), error, cause=cause)


def give_up(folder: RunFolder) -> None:
    """Record a run as failed that is interrupted and out of tries, unless somebody executes it after all."""
    lease = folder.claim().attempt()
    if lease is None:
        return
    with folder.holding(lease):
        status = folder.status()
        if status is not None and is_given_up(status):
            why = LaunchError(f"the run is out of tries, the last of which ended for the cause {status['cause']}")
            folder.end(FAILED, folder.elapsed_s(), why, cause=status["cause"])


def is_given_up(status: dict[str, Any]) -> bool:
    """Say whether a run is out of tries whose last attempt recorded itself as interrupted."""
    return status["state"] == INTERRUPTED and not may_go_on(status)


def may_go_on(status: dict[str, Any] | None) -> bool:
    """Say whether a run that did not finish gets another attempt without being asked for by `retry`."""
    if status is None:
        return True
    if status["state"] == FINISHED:
        return False
    cause = status.get("cause")
    if cause is None:
        return bool(status["state"] != FAILED)
    rule = RULES.get(cause, RULES[CODE])
    counted = 0
    for attempt, before in _with_the_one_before(status):
        if attempt.get("cause") != cause or (rule.with_progress and _step(attempt) > _step(before)):
            break
        counted += 1
    return counted < rule.attempts


def memory_factor(status: dict[str, Any] | None) -> float:
    """Return how much more host memory the next attempt should get, for attempts that outgrew theirs."""
    factor = 1.0
    for attempt in [*(status or {}).get("history", []), status or {}]:
        rule = RULES.get(attempt.get("cause") or "", RULES[INFRASTRUCTURE])
        factor *= rule.memory_factor
    return factor


def _with_the_one_before(status: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each attempt, the last first, with the one before it."""
    attempts = [{}, *status.get("history", []), status]
    for index in range(len(attempts) - 1, 0, -1):
        yield attempts[index], attempts[index - 1]


def _step(attempt: dict[str, Any]) -> int:
    return int(attempt.get("step") or 0)
