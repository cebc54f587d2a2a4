"""Definitions of lm-evaluation-harness put onto other rows, for the harness to read as a user's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_definition(folder: Path, name: str, definition: str, files: Mapping[str, Path], **changes: Any) -> None:
    """Write a task.

    Args:
        folder: of definitions.
        name: of the task.
        definition: path of the harness's own YAML file below lm_eval/tasks, such as "piqa/piqa.yaml".
        files: JSON Lines of rows in the schema of the task's hub set, by split.
        changes: keys of the definition to set otherwise.
    """
    import lm_eval

    changed = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / definition),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(changed))
