"""python -m qlora_lab.train model=... data=... adapter.rank=8: execute one run in this process."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import FAILED, command
from qlora_lab.config.load import from_hydra
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from qlora_lab.sweep.plan import prepare


def train(node: DictConfig) -> None:
    """Execute the run the configuration describes, unless it is finished, and print its result."""
    composed = from_hydra(node)
    config = prepare(composed, hardware.detect())
    folder = RunFolder.create(Path(config.paths.runs_dir), run_id(config), config)
    if folder.state() == FINISHED:
        print(f"run {folder.run_id} is finished; its result stands")
    else:
        from qlora_lab import run  # torch: only once there is something to train

        if run.execute(folder.path) != FINISHED:
            sys.exit(FAILED)
    print(json.dumps(folder.result()["metrics"], indent=2))
    print(f"run folder: {folder.path.resolve()}")


def main() -> None:
    command("train", train)


if __name__ == "__main__":
    main()
