"""The plan of a study: every run with its id, its place on the axes, and what is already done."""

import errno
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_lab.config import hardware
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, QloraLabError
from qlora_lab.runs.attempt import now
from qlora_lab.runs.files import write_json
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.identity import GROUPS, RunIds, group_of_the_result
from qlora_lab.sweep.dotted import Point, flatten
from qlora_lab.sweep.listing import MOST_LISTED, listed
from qlora_lab.sweep.metric_names import check_metric
from qlora_lab.sweep.needs import Need, Needs
from qlora_lab.sweep.plan_file import code_commit, write_plan_file
from qlora_lab.sweep.prepare import Preparer
from qlora_lab.sweep.run_folders import create_run_folders
from qlora_lab.sweep.states import REFUSED, RunState, counted, out_of_tries, read_states, tried_out

# of a study, in plan.json
IN_THE_RECORD = ("question", "compares", "metric", "goal", "paper_found", "caution", "pipeline_check")
TRY_AGAIN = "mend what they failed for, and sweep.action=retry tries them again"
PLAN_ID_LENGTH = 8  # hex digits
MOST_REFUSALS = 5  # that a person is shown


@dataclass(frozen=True)
class PlannedRun:
    run_id: str
    axes: Point
    config: RunConfig
    state: str  # when it was planned
    status: RunState | None = None  # the same, with what is recorded of it
    need: Need | None = None  # of memory

    @property
    def is_refused(self) -> bool:
        """Say whether the run is not to be executed, since it does not fit."""
        return self.state == REFUSED

    @property
    def refusal(self) -> str | None:
        """Return why the run does not fit."""
        return self.need.refusal if self.need is not None else None

    def folder(self, runs_dir: Path) -> RunFolder:
        return RunFolder(runs_dir / self.run_id)


@dataclass(frozen=True)
class Refused:
    """A point of the axes where no run can be."""

    axes: Point
    error: Exception


@dataclass(frozen=True)
class Plan:
    """Every run of a study.

    Attributes:
        repeated: points that another point already stands for.
        refused: points that cannot work; a plan with such points is shown, not launched.
        only: ids of the runs to execute; None for all that are to be done.
        beyond_rules: whether failed runs are tried again that are out of tries.
        file: its immutable file, once it is written.
    """

    name: str
    runs_dir: Path
    runs: list[PlannedRun]
    repeated: int
    refused: Sequence[Refused] = field(default=())
    only: frozenset[str] | None = None
    beyond_rules: bool = False
    file: Path | None = None

    @cached_property
    def folder(self) -> Path:
        """One for each distinct plan, so that a narrowed study leaves the whole one's report alone."""
        study = self.runs[0].config.study
        told_apart = [sorted(run.run_id for run in self.runs), study.question, study.metric, study.goal]
        digest = hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()[:PLAN_ID_LENGTH]
        return self.runs_dir / "studies" / self.name / digest

    @property
    def axis_names(self) -> list[str]:
        return list(self.runs[0].axes)

    def to_do(self, *, retry_failed: bool) -> list[PlannedRun]:
        """Return the runs that are not finished; failed ones where they are to be tried again and have tries left."""
        states = self.states()
        wanted = [run for run in self.runs if self.only is None or run.run_id in self.only]
        given = {"retry_failed": retry_failed, "beyond_rules": self.beyond_rules}
        return [run for run in wanted if states[run.run_id].is_due(**given)]

    def states(self) -> dict[str, RunState]:
        """Return how each run stands now, by its id."""
        states = read_states(self.runs_dir, (run.run_id for run in self.runs))
        return {run.run_id: states[run.run_id].with_refusal(run.refusal) for run in self.runs}

    def text(self) -> str:
        """Return the plan as a table for a terminal; of many runs the first ones."""
        header = [*self.axis_names, "run", "state"]
        shown = self.runs[: MOST_LISTED + 1]
        rows = [[*run.axes.values(), run.run_id, _words(run)] for run in shown]
        rows = rows if len(self.runs) <= len(rows) else rows[:MOST_LISTED]
        widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        if len(self.runs) > len(rows):
            lines.append(f"and {len(self.runs) - len(rows):,} more runs")
        lines += self._refusals()
        tried = out_of_tries(run.status for run in self.runs if run.status is not None)
        lines += [f"{tried_out(tried)}; {TRY_AGAIN}"] if tried and not self.beyond_rules else []
        study = self.runs[0].config.study
        title = f"study {self.name}" + (f": {study.question}" if study.question else "")
        repeated = f"; {self.repeated} repeated combinations left out" if self.repeated else ""
        total = len(self.runs) + len(self.refused)
        counts = counted([*map(_words, self.runs), *(REFUSED for _ in self.refused)])
        return "\n".join([title, *study.remarks(), *lines, f"{total:,} runs: {counts}{repeated}"])

    def _refusals(self) -> list[str]:
        """Say why runs do not fit, once for those with the same reason."""
        runs = [run for run in self.runs if run.is_refused]
        counts = Counter(run.refusal for run in runs)
        first = {run.refusal: run for run in reversed(runs)}
        told = [
            f"{count:,} refused, such as run {first[why].run_id} ({_at(first[why].axes)}): {why}"
            for why, count in counts.most_common()
        ]
        return listed(told, MOST_REFUSALS, "reasons for refusing runs")

    def check_any_fits(self) -> None:
        """Refuse a plan of which no run can be executed.

        Raises:
            ConfigError: with what the first would need.
        """
        if all(run.is_refused for run in self.runs):
            raise ConfigError(f"no run of study {self.name} fits: {self.runs[0].refusal}")

    def write(self) -> dict[str, Any]:
        """Write plan.json and the plan's immutable file into the plan's folder, and return what plan.json holds.

        Raises:
            ConfigError: paths.runs_dir cannot be written.
        """
        check_runs_dir(self.runs_dir)
        file = write_plan_file(self.folder, self.name, ((run.run_id, run.axes, run.config) for run in self.runs))
        study = self.runs[0].config.study
        record = {
            "study": {"name": self.name} | {key: getattr(study, key) for key in IN_THE_RECORD},
            "paper": asdict(study.paper) if study.paper.file else None,
            "axes": self.axis_names,
            "fixed": self.fixed(),
            "runs": [
                {"run_id": run.run_id, "axes": run.axes, "status_at_plan": run.state}
                | ({"refusal": run.refusal} if run.is_refused else {})
                for run in self.runs
            ],
            "configs": file.name,
            "commit": code_commit(),
            "created_at": now(),
            "command": " ".join(["python -m qlora_lab.sweep", *sys.argv[1:]]),
        }
        write_json(self.folder / "plan.json", record)
        return record

    def refusal(self) -> ConfigError:
        """Word why the plan cannot be launched: the axis value that no run can use, or the first combination."""
        from qlora_lab.config.refusals import explain  # Hydra, which takes longer to import than all the rest

        first = self.refused[0]
        why = explain(first.error)
        for key, value in first.axes.items():
            if all(run.axes[key] != value for run in self.runs):
                return ConfigError(f"no run can use {key}={value}: {why}")
        count = f"{len(self.refused):,} of {len(self.runs) + len(self.refused):,} combinations cannot work"
        return ConfigError(f"{count}, such as {_at(first.axes)}: {why}; leave them out with study.exclude")

    def create_folders(self, runs: Iterable[PlannedRun], *, new: bool = True) -> None:
        """Create the folders of runs, each with its configuration, or only write that anew where they are there."""
        create_run_folders(self.runs_dir, ((run.run_id, run.config) for run in runs), new=new)

    def fixed(self) -> dict[str, Any]:
        """Return the configuration values, dotted, that all runs share."""
        fixed: dict[str, Any] = {}
        for group in GROUPS:
            distinct = {id(value): value for value in (getattr(run.config, group) for run in self.runs)}
            flats = [flatten({group: group_of_the_result(group, value)}) for value in distinct.values()]
            fixed |= {k: v for k, v in flats[0].items() if all(k in flat and flat[k] == v for flat in flats)}
        return fixed


