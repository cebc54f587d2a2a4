"""Runs by what a person calls them: an id, its first digits, or a folder."""

import re
from pathlib import Path

from qlora_lab.errors import RunFolderError, nearest
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.identity import ID_LENGTH

RUN_ID = re.compile(f"[0-9a-f]{{{ID_LENGTH}}}")
SHOWN_IDS = 5


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """Return the folder of a run.

    Args:
        runs_dir: where ids are looked up.
        name: a run folder, an id, or the first digits of only one id.

    Raises:
        RunFolderError: there is none, or several begin so.
    """
    if (Path(name) / "config.yaml").is_file():
        return RunFolder(Path(name).resolve())
    ids = sorted(path.name for path in runs_dir.iterdir() if RUN_ID.fullmatch(path.name)) if runs_dir.is_dir() else []
    found = [run_id for run_id in ids if run_id.startswith(name)] if name else []
    if len(found) == 1:
        return RunFolder(runs_dir / found[0])
    if found:
        shown = ", ".join(found[:SHOWN_IDS]) + (", ..." if len(found) > SHOWN_IDS else "")
        raise RunFolderError(
            f"run '{name}' could be any of {len(found)} runs in '{runs_dir}': {shown}; give more digits"
        )
    there = f"it has {len(ids)} runs{nearest(name, ids)}" if ids else "it has no runs; set paths.runs_dir"
    raise RunFolderError(f"'{name}' is no run in '{runs_dir}', and no run folder; {there}")


def check_finished(folder: RunFolder) -> None:
    """Refuse a run without a result.

    Raises:
        RunFolderError: it is not finished.
    """
    state = folder.state()
    if state != FINISHED:
        raise RunFolderError(
            f"run {folder.run_id} is {state}, and only finished runs are evaluated; the command that started it goes "
            "on with it"
        )
