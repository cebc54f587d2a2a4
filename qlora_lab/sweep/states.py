"""The states of thousands of runs at once, each read from one small file in its folder."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, NEW, RUNNING, RunFolder, damaged_status, held
from qlora_lab.sweep.settle import is_given_up, may_go_on

STATUS_FILE = "status.json"
REFUSED = "refused"  # in the plan: the run does not fit, or cannot work


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    Attributes:
        state: new, running, finished, failed, interrupted or refused. A run that is out of tries is failed, also where
            its last attempt recorded itself as interrupted.
        record: what its status.json holds; empty for a new run.
    """

    state: str
    record: dict[str, Any]

    def with_refusal(self, why: str | None) -> "RunState":
        """Return how the run stands if it is refused for a reason: what is finished or running stays so."""
        if why is None or self.state in (FINISHED, RUNNING):
            return self
        return RunState(REFUSED, {**self.record, "error": {"type": "refused", "message": why}})

    @property
    def cause(self) -> str | None:
        """Return why a failed run failed: the recorded cause, or the type of its error."""
        if self.state != FAILED:
            return None
        return str(self.record.get("cause") or (self.record.get("error") or {}).get("type") or "unknown")

    @property
    def is_out_of_tries(self) -> bool:
        """Say whether a failed run has had the attempts that the rule of its cause gives it."""
        return self.state == FAILED and not may_go_on(self.record)

    @property
    def is_given_up(self) -> bool:
        """Say whether the run is failed for want of tries, and its record does not say so yet."""
        return self.state == FAILED and self.record.get("state") == INTERRUPTED

    @property
    def died_silently(self) -> bool:
        """Say whether an attempt ended without recording it."""
        return self.state == INTERRUPTED and self.record.get("state") == RUNNING

    def is_due(self, *, retry_failed: bool, beyond_rules: bool) -> bool:
        """Say whether a command executes the run.

        Args:
            retry_failed: whether failed runs are tried again, as often as the rules of their causes allow.
            beyond_rules: whether those that are out of tries are, too.
        """
        if self.state == FAILED:
            return beyond_rules or (retry_failed and not self.is_out_of_tries)
        return self.state not in (FINISHED, REFUSED)

    @property
    def elapsed_s(self) -> float:
        """Return the seconds that all attempts took."""
        return float(self.record.get("elapsed_s") or 0.0)

    @property
    def words(self) -> str:
        """Return the state, of a failed run with its cause."""
        return f"{FAILED} ({self.cause})" if self.state == FAILED else self.state


UNKNOWN = RunState(NEW, {})


def read_states(runs_dir: Path, run_ids: Iterable[str]) -> dict[str, RunState]:
    """Return the state of each run, in the order given.

    Raises:
        RunFolderError: a status.json is damaged.
    """
    states = _read_all(runs_dir, run_ids)
    running = {RunFolder(runs_dir / run_id) for run_id, state in states.items() if state.state == RUNNING}
    for folder in running - held(running):  # it died, or has ended since
        now = _read(runs_dir, folder.run_id)
        states[folder.run_id] = RunState(INTERRUPTED, now.record) if now.state == RUNNING else now
    return states


def read_records(runs_dir: Path, run_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what status.json of each run holds, empty for a new one, without asking who still lives.

    Raises:
        RunFolderError: a status.json is damaged.
    """
    return {run_id: state.record for run_id, state in _read_all(runs_dir, run_ids).items()}


def counted(words: Iterable[str]) -> str:
    """Return how often each word occurs, the most frequent first.

    Example:
        >>> counted(["new", "finished", "new"])
        '2 new, 1 finished'
    """
    return ", ".join(f"{count:,} {word}" for word, count in Counter(words).most_common())


def out_of_tries(states: Iterable[RunState]) -> dict[str, int]:
    """Return how many runs have failed as often as their causes allow, by cause, the most frequent first."""
    return dict(Counter(str(state.cause) for state in states if state.is_out_of_tries).most_common())


def tried_out(causes: Mapping[str, int]) -> str:
    """Say what `out_of_tries` found.

    Example:
        >>> tried_out({"nan": 2, "code": 1})
        '3 failed runs are out of tries (2 nan, 1 code)'
    """
    count = sum(causes.values())
    words = ", ".join(f"{number:,} {cause}" for cause, number in causes.items())
    return f"{count:,} failed {'run is' if count == 1 else 'runs are'} out of tries ({words})"


def _read_all(runs_dir: Path, run_ids: Iterable[str]) -> dict[str, RunState]:
    there = {entry.name for entry in os.scandir(runs_dir)} if runs_dir.is_dir() else set()
    return {run_id: _read(runs_dir, run_id) if run_id in there else UNKNOWN for run_id in run_ids}


def _read(runs_dir: Path, run_id: str) -> RunState:
    """Read a run's record; whether a running one still does is not in it."""
    try:
        with open(f"{runs_dir}/{run_id}/{STATUS_FILE}", "rb") as file:  # noqa: PTH123 (a third of the time of pathlib)
            record = json.loads(file.read())
    except FileNotFoundError:
        return UNKNOWN
    except ValueError as error:
        raise damaged_status(runs_dir / run_id / STATUS_FILE, error) from error
    return RunState(FAILED if is_given_up(record) else str(record["state"]), record)
