"""Run folders: which folders are runs, what their files hold, and their curves."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.sources.row_table import Entry, RowTable
from analysis.sources.run_row import Records, read_config_text, run_row
from qlora_lab.errors import RunFolderError

RUN_MARKS = (
    "config.yaml",
    "status.json",
    "result.json",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "evaluation",
    "generations",
)
RECORD_FILES = ("config.yaml", "environment.json", "status.json", "result.json")  # what a row is made of


def find_run_folders(source: Path) -> list[Path]:
    """Return `source` itself if it is a run folder, else the run folders directly inside it, by name."""
    if not source.is_dir():
        raise RunFolderError(f"{source} is not a folder; give a run folder, or the folder that holds them (runs/)")
    if _looks_like_a_run(source):
        return [source]
    with os.scandir(source) as found:
        inside = sorted(child.name for child in found if not child.name.startswith(".") and child.is_dir())
    return [source / name for name in inside if _looks_like_a_run(f"{source}/{name}")]


def _looks_like_a_run(folder: Path | str) -> bool:
    return any(os.path.exists(f"{folder}/{mark}") for mark in RUN_MARKS)  # noqa: PTH110  # of ten thousands: twice as fast


def load_run(folder: Path) -> dict[str, Any]:
    """Read one run folder into a row of `load_runs`; a folder that is not there gives the state `missing`."""
    if not folder.is_dir():
        return run_row(folder.name, str(folder), Records(), problems=["there is no run folder"]) | {"state": "missing"}
    records, problems = Records(), []
    for name, read in READERS.items():
        try:
            setattr(records, name, read(folder))
        except RunFolderError as error:
            problems.append(str(error))
    if (records.status or {}).get("state") == "finished" and records.result is None and not problems:
        problems.append(f"status.json says finished, but {folder / 'result.json'} is not there")
    return run_row(folder.name, str(folder), records, problems=problems)


def read_id(folder: Path) -> str:
    """Return a run's id: as its configuration says, or the folder's name."""
    try:
        return str(_read_config(folder).get("run_id") or folder.name)
    except RunFolderError:
        return folder.name


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (line number, object) for every line that is not empty; None for a line that is no JSON object.

    Raises:
        RunFolderError: the file is missing or cannot be opened.
    """
    try:
        # A torn line may end inside a character, so decoding must not stop the reading of the others.
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    values = _json_objects(f"[{','.join(line for _, line in numbered)}]")  # all at once takes a third less time
    if len(values) != len(numbered):
        values = [next(iter(_json_objects(f"[{line}]")), None) for _, line in numbered]
    yield from zip((number for number, _ in numbered), values, strict=True)


def _json_objects(text: str) -> list[Any]:
    """Return the objects of a list in JSON; an empty list if it is none, or holds anything else."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    return values if all(type(value) is dict for value in values) else []


def read_history(run_folder: Path) -> pd.DataFrame:
    """Read metrics.jsonl: one row a step, sorted by step.

    A resumed run repeats steps: for every metric of a step the last line wins. Lines that cannot be read (the last
    one of a killed run, mostly) are left out and counted in `frame.attrs["damaged_lines"]`.

    Raises:
        RunFolderError: the file is missing.
    """
    steps, damaged = read_steps(run_folder)
    frame = pd.DataFrame(steps)
    if frame.empty:
        frame = pd.DataFrame({"step": pd.Series(dtype=int)})
    frame.attrs["damaged_lines"] = damaged
    return frame


def read_steps(run_folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return what `read_history` is made of: one mapping a step, and the number of damaged lines."""
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    for _, line in read_json_lines(run_folder / "metrics.jsonl"):
        if line is None or not isinstance(line.get("step"), int):
            damaged += 1
        elif (taken := steps.setdefault(line["step"], line)) is not line:
            taken.update(line)
    return [steps[step] for step in sorted(steps)], damaged


def run_rows(keys: Sequence[str]) -> RowTable:
    """Read run folders, by their paths, into their rows of `load_runs`."""
    rows = [load_run(Path(key)) for key in keys]
    return RowTable.of([(Entry(key, row["run_id"], tuple(row)), [row]) for key, row in zip(keys, rows, strict=True)])


def history_rows(keys: Sequence[str]) -> RowTable:
    """Read the curves of run folders, by their paths."""
    read = []
    for key in keys:
        steps, damaged = read_steps(Path(key))
        read.append(history_of(key, read_id(Path(key)), steps, damaged))
    return RowTable.of(read)


def history_of(
    key: str, run_id: str, steps: Sequence[dict[str, Any]], damaged: int = 0
) -> tuple[Entry, list[dict[str, Any]]]:
    """Return a run's curve as `RowTable.of` takes it."""
    rows = [{"run_id": run_id, **step} for step in steps]
    names = dict.fromkeys(name for shape in dict.fromkeys(map(tuple, rows)) for name in shape)
    return Entry(key, run_id, tuple(names), damaged), rows


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the file's object, or None where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} must hold one JSON object; got {type(value).__name__}")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        return read_config_text(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} cannot be read as YAML: {error}") from error


READERS = {
    "config": _read_config,
    "environment": lambda folder: _read_json(folder / "environment.json"),
    "status": lambda folder: _read_json(folder / "status.json"),
    "result": lambda folder: _read_json(folder / "result.json"),
}
