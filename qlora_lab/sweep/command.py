"""What `python -m qlora_lab.sweep` does with a composed study: axes -> plan -> runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qlora_lab.config.scale import SCALES, WHOLE
from qlora_lab.config.schema import SWEEP_ACTIONS, require_one_of
from qlora_lab.errors import ConfigError
from qlora_lab.sweep import study
from qlora_lab.sweep.axes import Axes, axes_of, axis_override
from qlora_lab.sweep.compose import Composer
from qlora_lab.sweep.independence import independent_groups
from qlora_lab.sweep.planned import PlanMemory, command_key
from qlora_lab.sweep.states import read_states
from qlora_lab.sweep.together import combination_axes, join

if TYPE_CHECKING:
    from qlora_lab.sweep.steer import Asked

CHOOSING = ("resume", "retry")  # execute some runs of a plan
PLANNING = ("run", "plan", *CHOOSING)


def sweep(loader: ConfigLoader, config: DictConfig, params: dict[str, Any], arguments: list[str]) -> None:
    """Plan a study as a whole and do with it what sweep.action says.

    Args:
        loader: Hydra's, which composes the runs.
        config: what it composed for the study.
        params: the study's axes, hydra.sweeper.params.
        arguments: the command line's overrides.
    """
    name, action = experiment_of(config), str(config.sweep.action)
    require_one_of("sweep.action", action, SWEEP_ACTIONS)
    check_experiment(loader, name, config.hydra.runtime.choices.get(f"{SCALES}{name}{WHOLE}"))
    check_launcher(config.hydra.runtime.choices.get("hydra/launcher"))
    asked: Any = OmegaConf.to_container(config.study, resolve=True)
    axes = axes_of_study(loader, params, arguments, asked)
    memory = PlanMemory(Path(config.paths.runs_dir), command_key(loader, config, arguments))
    if action not in PLANNING:
        from qlora_lab.sweep.steer import steer  # with it, what is asked of SLURM

        steer(_asked(config, study.study_name(asked["name"], name), axes, memory.folder()))
        return
    plan = memory.find()
    if plan is None:
        composer = Composer(
            load=lambda overrides: loader.load_sweep_config(config, overrides),
            is_group=lambda key: "@" in key or bool(loader.get_group_options(key)),
            is_independent=independent_groups(loader, config),
        )
        plan = study.plan_study(axes, composer, name, asked["exclude"])
        composer.check(axes, plan.runs[-1].axes)
    if action in CHOOSING:
        from qlora_lab.sweep.steer import chosen_plan

        states = read_states(plan.runs_dir, (run.run_id for run in plan.runs))
        plan = chosen_plan(plan, states, action, config.sweep.cause)
    study.run_study(plan, action, memory, as_json=config.sweep.json)


def _asked(config: DictConfig, name: str, axes: Axes, known: Path | None) -> "Asked":
    """Return what a command asks about a study: the plan of the same command line, or what is meant of the newest."""
    from qlora_lab.sweep.steer import Asked

    narrowed = {key: values for key, values in axes.values.items() if values != axes.narrowed.get(key)}
    return Asked(
        action=config.sweep.action,
        runs_dir=Path(config.paths.runs_dir),
        study=f"{name}/{known.name}" if known is not None and known.is_dir() else name,
        where={} if known is not None and known.is_dir() else narrowed,
        run=config.sweep.run,
        cause=config.sweep.cause,
        as_json=config.sweep.json,
    )


def axes_of_study(loader: ConfigLoader, params: dict[str, Any], arguments: list[str], asked: dict[str, Any]) -> Axes:
    """Return the axes of a study: those of its file, paired and combined as it says, narrowed by the command line.

    Args:
        asked: its group `study`.
    """
    parser = OverridesParser.create(config_loader=loader)
    own = [axis_override(key, value) for key, value in params.items()]
    listed = combination_axes(asked["combinations"], params)
    axes = axes_of(parser.parse_overrides([*own, *listed]), parser.parse_overrides(arguments))
    return join(axes, asked["zip"], asked["combinations"])


def experiment_of(config: DictConfig) -> str | None:
    """Return the name of the study's file, where it has one."""
    return OmegaConf.select(config, "hydra.runtime.choices.experiment")


def check_launcher(name: str | None) -> None:
    """Refuse a launcher of Hydra's: it would never be asked, since this sweeper hands over all runs at once.

    Raises:
        ConfigError: with what would do.
    """
    if name not in (None, "basic"):
        raise ConfigError(
            f"hydra/launcher={name} goes with one of Hydra's sweepers: add hydra/sweeper=basic; without it runs are "
            "launched as launcher=local, pool or slurm says"
        )


def check_experiment(loader: ConfigLoader, name: str | None, scale: str | None = None) -> None:
    """Refuse a study's file that says where its runs are launched, since that is the command line's choice.

    Args:
        scale: the file that it chooses of its own folder, where it has one.

    Raises:
        ConfigError: it has keys of a launcher.
    """
    for file in [name, f"{name}/{scale}" if scale else None]:
        if file is not None:
            _check_file(loader, file)


def _check_file(loader: ConfigLoader, name: str) -> None:
    file = loader.repository.load_config(f"experiment/{name}")  # type: ignore[attr-defined]
    if file is None:
        return
    chosen = {(each.group or "").lstrip("/") for each in file.defaults_list or [] if isinstance(each, GroupDefault)}
    for key in ("launcher", "hydra.launcher"):
        if OmegaConf.select(file.config, key, throw_on_missing=False) is not None or key.replace(".", "/") in chosen:
            raise ConfigError(
                f"{key} does not belong in a study's file (experiment/{name}), which any launcher executes; "
                "give it on the command line, such as launcher=slurm launcher.max_parallel=8, or in conf/launcher/"
            )
