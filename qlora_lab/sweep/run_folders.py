"""The folders of thousands of new runs; what their configurations share is put into words once."""

from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_lab.config.schema import RunConfig
from qlora_lab.runs.files import write_atomic
from qlora_lab.runs.folder import RunFolder

GROUPS = [field.name for field in fields(RunConfig)]


def create_run_folders(runs_dir: Path, runs: Iterable[tuple[str, RunConfig]]) -> None:
    """Create what `RunFolder.create` does for each run, by its id, in a hundredth of the time for new ones."""
    texts: dict[tuple[str, int], tuple[Any, str]] = {}  # with the group, whose id() must stay its own

    def text_of(group: str, value: Any) -> str:
        key = group, id(value)
        if key not in texts:
            plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            texts[key] = value, OmegaConf.to_yaml(OmegaConf.create({group: plain}))
        return texts[key][1]

    for run_id, config in runs:
        if (runs_dir / run_id).exists():
            RunFolder.create(runs_dir, run_id, config)
        else:
            head = OmegaConf.to_yaml(OmegaConf.create({"run_id": run_id}))
            groups = "".join(text_of(group, getattr(config, group)) for group in GROUPS)
            write_atomic(runs_dir / run_id / "config.yaml", head + groups)