def _at(axes: Point) -> str:
    return " ".join(f"{key}={value}" for key, value in axes.items()) or "the only one"


def _words(run: PlannedRun) -> str:
    return run.status.words if run.status is not None else run.state


def check_runs_dir(runs_dir: Path) -> None:
    """Make the folder of all runs where it is missing.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(runs_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"paths.runs_dir must be a folder that can be written; got '{runs_dir}' ({error.strerror}); "
            "try paths.runs_dir=runs"
        ) from error


def make_plan(name: str, runs: Sequence[tuple[Point, RunConfig]], refused: Sequence[Refused] = ()) -> Plan:
    """Resolve and check every run, and look up what is already done.

    Args:
        refused: points that could not be composed.

    Raises:
        ConfigError: no run is left, a value that no run can use, or a metric to decide by that no run will report.
    """
    machine = hardware.detect()
    prepare, identify = Preparer(machine, len(runs)), RunIds()
    prepared: dict[str, tuple[Point, RunConfig]] = {}
    unready: list[Refused] = []
    for point, composed in runs:
        try:
            config = prepare(composed)
        except QloraLabError as error:
            unready.append(Refused(point, error))
        else:
            prepared.setdefault(identify(config), (point, config))
    all_refused = [*refused, *unready]
    if not prepared:
        raise all_refused[0].error
    _check_values([point for point, _ in prepared.values()], [point for point, _ in runs], all_refused)
    check_metric([config for _, config in prepared.values()])
    repeated = len(runs) - len(unready) - len(prepared)
    return planned(name, [(run_id, *run) for run_id, run in prepared.items()], repeated, all_refused, machine)


def _check_values(used: list[Point], points: list[Point], refused: Sequence[Refused]) -> None:
    """Refuse a value whose runs are all runs of other values too."""
    for key in used[0]:
        values = {point[key] for point in used} | {each.axes[key] for each in refused}
        idle = next((point[key] for point in points if point[key] not in values), None)
        if idle is not None:
            raise ConfigError(
                f"no run can use {key}={idle}: each of its runs is that of another value as well, so it changes "
                "nothing here; remove it from the axis"
            )


def planned(
    name: str,
    rows: Sequence[tuple[str, Point, RunConfig]],
    repeated: int = 0,
    refused: Sequence[Refused] = (),
    machine: hardware.Hardware | None = None,
) -> Plan:
    """Return the plan of runs that are resolved and checked, each in its present state; what does not fit is refused.

    Args:
        machine: that plans; None: this one.
    """
    runs_dir = Path(rows[0][2].paths.runs_dir)
    states = read_states(runs_dir, (run_id for run_id, _, _ in rows))
    needs = Needs(machine or hardware.detect(), len(rows))
    runs = []
    for run_id, axes, config in rows:
        need = needs(config)
        status = states[run_id].with_refusal(need.refusal)
        runs.append(PlannedRun(run_id, axes, config, status.state, status, need))
    return Plan(name, runs_dir, runs, repeated, refused)
