"""The last words of one run of a study."""

import json
from collections.abc import Mapping
from pathlib import Path

from qlora_lab.errors import RunFolderError
from qlora_lab.runs.folder import FAILED, RUNNING
from qlora_lab.sweep.states import RunState
from qlora_lab.sweep.status import StudyFolder, states_of

LOG_LINES = 40


def show_logs(study: StudyFolder, given: str | None, *, as_json: bool) -> None:
    """Print what one run said last: the one that is asked for, else the last that failed, else one that runs.

    Args:
        given: the first digits of its id.

    Raises:
        RunFolderError: no run has begun, or not one has an id like that.
    """
    states = states_of(study)
    run_id = _one_run(states, given)
    record = states[run_id].record
    log = record.get("log")
    tail = _tail(Path(log)) if log and Path(log).is_file() else []
    trace = str((record.get("error") or {}).get("traceback") or "").splitlines()
    if as_json:
        print(json.dumps({"run": run_id, "state": states[run_id].words, "log": log, "lines": tail or trace}))
        return
    print(f"run {run_id}: {states[run_id].words}" + (f"; {log}" if log else ""))
    print("\n".join(tail or trace[-LOG_LINES:]) or "it has said nothing yet")
    print(f"its folder: {study.runs_dir.resolve() / run_id}")


def _one_run(states: Mapping[str, RunState], given: str | None) -> str:
    if given is not None:
        found = [run_id for run_id in states if run_id.startswith(given)]
        if len(found) != 1:
            many = f"{len(found)} runs begin" if found else "no run of this study begins"
            raise RunFolderError(f"{many} with '{given}'; give more or other digits of a run's id")
        return found[0]
    begun = [run_id for run_id, state in states.items() if state.record]
    if not begun:
        raise RunFolderError("no run of this study has begun, so there are no logs yet")
    rank = {FAILED: 2, RUNNING: 1}
    return max(begun, key=lambda i: (rank.get(states[i].state, 0), str(states[i].record.get("ended_at") or "")))


def _tail(file: Path) -> list[str]:
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - 100 * LOG_LINES))
        return log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
