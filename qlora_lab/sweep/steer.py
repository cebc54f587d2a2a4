"""See and steer a study that was started: status, watch, resume, retry, cancel, hold, release, logs, clean.

    python -m qlora_lab.sweep status dataset_quality [quant=nf4] [--json]
    python -m qlora_lab.sweep +experiment=dataset_quality sweep.action=status [quant=nf4] [sweep.json=true]

are the same; the first does without Hydra. Nothing here runs on after the command.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from qlora_lab.errors import ConfigError, LaunchError
from qlora_lab.runs.files import read_json
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.sweep.chunk import QueuedRuns
from qlora_lab.sweep.logs import show_logs
from qlora_lab.sweep.plan import Plan, planned
from qlora_lab.sweep.plan_file import check_code, read_plan_file
from qlora_lab.sweep.scheduler import Job, Scheduler
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from qlora_lab.sweep.slurm.unbegun import record_unbegun
from qlora_lab.sweep.states import RunState
from qlora_lab.sweep.status import OVER, StudyFolder, StudyStatus, find_study, states_of, study_status

WATCH_S = 10.0
# By the kind of launcher; the others execute runs on this machine, and have no queue.
SCHEDULERS: dict[str, Callable[[], Scheduler]] = {"slurm": SlurmScheduler}


@dataclass(frozen=True)
class Asked:
    """What a command asks about a study.

    Attributes:
        where: axis -> values, of the runs that are meant.
        run: the first digits of one run's id, for logs.
        cause: of failures, for retry.
        as_json: for programs, rather than words.
    """

    action: str
    runs_dir: Path
    study: str
    where: Mapping[str, list[str]] = field(default_factory=dict)
    run: str | None = None
    cause: str | None = None
    as_json: bool = False


def steer(asked: Asked) -> None:
    """Do what a command asks.

    Raises:
        RunFolderError, ConfigError: there is no such study, run, axis or value.
        LaunchError: the scheduler refuses, or there is none.
    """
    ACTIONS[asked.action](find_study(asked.runs_dir, asked.study, asked.where), asked)


def chosen_plan(plan: Plan, states: Mapping[str, RunState], action: str, cause: str | None = None) -> Plan:
    """Return a plan that executes only what `resume` or `retry` is about.

    Args:
        states: of the runs that are meant.
        action: resume: what is neither finished nor failed; retry: what failed, also where it is out of tries.
        cause: that it failed for; None for any.

    Raises:
        ConfigError: no run failed for that cause.
    """
    failed = {run_id: state for run_id, state in states.items() if state.state == FAILED}
    if action != "retry":
        return replace(plan, only=frozenset(states) - frozenset(failed))
    causes = Counter(state.cause for state in failed.values())
    if cause is not None and cause not in causes:
        there = ", ".join(f"{name} ({count})" for name, count in causes.most_common()) or "none"
        raise ConfigError(f"no run failed for the cause '{cause}'; the causes are: {there}")
    meant = frozenset(i for i, state in failed.items() if cause in (None, state.cause))
    return replace(plan, only=meant, beyond_rules=True)


def _status(study: StudyFolder, asked: Asked) -> None:
    _show_status(study, asked)


def _show_status(study: StudyFolder, asked: Asked) -> StudyStatus:
    scheduler, states = _scheduler(study, needed=False), states_of(study)
    own: list[Job] | None = None
    no_queue = None
    if scheduler is not None:
        try:
            queue = scheduler.query()
            if _record_unbegun(study, states, queue, scheduler):
                states = states_of(study)
        except LaunchError as error:  # the run folders tell the rest
            no_queue = str(error)
        else:
            queued = QueuedRuns(study.path)
            own = [job for job in queue if not job.is_over and any(run in study.places for run in queued.of(job)[0])]
    status = study_status(study, states, datetime.now(UTC), own, no_queue)
    if asked.as_json:
        print(status.to_json(), flush=True)
        return status
    print(status.text(), flush=True)
    if study.others and "/" not in asked.study:
        print(f"this is its newest plan, {study.path.name}; it has {study.others} older in {study.path.parent}")
    return status


def _watch(study: StudyFolder, asked: Asked) -> None:
    """Show the status again and again until no run is left to wait for, or nothing that could execute one."""
    while (status := _show_status(study, asked)).goes_on:
        time.sleep(WATCH_S)
    left = sum(count for state, count in status.states.items() if state not in OVER)
    if left and not asked.as_json:
        print(f"{left:,} runs are left, and nothing in the queue executes them; `resume` or `retry` goes on")


def _go_on(study: StudyFolder, asked: Asked) -> None:
    """Execute what is left of a study as it was planned, without composing it again.

    Raises:
        ConfigError: the code has changed since.
    """
    from qlora_lab.sweep.study import execute

    record = read_plan_file(study.configs)
    check_code(record)
    scheduler, states = _scheduler(study, needed=False), states_of(study)
    if scheduler is not None and _record_unbegun(study, states, scheduler.query(), scheduler):
        states = states_of(study)
    plan = chosen_plan(planned(record.study, record.rows), states, asked.action, asked.cause)
    to_do = [run.run_id for run in plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed)]
    if not asked.as_json:
        execute(plan, read_json(study.path / "plan.json"))
        return
    print(json.dumps({"runs": to_do}), flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        execute(plan, read_json(study.path / "plan.json"))


def _record_unbegun(
    study: StudyFolder, states: Mapping[str, RunState], queue: Sequence[Job], scheduler: Scheduler
) -> bool:
    """Record jobs that ended before their runs began, unless the study is somebody else's; say whether there were."""
    if not os.access(study.runs_dir, os.W_OK):
        return False
    folder, records = (study.path / "slurm").resolve(), {run_id: state.record for run_id, state in states.items()}
    return bool(record_unbegun(folder, study.runs_dir, records, queue, scheduler, study.configs))


