"""python -m qlora_lab.sweep +experiment=NAME: plan a study, execute its runs, answer its question.

python -m qlora_lab.sweep status NAME, and the other words of `sweep.steer`, are about a study that was started.
"""

import sys
from typing import TYPE_CHECKING

from qlora_lab.config.schema import SWEEP_ACTIONS

if TYPE_CHECKING:
    from omegaconf import DictConfig


def sweep_one(node: "DictConfig") -> float | None:
    """Treat a composed configuration without axes (hydra.mode=RUN), or one run of a stock sweeper, as a study."""
    from qlora_lab.sweep.stock import run_one

    return run_one(node)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in SWEEP_ACTIONS[2:]:
        from qlora_lab.sweep import steer

        steer.main(sys.argv[1:])
    else:
        from qlora_lab.config.command import command

        command("sweep", sweep_one)


if __name__ == "__main__":
    main()
