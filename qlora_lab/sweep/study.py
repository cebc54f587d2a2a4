"""A study: axes expanded into runs, planned, launched, and answered."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qlora_lab.config.command import FAILED
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep import plan as planning
from qlora_lab.sweep.axes import Axes, Point, is_left_out
from qlora_lab.sweep.launch import launch
from qlora_lab.sweep.listing import listed

Compose = Callable[[Axes, Point], RunConfig]


def run_study(axes: Axes, compose: Compose, name: str | None, exclude: list[dict[str, Any]]) -> None:
    """Plan every run of the study, execute what is not finished, and print the answer.

    Args:
        compose: gives the configuration at a point of the axes.
        name: of the study, unless study.name is set.
        exclude: combinations to leave out, before they are composed: they may be ones that cannot work.

    Raises:
        ConfigError: nothing is left to run, or a run cannot work.
    """
    axes.check_exclusions(exclude)
    points = [point for point in axes.points() if not is_left_out(point, exclude)]
    if not points:
        raise ConfigError("study.exclude leaves no run; remove one of its combinations")
    configs = [_composed(axes, point, compose, name) for point in points]
    plan = planning.make_plan(configs[0].study.name or "study", list(zip(points, configs, strict=True)))
    print(plan.text(), flush=True)
    if configs[0].sweep.action == "plan":
        return
    record = plan.write()
    if launch(plan, configs[0].launcher):
        _answer(plan, record)


def _composed(axes: Axes, point: Point, compose: Compose, name: str | None) -> RunConfig:
    config = compose(axes, point)
    return replace(config, study=replace(config.study, name=config.study.name or _folder_name(name)))


def _folder_name(experiment: str | None) -> str | None:
    return experiment.replace("/", "_") if experiment else None


def _answer(plan: planning.Plan, record: dict[str, Any]) -> None:
    """Print what the finished runs say; exit with status 1 if any run failed.

    Args:
        record: what plan.json held when this sweep planned; another sweep may have written it again since.
    """
    from analysis.plan import plan_of  # pandas: only once there is something to summarise
    from analysis.report import summarize_study

    answer = summarize_study(plan.folder, plan.runs_dir, plan_of(record))
    print(answer.text, flush=True)
    states = plan.states()
    print(f"run folders: {plan.runs_dir.resolve()}/ ({', '.join(listed([run.run_id for run in plan.runs]))})")
    failed = [run_id for run_id, state in states.items() if state != "finished"]
    if failed:
        print(
            f"{len(failed)} of {len(states)} runs did not finish: "
            + ", ".join(listed([f"{run_id} ({states[run_id]})" for run_id in failed])),
            file=sys.stderr,
        )
        sys.exit(FAILED)
