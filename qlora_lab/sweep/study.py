"""A study: axes expanded into runs, planned, launched, and answered."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config import hardware
from qlora_lab.config.exit_status import FAILED
from qlora_lab.config.schema import RunConfig, SweepConfig
from qlora_lab.errors import ConfigError, QloraLabError, unknown_name
from qlora_lab.runs.causes import INFRASTRUCTURE
from qlora_lab.runs.files import read_json, write_json
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.sweep.axes import Axes
from qlora_lab.sweep.dotted import Point
from qlora_lab.sweep.launch import launch
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.plan import TRY_AGAIN, Plan, Refused, make_plan
from qlora_lab.sweep.plan_file import PACKAGE, hash_of_code
from qlora_lab.sweep.planned import PlanMemory
from qlora_lab.sweep.prepare import check_device
from qlora_lab.sweep.settle import give_up, settle
from qlora_lab.sweep.states import out_of_tries, read_states, tried_out

Compose = Callable[[Axes, Point], RunConfig]
ANSWER_FILE = "answer.json"
WITH_WORKERS = ("pool", "slurm")  # launchers whose workers make the folders of new runs, from the plan's file


def plan_study(axes: Axes, compose: Compose, name: str | None, exclude: list[dict[str, Any]]) -> Plan:
    """Return the plan of every run of a study.

    Args:
        compose: gives the configuration at a point of the axes.
        name: of the study, unless study.name is set.
        exclude: combinations to leave out, before they are composed: they may be ones that cannot work.

    Raises:
        ConfigError, HydraException, OmegaConfBaseException: no run is left that can work, or study.compares names no
            axis.
    """
    runs: list[tuple[Point, RunConfig]] = []
    refused: list[Refused] = []
    named = Named(name)
    for point in axes.without(exclude):
        try:
            runs.append((point, named(compose(axes, point))))
        except (QloraLabError, HydraException, OmegaConfBaseException) as error:
            refused.append(Refused(point, error))
    if not runs:
        raise refused[0].error
    for axis in runs[0][1].study.compares:
        if axis not in runs[0][0]:
            raise ConfigError(unknown_name("study.compares", axis, list(runs[0][0])))
    return make_plan(study_name(runs[0][1].study.name, name), runs, refused)


def run_study(plan: Plan, action: str, memory: PlanMemory | None = None, *, as_json: bool = False) -> None:
    """Show a plan, execute what is not finished, and print the answer.

    Args:
        action: run, or plan, which changes nothing.
        memory: keeps the plan for the next command.
        as_json: show a plan for programs.

    Raises:
        ConfigError: some of its runs cannot work, none fits, or SLURM has not what is asked for.
        LaunchError: SLURM is not on this machine.
    """
    if action == "plan":
        from qlora_lab.sweep.preview import preview_of  # with it, what is asked of SLURM

        preview = preview_of(plan)
        print(preview.to_json() if as_json else preview.text(), flush=True)
    else:
        print(plan.text(), flush=True)
    if plan.refused:
        raise plan.refusal()
    plan.check_any_fits()
    if action == "plan":
        return
    machine = hardware.detect()
    for run in plan.runs:
        check_device(run.config, machine)
    launcher = plan.runs[0].config.launcher
    if launcher.kind == "slurm" and plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed):
        from qlora_lab.sweep.site import check_before_submitting

        check_before_submitting(plan, launcher)
    record = plan.write()
    if memory is not None:
        memory.keep(plan, record["configs"])
    execute(plan, record)


def execute(plan: Plan, record: dict[str, Any]) -> None:
    """Execute what is left of a written plan, and print the answer unless its runs go on in a queue.

    Args:
        record: what its plan.json holds.
    """
    launcher = plan.runs[0].config.launcher
    _settle(plan, silent=launcher.kind != "slurm")  # whose books say why
    to_do = plan.to_do(retry_failed=plan.runs[0].config.sweep.retry_failed)
    states = plan.states() if plan.beyond_rules else {}
    tried = out_of_tries(states[run.run_id] for run in to_do if run.run_id in states)
    if tried:
        print(f"{tried_out(tried)}, and tried again all the same, as this command asks", flush=True)
    plan.create_folders(to_do, new=launcher.kind not in WITH_WORKERS)
    if not to_do or launch(replace(plan, file=plan.folder / record["configs"]), launcher):
        _answer(plan, record)


def _settle(plan: Plan, *, silent: bool) -> None:
    """Record which runs are out of tries, and the attempts that a process of this machine was killed in; they count.

    Args:
        silent: whether there are such attempts.
    """
    for run_id, state in plan.states().items():
        if state.is_given_up:
            give_up(RunFolder(plan.runs_dir / run_id))
        elif silent and state.died_silently:
            settle(RunFolder(plan.runs_dir / run_id), INFRASTRUCTURE)


class Named:
    """Names the study of each run after its file; runs that share a study's settings go on sharing them."""

    def __init__(self, experiment: str | None) -> None:
        self._name = study_name(None, experiment)
        self._named: dict[int, tuple[Any, Any]] = {}  # with what the id() is of
        self._sweeps: dict[bool, SweepConfig] = {}

    def __call__(self, config: RunConfig) -> RunConfig:
        key = id(config.study)
        if key not in self._named:
            self._named[key] = config.study, replace(config.study, name=config.study.name or self._name)
        # What this command does with the plan is no part of it.
        retry_failed = config.sweep.retry_failed
        sweep = self._sweeps.setdefault(retry_failed, SweepConfig(retry_failed=retry_failed))
        return replace(config, study=self._named[key][1], sweep=sweep)


def study_name(given: str | None, experiment: str | None) -> str:
    """Return the name of a study: its own, or that of its file."""
    return given or (experiment or "study").replace("/", "_")


def _answer(plan: Plan, record: dict[str, Any]) -> None:
    """Print what the finished runs say; exit with status 1 if any run failed.

    Args:
        record: what plan.json held when this sweep planned; another sweep may have written it again since.
    """
    print(_answer_text(plan, record), flush=True)
    states = plan.states()
    print(f"run folders: {plan.runs_dir.resolve()}/ ({', '.join(listed([run.run_id for run in plan.runs]))})")
    failed = [run_id for run_id, state in states.items() if state.state != FINISHED]
    if failed:
        print(
            f"{len(failed)} of {len(states)} runs did not finish: "
            + ", ".join(listed([f"{run_id} ({states[run_id].state})" for run_id in failed])),
            file=sys.stderr,
        )
        tried = out_of_tries(states.values())
        if tried:
            print(f"{tried_out(tried)}; {TRY_AGAIN}", file=sys.stderr)
        sys.exit(FAILED)


def _answer_text(plan: Plan, record: dict[str, Any]) -> str:
    """Return the answer, the one before if no run has changed since and its files are still there."""
    statuses = read_states(plan.runs_dir, (run.run_id for run in plan.runs))
    told_apart = [hash_of_code(PACKAGE.parent / "analysis"), record["study"], record["axes"], str(plan.runs_dir)]
    told_apart += [[run_id, status.state, status.record.get("ended_at")] for run_id, status in statuses.items()]
    key = hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()
    file = plan.folder / ANSWER_FILE
    before = read_json(file) if file.exists() else {}
    if before.get("of") == key and all(Path(path).exists() for path in before["paths"]):
        return str(before["text"])
    from analysis.report.study_report import summarize_study
    from analysis.study.plan import plan_of  # pandas: only once there is something to summarise

    answer = summarize_study(plan.folder, plan.runs_dir, plan_of(record))
    write_json(file, {"of": key, "text": answer.text, "paths": [str(path) for path in answer.paths.values()]})
    return answer.text