def _cancel(study: StudyFolder, asked: Asked) -> None:
    _tell(study, asked, lambda scheduler, ids: scheduler.cancel(ids), "cancelled")


def _hold(study: StudyFolder, asked: Asked) -> None:
    _tell(study, asked, lambda scheduler, ids: scheduler.hold(ids), "held back")


def _release(study: StudyFolder, asked: Asked) -> None:
    _tell(study, asked, lambda scheduler, ids: scheduler.release(ids), "released")


def _tell(study: StudyFolder, asked: Asked, do: Callable[[Scheduler, list[str]], None], done: str) -> None:
    """Do something with the jobs of the runs that are meant."""
    scheduler = _scheduler(study, needed=True)
    assert scheduler is not None
    ids: list[str] = []
    queued = QueuedRuns(study.path)
    for job in scheduler.query():
        runs, a_task_each = ([], True) if job.is_over else queued.of(job)
        if a_task_each:
            ids += [job_id for job_id, run in zip(job.ids, runs, strict=False) if run in study.places]
        elif runs and all(run in study.places for run in runs):
            ids += job.ids
        elif any(run in study.places for run in runs):
            raise LaunchError(
                f"job {job.job} takes other runs of this study too, so it cannot be {done} for some of them; "
                f"leave out {', '.join(asked.where)}"
            )
    if ids:
        do(scheduler, ids)
    if asked.as_json:
        print(json.dumps({done.replace(" ", "_"): ids}))
    else:
        print(f"{len(ids):,} jobs {done}" if ids else f"no job of these runs is in the queue; nothing {done}")


def _logs(study: StudyFolder, asked: Asked) -> None:
    show_logs(study, asked.run, as_json=asked.as_json)


def _clean(study: StudyFolder, asked: Asked) -> None:
    """Remove the checkpoints of finished runs, from which nothing goes on any more."""
    folders = [RunFolder(study.runs_dir / i).checkpoints for i, s in states_of(study).items() if s.state == FINISHED]
    there = [folder for folder in folders if folder.is_dir()]
    freed = sum(file.stat().st_size for folder in there for file in folder.rglob("*") if file.is_file())
    for folder in there:
        shutil.rmtree(folder)
    if asked.as_json:
        print(json.dumps({"runs": len(there), "freed_bytes": freed}))
    else:
        print(
            f"removed the checkpoints of {len(there):,} finished runs, {freed / 1e9:.2f} GB; adapters and results stay"
        )


def _scheduler(study: StudyFolder, needed: bool) -> Scheduler | None:
    (_, _, config), *_ = read_plan_file(study.configs, [next(iter(study.places))]).rows
    kind = config.launcher.kind
    if kind in SCHEDULERS:
        return SCHEDULERS[kind]()
    if needed:
        raise LaunchError(
            f"study {study.name} was planned for launcher={kind}, which has no queue; its runs end with the command "
            "that started them: press Ctrl-C there"
        )
    return None


ACTIONS: dict[str, Callable[[StudyFolder, Asked], None]] = {
    "status": _status,
    "watch": _watch,
    "resume": _go_on,
    "retry": _go_on,
    "cancel": _cancel,
    "hold": _hold,
    "release": _release,
    "logs": _logs,
    "clean": _clean,
}


def words(arguments: list[str]) -> Asked:
    """Read `ACTION NAME [AXIS=VALUE,...] [--json] [--run ID] [--cause CAUSE] [--runs-dir FOLDER]`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m qlora_lab.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("study", help="its name, or NAME/PLAN")
    parser.add_argument("where", nargs="*", metavar="AXIS=VALUE,...", help="only runs with these values")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--run", help="logs: the first digits of a run's id")
    parser.add_argument("--cause", help="retry: only runs that failed for this cause")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the runs are (default: runs)")
    given = parser.parse_intermixed_args(arguments)  # AXIS=VALUE after an option too
    pairs = [each.partition("=") for each in given.where]
    for axis, equals, _ in pairs:
        if not equals:
            parser.error(f"'{axis}' must be AXIS=VALUE, such as quant=nf4")
    where = {axis: values.split(",") for axis, _, values in pairs}
    return Asked(given.action, given.runs_dir, given.study, where, given.run, given.cause, given.json)


def main(arguments: list[str]) -> None:
    """Do what a command in words asks; exit with status 2 and one sentence where it cannot be."""
    from qlora_lab.config.exit_status import REFUSED, STOPPED
    from qlora_lab.errors import QloraLabError

    try:
        steer(words(arguments))
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(STOPPED)
