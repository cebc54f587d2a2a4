"""Hydra plugins: where studies are found, and the sweeper that plans a study as a whole.

Hydra imports this module at every start, so it imports nothing heavy; the work is in qlora_lab.sweep.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
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
        from qlora_lab.sweep.command import sweep

        params = OmegaConf.to_container(OmegaConf.create(self.params))
        assert isinstance(params, dict)
        sweep(self.config_loader, self.config, params, arguments)


@dataclass
class PlanSweeperConfig:
    _target_: str = "hydra_plugins.qlora_lab_study.PlanSweeper"
    params: dict[str, Any] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="qlora_plan", node=PlanSweeperConfig, provider="qlora_lab")
