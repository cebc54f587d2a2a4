"""How the runs of a planned study stand, from one small file of each; the queue is asked once for all of them."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from qlora_lab.errors import ConfigError, RunFolderError, nearest, unknown_name
from qlora_lab.runs.files import read_json
from qlora_lab.runs.folder import FAILED, FINISHED, RUNNING
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.scheduler import PENDING, STUCK, Job
from qlora_lab.sweep.states import REFUSED, RunState, counted, out_of_tries, read_states, tried_out

WINDOW = timedelta(hours=1)  # over which runs are counted that finished lately
LAST_LINES = 4  # of a traceback
MOST_FAILURES = 5
OVER = (FINISHED, FAILED, REFUSED)  # states from which a run does not go on by itself
Where = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class StudyFolder:
    """A planned study, as its plan.json has it.

    Attributes:
        path: runs/studies/NAME/PLAN.
        places: run id -> axis -> value, of the runs that were asked about.
        configs: the file with the configuration of each run.
        others: plans of the same study that are older.
        refusals: run id -> why it did not fit when it was planned.
    """

    path: Path
    name: str
    runs_dir: Path
    places: dict[str, dict[str, str]]
    configs: Path
    others: int
    refusals: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failures:
    """Runs that failed alike, or were refused for the same reason."""

    cause: str
    message: str
    runs: int
    example: str
    last_lines: list[str]


@dataclass(frozen=True)
class StudyStatus:
    """Counts by state, in all and by axis value; what failed; how fast runs finish.

    Attributes:
        values: axis -> value -> state -> runs; seeds and other axes of many values are left to programs.
        finished_per_hour: over the last hour, or since the first run began; None before any has finished.
        time_left_s: at that speed; None where it is not known.
        jobs: in the queue, by state; None without a scheduler, or where it did not answer.
        reasons: state of a job -> why it does not start, in the scheduler's words -> jobs.
        no_queue: why the scheduler did not answer.
        out_of_tries: cause -> failed runs that only `retry` tries again.
    """

    study: str
    folder: str
    runs: int
    states: dict[str, int]
    values: dict[str, dict[str, dict[str, int]]]
    failures: list[Failures]
    finished_per_hour: float | None
    time_left_s: float | None
    jobs: dict[str, int] | None = None
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)
    no_queue: str | None = None
    out_of_tries: dict[str, int] = field(default_factory=dict)

    @property
    def goes_on(self) -> bool:
        """Whether there is something to wait for: a run that is not over, and what may execute it."""
        left = sum(count for state, count in self.states.items() if state not in OVER)
        waits_for_jobs = self.jobs is None or any(state != STUCK for state in self.jobs)
        return left > 0 and (waits_for_jobs or self.states.get(RUNNING, 0) > 0)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=2)

    def text(self) -> str:
        """Return the status for a person."""
        lines = [f"study {self.study}: {self.runs:,} runs: {_counts(self.states)}"]
        for axis, values in self.values.items():
            if len(values) > 1 and len(self.states) > 1:
                rows = [f"  {axis}={value}: {_counts(counts)}" for value, counts in values.items()]
                lines += listed(rows, most=8, what=f"values of {axis}")
        for failure in self.failures[:MOST_FAILURES]:
            word = failure.cause if failure.cause == REFUSED else f"failed ({failure.cause})"
            lines.append(f"{failure.runs:,} {word}: {failure.message}")
            lines += [f"    {line}" for line in failure.last_lines]
            lines.append(f"    such as run {failure.example}")
        if len(self.failures) > MOST_FAILURES:
            lines.append(f"and {len(self.failures) - MOST_FAILURES:,} other kinds of failure")
        if self.out_of_tries:
            lines.append(
                f"{tried_out(self.out_of_tries)}; mend the cause, then: python -m qlora_lab.sweep retry {self.study}"
            )
        if self.jobs is not None:
            lines.append(f"jobs: {self._jobs() or 'none in the queue'}")
        if self.no_queue is not None:
            lines.append(f"jobs: not known, {self.no_queue}")
        if self.finished_per_hour is not None:
            left = f"; {duration(self.time_left_s)} left at that speed" if self.time_left_s is not None else ""
            lines.append(f"{self.finished_per_hour:,.1f} runs finish an hour{left}")
        return "\n".join(lines)

    def _jobs(self) -> str:
        said = []
        for state, count in Counter(self.jobs).most_common():
            why = self.reasons.get(state)
            said.append(f"{count:,} {state}" + (f" ({_counts(why)})" if why else ""))
        return ", ".join(said)


def find_study(runs_dir: Path, name: str, where: Where | None = None) -> StudyFolder:
    """Return a study's newest plan.

    Args:
        name: of the study, or NAME/PLAN for one of its plans.
        where: axis -> values, of the runs that are asked about.

    Raises:
        RunFolderError: nothing of that name was planned there.
        ConfigError: `where` names no axis of it, or leaves no run.
    """
    folder = runs_dir / "studies" / name
    files = sorted([*folder.glob("plan.json"), *folder.glob("*/plan.json")], key=lambda file: file.stat().st_mtime)
    if not files:
        studies = runs_dir / "studies"
        names = [path.name for path in sorted(studies.iterdir()) if path.is_dir()] if studies.is_dir() else []
        there = f"; there are {', '.join(names)}{nearest(name, names)}" if names else ""
        raise RunFolderError(f"no study '{name}' was started with its runs in '{runs_dir}'{there}")
    try:
        record = read_json(files[-1])
        places = {run["run_id"]: dict(run["axes"]) for run in record["runs"]}
        configs = files[-1].parent / record["configs"]
        refusals = {run["run_id"]: str(run["refusal"]) for run in record["runs"] if "refusal" in run}
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{files[-1]} is no plan that can be read; start the study again") from error
    chosen = _chosen(places, where or {}, list(record["axes"]))
    return StudyFolder(files[-1].parent, record["study"]["name"], runs_dir, chosen, configs, len(files) - 1, refusals)


def study_status(
    study: StudyFolder,
    states: Mapping[str, RunState],
    now: datetime,
    jobs: Sequence[Job] | None = None,
    no_queue: str | None = None,
) -> StudyStatus:
    """Return how a study stands.

    Args:
        states: of its runs, of `states_of`.
        jobs: of these runs, in the queue.
        no_queue: why they are not known.
    """
    counts: dict[str, dict[str, Counter[str]]] = {}
    for run_id, place in study.places.items():
        for axis, value in place.items():
            counts.setdefault(axis, {}).setdefault(value, Counter())[states[run_id].state] += 1
    by_state = Counter(state.state for state in states.values())
    speed = _finished_per_hour(states, now)
    left = len(states) - sum(by_state[state] for state in OVER)
    return StudyStatus(
        study=study.name,
        folder=str(study.path),
        runs=len(states),
        states=dict(by_state.most_common()),
        values={axis: {value: dict(each) for value, each in values.items()} for axis, values in counts.items()},
        failures=_failures(states),
        finished_per_hour=speed,
        time_left_s=3600 * left / speed if speed and left else None,
        jobs=dict(Counter(job.state for job in jobs for _ in job.ids)) if jobs is not None else None,
        reasons=_reasons(jobs or ()),
        no_queue=no_queue,
        out_of_tries=out_of_tries(states.values()),
    )


def states_of(study: StudyFolder) -> dict[str, RunState]:
    states = read_states(study.runs_dir, study.places)
    return {run_id: state.with_refusal(study.refusals.get(run_id)) for run_id, state in states.items()}


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    Example:
        >>> duration(5400), duration(200_000)
        ('1 h 30 min', '2 d 7 h')
    """
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _chosen(places: dict[str, dict[str, str]], where: Where, axes: list[str]) -> dict[str, dict[str, str]]:
    for axis, values in where.items():
        if axis not in axes:
            raise ConfigError(f"'{axis}' is no axis of this study; its axes are {', '.join(axes)}{nearest(axis, axes)}")
        known = dict.fromkeys(place[axis] for place in places.values())
        for value in values:
            if value not in known:
                raise ConfigError(unknown_name(axis, value, listed(list(known))))
    chosen = {run_id: place for run_id, place in places.items() if all(place[axis] in where[axis] for axis in where)}
    if not chosen:
        raise ConfigError(f"no run of this study has {' '.join(f'{axis}={where[axis][0]}' for axis in where)}")
    return chosen


