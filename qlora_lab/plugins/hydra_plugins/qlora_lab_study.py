"""Hydra plugins: where studies are found, and the sweeper that plans a study as a whole.

Hydra imports this module at every start, so it imports nothing heavy; the work is in qlora_lab.sweep.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from qlora_lab.config.command import shipped


class StudySearchPath(SearchPathPlugin):
    """Finds +experiment=NAME in sweeps/experiment/, the user's own folder of that name first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folders = [Path.cwd() / "sweeps", shipped("sweeps")]
        for folder in dict.fromkeys(path.resolve() for path in folders if path.is_dir()):
            search_path.append("qlora_lab", f"file://{folder}")


class PlanSweeper(Sweeper):
    """Expands the axes, composes every run, and hands all of them over at once."""

    def __init__(self, params: dict[str, Any] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config_loader = hydra_context.config_loader
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        from qlora_lab.sweep import study
        from qlora_lab.sweep.axes import axes_of, axis_override
        from qlora_lab.sweep.compose import Composer

        params = OmegaConf.to_container(OmegaConf.create(self.params))
        assert isinstance(params, dict)
        parser = OverridesParser.create(config_loader=self.config_loader)
        axes = axes_of(
            parser.parse_overrides([axis_override(key, value) for key, value in params.items()]),
            parser.parse_overrides(arguments),
        )
        study.run_study(
            axes,
            compose=Composer(
                load=lambda overrides: self.config_loader.load_sweep_config(self.config, overrides),
                is_group=lambda key: "@" in key or bool(self.config_loader.get_group_options(key)),
            ),
            name=OmegaConf.select(self.config, "hydra.runtime.choices.experiment"),
            exclude=OmegaConf.to_container(self.config.study.exclude, resolve=True),
        )


@dataclass
class PlanSweeperConfig:
    _target_: str = "hydra_plugins.qlora_lab_study.PlanSweeper"
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="qlora_plan", node=PlanSweeperConfig, provider="qlora_lab")
