"""python -m qlora_lab.train model=... data=... adapter.rank=8: execute one run in this process."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.exit_status import FAILED, TERMINATED
from qlora_lab.config.load import from_hydra
from qlora_lab.errors import ConfigError
from qlora_lab.runs.folder import FINISHED, INTERRUPTED, RunFolder
from qlora_lab.runs.heap import restart_with_heap_settings
from qlora_lab.runs.identity import run_id
from qlora_lab.sweep.needs import Needs
from qlora_lab.sweep.plan import check_runs_dir
from qlora_lab.sweep.prepare import prepare


def train(node: DictConfig) -> None:
    """Execute the run the configuration describes, unless it is finished, and print its result."""
    composed = from_hydra(node)
    # Here, whatever launcher a study would use: on this machine's device, with all of its cores.
    here = replace(composed, launcher=replace(composed.launcher, kind="in_process"))
    machine = hardware.detect()
    config = prepare(here, machine)
    why = Needs(machine, 1)(config).refusal
    runs_dir, identifier = Path(config.paths.runs_dir), run_id(config)
    if config.sweep.action not in ("run", "plan"):
        raise ConfigError(
            f"sweep.action={config.sweep.action} is about a study; use python -m qlora_lab.sweep, or sweep.action=plan"
        )
    if config.sweep.action == "plan":
        print(f"run {identifier}: {RunFolder(runs_dir / identifier).state()}" + (f"; refused: {why}" if why else ""))
        return
    if why is not None and RunFolder(runs_dir / identifier).state() != FINISHED:
        raise ConfigError(why)
    check_runs_dir(runs_dir)
    folder = RunFolder.create(runs_dir, identifier, config)
    if folder.state() == FINISHED:
        print(f"run {folder.run_id} is finished; its result stands")
    else:
        from qlora_lab import run  # torch: only once there is something to train

        state = run.execute(folder.path, folder.attempts())
        if state != FINISHED:
            sys.exit(TERMINATED if state == INTERRUPTED else FAILED)
    print(json.dumps(folder.result()["metrics"], indent=2))
    print(f"run folder: {folder.path.resolve()}")


def main() -> None:
    command("train", train)


if __name__ == "__main__":
    restart_with_heap_settings()
    main()