def _reasons(jobs: Sequence[Job]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for job in jobs:
        if job.state in (PENDING, STUCK) and job.reason is not None:
            found.setdefault(job.state, Counter())[job.reason] += len(job.ids)
    return {state: dict(reasons.most_common()) for state, reasons in found.items()}


def _failures(states: Mapping[str, RunState]) -> list[Failures]:
    """Group failed runs by cause and message, numbers in it set aside; the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for run_id, state in states.items():
        if state.state in (FAILED, REFUSED):
            message = str((state.record.get("error") or {}).get("message") or "no message")
            groups.setdefault((state.cause or REFUSED, re.sub(r"\d+", "#", message)), []).append(run_id)
    found = []
    for (cause, _), run_ids in sorted(groups.items(), key=lambda item: -len(item[1])):
        error = states[run_ids[0]].record.get("error") or {}
        lines = [line for line in str(error.get("traceback") or "").splitlines() if line.strip()]
        message = str(error.get("message") or "no message").splitlines()[0]
        found.append(Failures(cause, message, len(run_ids), run_ids[0], lines[-LAST_LINES:]))
    return found


def _finished_per_hour(states: Mapping[str, RunState], now: datetime) -> float | None:
    ended = [_time(state.record.get("ended_at")) for state in states.values() if state.state == FINISHED]
    lately = [time for time in ended if time is not None and now - WINDOW <= time]
    begun = [_time(state.record.get("started_at")) for state in states.values() if state.record]
    first = min((time for time in begun if time is not None), default=None)
    if not lately or first is None:
        return None
    hours = (now - max(first, now - WINDOW)) / timedelta(hours=1)
    return len(lately) / hours if hours > 0 else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _counts(counts: Mapping[str, int]) -> str:
    return counted(word for word, count in counts.items() for _ in range(count))
