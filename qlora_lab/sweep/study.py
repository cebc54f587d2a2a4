"""A study: axes expanded into runs, planned, launched, and answered."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from qlora_lab.config.command import FAILED
from qlora_lab.config.load import from_hydra
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep import plan as planning
from qlora_lab.sweep.launch import launch

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


def run_study(axes: Axes, compose: Compose, name: str | None) -> None:
    """Plan every run of the study, execute what is not finished, and print the answer."""
    points = axes.points()
    configs = [
        from_hydra(compose([*axes.shared, *(f"{key}={value}" for key, value in point.items())])) for point in points
    ]
    first = configs[0]
    name = first.study.name or name or "study"
    kept = [(point, config) for point, config in zip(points, configs, strict=True) if not _excluded(point, config)]
    if not kept:
        raise ConfigError("study.exclude leaves no run; remove one of its combinations")
    plan = planning.make_plan(name, kept)
    print(plan.text(), flush=True)
    if first.sweep.action == "plan":
        return
    plan.write()
    launch(plan, first.launcher)
    _answer(plan)


def _excluded(point: dict[str, str], config: RunConfig) -> bool:
    """Say whether a combination of `study.exclude` holds: each of its axes has one of the listed values."""
    for combination in config.study.exclude:
        unknown = [key for key in combination if key not in point]
        if unknown:
            raise ConfigError(f"study.exclude names '{unknown[0]}', which is no axis; the axes are {', '.join(point)}")
        if all(point[key] in _as_list(allowed) for key, allowed in combination.items()):
            return True
    return False


def _as_list(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _answer(plan: planning.Plan) -> None:
    """Print what the finished runs say; exit with status 1 if any run failed."""
    from analysis.report import summarize_study  # pandas: only once there is something to summarise

    answer = summarize_study(plan.folder, plan.runs_dir)
    print(answer.text, flush=True)
    states = plan.states()
    print(f"run folders: {plan.runs_dir.resolve()}/ ({', '.join(run.run_id for run in plan.runs)})")
    failed = [run_id for run_id, state in states.items() if state != "finished"]
    if failed:
        print(
            f"{len(failed)} of {len(states)} runs did not finish: "
            + ", ".join(f"{run_id} ({states[run_id]})" for run_id in failed),
            file=sys.stderr,
        )
        sys.exit(FAILED)


def study_folder(runs_dir: Path, name: str) -> Path:
    return runs_dir / "studies" / name
