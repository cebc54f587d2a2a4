"""The folders of thousands of new runs; what their configurations share is put into words once."""

from collections.abc import Iterable
from dataclasses import asdict, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import RunConfig
from qlora_lab.runs.config_text import config_text
from qlora_lab.runs.files import write_atomic
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.lease import Lease
from qlora_lab.sweep.plan_file import read_plan_file

GROUPS = [field.name for field in fields(RunConfig)]


class ConfigTexts:
    """Gives what config.yaml holds of each run."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int], tuple[Any, str]] = {}  # with the group, whose id() must stay its own

    def __call__(self, run_id: str, config: RunConfig) -> str:
        return config_text({"run_id": run_id}) + "".join(self._of(group, getattr(config, group)) for group in GROUPS)

    def _of(self, group: str, value: Any) -> str:
        key = group, id(value)
        if key not in self._texts:
            plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            self._texts[key] = value, config_text({group: plain})
        return self._texts[key][1]


def create_run_folders(runs_dir: Path, runs: Iterable[tuple[str, RunConfig]], *, new: bool = True) -> None:
    """Create what `RunFolder.create` does for each run, by its id, in a hundredth of the time for new ones.

    Args:
        new: whether folders that are not there are made; else `PlannedFolders` does when their runs begin.
    """
    text_of = ConfigTexts()
    for run_id, config in runs:
        if (runs_dir / run_id).exists():
            RunFolder.create(runs_dir, run_id, config)
        elif new:
            write_atomic(RunFolder(runs_dir / run_id).config_file, text_of(run_id, config))


class PlannedFolders:
    """Makes the folders of runs when they are first executed, from the plan's file.

    Args:
        plan_file: as `write_plan_file` left it.
        run_ids: those that may be asked for.
    """

    def __init__(self, plan_file: Path, run_ids: Iterable[str]) -> None:
        self._plan_file = plan_file
        self._run_ids = list(run_ids)
        self._text_of = ConfigTexts()

    def complete(self, folder: RunFolder, lease: Lease) -> RunConfig | None:
        """Write a run's configuration, and return it; None where the run has one from before, which counts.

        Raises:
            RunFolderError: the plan's file is gone or damaged.
        """
        if folder.config_file.exists():
            return None
        config = self._configs[folder.run_id]
        write_atomic(folder.config_file, self._text_of(folder.run_id, config), lease)
        return config

    @cached_property
    def _configs(self) -> dict[str, RunConfig]:
        return {run_id: config for run_id, _, config in read_plan_file(self._plan_file, self._run_ids).rows}
