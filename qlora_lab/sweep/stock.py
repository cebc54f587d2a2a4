"""One run as Hydra alone starts it: hydra.mode=RUN, or each run of a stock sweeper and launcher.

Stock sweepers get the axes from hydra.sweeper.params, which they multiply; what a study says of combinations of them is
heeded here, run by run.
"""

from dataclasses import replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from qlora_lab.config.load import from_hydra
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, RunFailedError
from qlora_lab.runs.folder import FINISHED
from qlora_lab.sweep import study
from qlora_lab.sweep.axes import Axes, axes_of, axis_override, is_left_out
from qlora_lab.sweep.launch import launch
from qlora_lab.sweep.plan import Plan
from qlora_lab.sweep.together import disagrees, join


def run_one(node: DictConfig) -> float | None:
    """Execute one composed run.

    Returns:
        The study's metric, which an optimizing sweeper wants; None where no run was executed.

    Raises:
        ConfigError: the study is about more than one run, or the sweeper looks the other way for the best.
        RunFailedError: the run failed; what that means for the others is for the sweeper to say.
    """
    hydra = HydraConfig.get()
    name, action = hydra.runtime.choices.get("experiment"), str(node.sweep.action)
    if action not in ("run", "plan"):
        raise ConfigError(
            f"sweep.action={action} is about a study as a whole; leave hydra.mode and hydra/sweeper as they are"
        )
    config = from_hydra(node)
    if hydra.mode != RunMode.MULTIRUN:
        study.run_study(_plan(config, name), action, as_json=config.sweep.json)
        return None
    _check_direction(config, OmegaConf.to_container(hydra.sweeper))
    why = _left_out(config, OmegaConf.to_container(hydra.overrides.task), OmegaConf.to_container(hydra.sweeper))
    if why is not None:
        print(f"{why}: {' '.join(hydra.overrides.task)}", flush=True)
        return None
    # Hydra's launcher is the launcher, and this is where it wants the run.
    here = replace(config, launcher=replace(config.launcher, kind="in_process"))
    return _execute(_plan(here, name), action)


def _plan(config: RunConfig, name: str | None) -> Plan:
    return study.plan_study(Axes({}, []), lambda axes, point: config, name, exclude=[])


def _execute(plan: Plan, action: str) -> float | None:
    print(plan.text(), flush=True)
    plan.check_any_fits()
    if action == "plan":
        return None
    plan.write()
    plan.create_folders(plan.to_do(retry_failed=True))
    launch(plan, plan.runs[0].config.launcher)
    (run,) = plan.runs
    folder = run.folder(plan.runs_dir)
    metric = run.config.study.metric
    if folder.state() != FINISHED:
        why = ((folder.status() or {}).get("error") or {}).get("message", "it said no more")
        raise RunFailedError(f"run {run.run_id} failed: {why}; its folder is {folder.path.resolve()}")
    value = folder.result()["metrics"].get(metric)
    print(f"run {run.run_id}: {metric} {value}", flush=True)
    return value


def _check_direction(config: RunConfig, sweeper: Any) -> None:
    """Refuse an optimizing sweeper that looks for the worst."""
    goal, direction = config.study.goal, sweeper.get("direction")
    wanted = f"{goal}imize"
    if direction is not None and getattr(direction, "name", direction) != wanted:
        raise ConfigError(
            f"hydra.sweeper.direction must be {wanted}, since study.goal={goal} of {config.study.metric}; got "
            f"{getattr(direction, 'name', direction)}"
        )


def _left_out(config: RunConfig, overrides: Any, sweeper: Any) -> str | None:
    """Say why a study leaves out the combination that a stock sweeper made."""
    asked = config.study
    if asked.combinations:
        raise ConfigError("study.combinations needs our own sweeper; leave out hydra/sweeper=..., or list axes instead")
    parser = OverridesParser.create()
    point = {each.key_or_group: each.get_value_element_as_str() for each in parser.parse_overrides(overrides)}
    if is_left_out(point, asked.exclude):
        return "left out by study.exclude"
    own = [axis_override(key, value) for key, value in (sweeper.get("params") or {}).items()]
    if asked.zip and disagrees(point, join(axes_of(parser.parse_overrides(own), []), asked.zip, [])):
        return "left out by study.zip"
    return None
