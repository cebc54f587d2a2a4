"""A study: axes expanded into runs, planned, launched, and answered."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from qlora_lab.config.command import FAILED
from qlora_lab.config.load import from_hydra
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep import plan as planning
from qlora_lab.sweep.launch import launch
from qlora_lab.sweep.listing import listed

Compose = Callable[[list[str]], DictConfig]


@dataclass(frozen=True)
class Axes:
    """What varies (key -> values), and the other overrides that every run shares."""

    values: dict[str, list[str]]
    shared: list[str]

    def points(self) -> list[dict[str, str]]:
        """Return the product of all axes, the last axis varying fastest."""
        return [dict(zip(self.values, point, strict=True)) for point in itertools.product(*self.values.values())]


def axes_of(params: list[Override], arguments: list[Override]) -> Axes:
    """Join a study's axes with the command line: for the same key, the command line wins.

    Raises:
        ConfigError: a sweep that is not a list of values, such as interval().
    """
    chosen = {override.get_key_element(): override for override in (*params, *arguments)}
    axis_keys = {override.get_key_element() for override in params}
    values: dict[str, list[str]] = {}
    shared: list[str] = []
    for key, override in chosen.items():
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(f"{key} must be a list of values, range() or choice(); got '{override.input_line}'")
            # A value that is listed twice is one run.
            values[key] = list(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))
        elif key in axis_keys:
            values[key] = [override.get_value_element_as_str()]
        else:
            shared.append(f"{key}={override.get_value_element_as_str()}")
    return Axes(values, shared)


def run_study(axes: Axes, compose: Compose, name: str | None, exclude: list[dict[str, Any]]) -> None:
    """Plan every run of the study, execute what is not finished, and print the answer.

    Args:
        compose: gives the configuration of a list of overrides.
        name: of the study, unless study.name is set.
        exclude: combinations to leave out, before they are composed: they may be ones that cannot work.

    Raises:
        ConfigError: nothing is left to run, or a run cannot work.
    """
    points = [point for point in axes.points() if not any(_matches(point, left_out) for left_out in exclude)]
    if not points:
        raise ConfigError("study.exclude leaves no run; remove one of its combinations")
    configs = [_composed(axes, point, compose, name) for point in points]
    plan = planning.make_plan(configs[0].study.name or "study", list(zip(points, configs, strict=True)))
    print(plan.text(), flush=True)
    if configs[0].sweep.action == "plan":
        return
    record = plan.write()
    launch(plan, configs[0].launcher)
    _answer(plan, record)


def _composed(axes: Axes, point: dict[str, str], compose: Compose, name: str | None) -> RunConfig:
    config = from_hydra(compose([*axes.shared, *(f"{key}={value}" for key, value in point.items())]))
    return replace(config, study=replace(config.study, name=config.study.name or name))


def _matches(point: dict[str, str], combination: dict[str, Any]) -> bool:
    """Say whether each axis of the combination has one of its listed values."""
    unknown = [key for key in combination if key not in point]
    if unknown:
        raise ConfigError(f"study.exclude names '{unknown[0]}', which is no axis; the axes are {', '.join(point)}")
    return all(point[key] in _as_list(values) for key, values in combination.items())


def _as_list(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


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
