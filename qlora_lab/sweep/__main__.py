"""python -m qlora_lab.sweep +experiment=NAME: plan a study, execute its runs, answer its question."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qlora_lab.config.command import command
from qlora_lab.config.load import from_hydra
from qlora_lab.sweep import study
from qlora_lab.sweep.axes import Axes


def sweep_one(node: DictConfig) -> None:
    """Treat a composed configuration without axes (hydra.mode=RUN) as a study of one run."""
    name = HydraConfig.get().runtime.choices.get("experiment")
    plan = study.plan_study(Axes({}, []), lambda axes, point: from_hydra(node), name, exclude=[])
    study.run_study(plan, node.sweep.action)


def main() -> None:
    command("sweep", sweep_one)


if __name__ == "__main__":
    main()
