"""config.yaml of a run folder, read: what the run was planned with, typed and checked.

Whoever only looks at states, or was handed the configuration, need not import this, and OmegaConf with it.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_lab.config.parts import Part, TypedParts
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import RunFolderError

TYPED = TypedParts()  # of this process: the runs of a pool share most of their configuration


def read_config(file: Path, run_id: str) -> RunConfig:
    """Read the resolved configuration.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    if not file.is_file():
        raise RunFolderError(f"{file} is missing; plan the run again with qlora_lab.train or qlora_lab.sweep")
    values = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(values, dict) or values.pop("run_id", None) != run_id:
        raise RunFolderError(f"{file} does not belong to run {run_id}; was the folder renamed?")
    return TYPED.config({str(key): Part(value) for key, value in values.items()})


def trainer_values(file: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return values of the trainer as the run started with them, where that is on record."""
    found = OmegaConf.select(OmegaConf.load(file), "trainer") if file.exists() else None
    return {key: found[key] for key in keys if found is not None and found.get(key) is not None}
