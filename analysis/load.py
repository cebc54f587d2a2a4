"""Run folders into data frames: one row a run, one row a held-out row, one row a training step."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qlora_lab.errors import RunFolderError
from qlora_lab.sweep.dotted import flatten

STATES = ("finished", "failed", "interrupted", "running", "not_started", "missing", "unreadable")
STATUS_STATES = ("finished", "failed", "interrupted", "running")  # what status.json may say
BASE_COLUMNS = (
    "run_id",
    "state",
    "reason",
    "seed",
    "started_at",
    "ended_at",
    "wall_time_s",
    "attempt",
    "traceback",
    "folder",
)
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
ROW_COLUMNS = ("set", "key", "family", "loss_sum", "target_tokens", "target_bytes", "exact_match")


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with numbers as people write them: PyYAML alone reads 2e-4 as text.

    OmegaConf reads the same, but takes 20 ms a run where this takes 1 ms.
    """


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_runs(source: Path | Sequence[Path]) -> pd.DataFrame:
    """Read run folders into one row a run, whatever became of the run.

    Args:
        source: a run folder, a folder of run folders, or a list of either.

    Returns:
        One row a run, in the order of the folders' names, with the columns
        `run_id`, `state` (one of STATES), `reason` (why a run failed or its folder cannot be read), `seed`,
        `started_at`, `ended_at`, `wall_time_s` (of the last attempt), `attempt`, `traceback`, `folder`,
        then `config.GROUP.KEY`, `environment.KEY`, `data.COUNT`, and the metrics by their names (`eval/loss`).
        What a run does not have is NaN or None. A damaged folder is a row in state `unreadable`.

    Raises:
        RunFolderError: `source` does not exist.
    """
    sources = [source] if isinstance(source, str | Path) else source
    return runs_frame([load_run(folder) for item in sources for folder in find_run_folders(Path(item))])


def runs_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put rows of `load_run` into a data frame; an empty list keeps the base columns."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(BASE_COLUMNS))


def find_run_folders(source: Path) -> list[Path]:
    """Return `source` itself if it is a run folder, else the run folders directly inside it, by name."""
    if not source.is_dir():
        raise RunFolderError(f"{source} is not a folder; give a run folder, or the folder that holds them (runs/)")
    if _looks_like_a_run(source):
        return [source]
    inside = sorted(child for child in source.iterdir() if child.is_dir())
    return [child for child in inside if not child.name.startswith(".") and _looks_like_a_run(child)]


def _looks_like_a_run(folder: Path) -> bool:
    return any((folder / mark).exists() for mark in RUN_MARKS)


def load_run(folder: Path) -> dict[str, Any]:
    """Read one run folder into a row of `load_runs`; a folder that is not there gives the state `missing`."""
    row: dict[str, Any] = dict.fromkeys(BASE_COLUMNS)
    row |= {"run_id": folder.name, "folder": str(folder)}
    if not folder.is_dir():
        return row | {"state": "missing", "reason": "there is no run folder"}
    problems = []
    for fill in (_config_columns, _environment_columns, _status_columns, _result_columns):
        try:
            row |= fill(folder)
        except RunFolderError as error:
            problems.append(str(error))
    if row["state"] == "finished" and not (folder / "result.json").exists():
        problems.append(f"status.json says finished, but {folder / 'result.json'} is not there")
    if problems:
        row |= {"state": "unreadable", "reason": "; ".join(problems)}
    return row


def _config_columns(folder: Path) -> dict[str, Any]:
    config = _read_yaml(folder / "config.yaml")
    columns = {f"config.{key}": value for key, value in _columns(config).items() if key != "run_id"}
    return {"run_id": str(config.get("run_id") or folder.name), "seed": config.get("seed"), **columns}


def _environment_columns(folder: Path) -> dict[str, Any]:
    environment = _read_json(folder / "environment.json") or {}
    return {f"environment.{key}": value for key, value in _columns(environment).items()}


def _status_columns(folder: Path) -> dict[str, Any]:
    path = folder / "status.json"
    status = _read_json(path)
    if status is None:
        return {"state": "not_started"}
    if status.get("state") not in STATUS_STATES:
        raise RunFolderError(f"{path}: state must be one of {', '.join(STATUS_STATES)}; got {status.get('state')!r}")
    error = status.get("error") or {}
    started, ended = (_read_time(path, key, status.get(key)) for key in ("started_at", "ended_at"))
    return {
        "state": status["state"],
        "reason": f"{error.get('type', 'error')}: {error.get('message', 'no message')}" if error else None,
        "traceback": error.get("traceback"),
        "started_at": status.get("started_at"),
        "ended_at": status.get("ended_at"),
        "wall_time_s": (ended - started).total_seconds() if started and ended else math.nan,
        "attempt": status.get("attempt"),
    }


def _result_columns(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    result = _read_json(path) or {}
    metrics = result.pop("metrics", {})
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise RunFolderError(f"{path}: metric {name} must be a number or null; got {value!r}")
    missing_as_nan = {name: math.nan if value is None else value for name, value in metrics.items()}
    return {**_columns(result), **missing_as_nan}


def _read_time(path: Path, key: str, text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: {key} must be an ISO time such as 2026-01-31T12:00:00; got {text!r}") from error


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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not there") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} must hold keys and values; got {type(value).__name__}")
    return value


def _columns(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"a.b": value}` for nested mappings; lists become JSON text, so that every value can be compared."""
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in flatten(nested).items()}


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
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield number, value if isinstance(value, dict) else None


def load_rows(run_folder: Path) -> pd.DataFrame:
    """Read evaluation/rows.jsonl: one row a held-out row, with ROW_COLUMNS.

    `loss_sum` is in nats over the row's target tokens; `exact_match` is 1.0, 0.0, or NaN where it is not defined.

    Raises:
        RunFolderError: the file is missing, holds no row, or has a line that is not a row (named).
    """
    path = run_folder / "evaluation" / "rows.jsonl"
    rows = []
    for number, row in read_json_lines(path):
        if row is None or any(column not in row for column in ROW_COLUMNS if column != "family"):
            raise RunFolderError(
                f"{path}, line {number}, is not a row with {', '.join(ROW_COLUMNS)}; score the run again"
            )
        rows.append(row)
    if not rows:
        raise RunFolderError(f"{path} holds no row; score the run again")
    frame = pd.DataFrame(rows).reindex(columns=list(ROW_COLUMNS))
    numbers = ["loss_sum", "target_tokens", "target_bytes", "exact_match"]
    return frame.astype(dict.fromkeys(numbers, float))


def load_history(run_folder: Path) -> pd.DataFrame:
    """Read metrics.jsonl: one row a step, sorted by step.

    A resumed run repeats steps: for every metric of a step the last line wins. Lines that cannot be read (the last
    one of a killed run, mostly) are left out and counted in `frame.attrs["damaged_lines"]`.

    Raises:
        RunFolderError: the file is missing.
    """
    steps: dict[int, dict[str, Any]] = {}
    damaged = 0
    for _, line in read_json_lines(run_folder / "metrics.jsonl"):
        if line is None or not isinstance(line.get("step"), int):
            damaged += 1
        else:
            steps.setdefault(line["step"], {}).update(line)
    frame = pd.DataFrame([steps[step] for step in sorted(steps)])
    if frame.empty:
        frame = pd.DataFrame({"step": pd.Series(dtype=int)})
    frame.attrs["damaged_lines"] = damaged
    return frame
