"""One row of the table of runs, made of what is recorded about a run, wherever that lies."""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml

from qlora_lab.errors import RunFolderError
from qlora_lab.sweep.dotted import flatten

GROUP = re.compile(r"^(?=[A-Za-z_]\w*:)", re.MULTILINE)  # where a key of the outermost mapping begins
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
    "also_in",
)


@dataclass
class Records:
    """What is recorded about a run: the objects of the files of its folder; None where there is none."""

    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    status: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML with numbers as people write them: PyYAML alone reads 2e-4 as text.

    OmegaConf reads the same, but takes 20 ms a run where this takes 1 ms.
    """


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def run_row(name: str, place: str, records: Records, *, problems: Sequence[str] = ()) -> dict[str, Any]:
    """Return a row of `load_runs`.

    Args:
        name: the run's id where its configuration does not say it.
        place: where the records lie, for messages and the column `folder`.
        problems: what could not be read; the row's state is then `unreadable`.
    """
    row: dict[str, Any] = dict.fromkeys(BASE_COLUMNS)
    row |= {"run_id": name, "folder": place}
    found = list(problems)
    for fill, value in (
        (_config_columns, records.config),
        (_environment_columns, records.environment),
        (_status_columns, records.status),
        (_result_columns, records.result),
    ):
        try:
            row |= fill(place, value or {})
        except RunFolderError as error:
            found.append(str(error))
    if found:
        row |= {"state": "unreadable", "reason": "; ".join(found)}
    return row


def read_config_text(text: str, place: str) -> dict[str, Any]:
    """Read a config.yaml; what it returns is shared with others, and not to be changed.

    Raises:
        RunFolderError: it is no YAML, or no mapping.
    """
    try:
        value = _in_groups(text) or yaml.load(text, _YamlLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise RunFolderError(f"{place} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{place} must hold keys and values; got {type(value).__name__}")
    return value


def _in_groups(text: str) -> dict[str, Any] | None:
    """Read a text whose groups stand for themselves, as the ones that runs write; None where it has another form.

    Most groups are the same in all runs of a study, and are read once.
    """
    groups = GROUP.split(text)
    if groups[0].strip() or "&" in text or "*" in text or "\n---" in text or "\t" in text:
        return None
    values: dict[str, Any] = {}
    for group in groups[1:]:
        value = _read_group(group)
        if not isinstance(value, dict) or len(value) != 1 or not values.keys().isdisjoint(value):
            return None
        values |= value
    return values


@functools.lru_cache(maxsize=4096)
def _read_group(text: str) -> Any:
    try:
        return yaml.load(text, _YamlLoader)
    except (ValueError, yaml.YAMLError):
        return None  # the whole file says what is wrong with it


def _config_columns(place: str, config: dict[str, Any]) -> dict[str, Any]:
    columns = {f"config.{key}": value for key, value in _columns(config).items() if key != "run_id"}
    identity = {"run_id": str(config["run_id"])} if config.get("run_id") else {}
    return {**identity, "seed": config.get("seed"), **columns}


def _environment_columns(place: str, environment: dict[str, Any]) -> dict[str, Any]:
    return {f"environment.{key}": value for key, value in _columns(environment).items()}


def _status_columns(place: str, status: dict[str, Any]) -> dict[str, Any]:
    if not status:
        return {"state": "not_started"}
    where = f"{place}/status.json"
    if status.get("state") not in STATUS_STATES:
        raise RunFolderError(f"{where}: state must be one of {', '.join(STATUS_STATES)}; got {status.get('state')!r}")
    error = status.get("error") or {}
    started, ended = (_read_time(where, key, status.get(key)) for key in ("started_at", "ended_at"))
    return {
        "state": status["state"],
        "reason": f"{error.get('type', 'error')}: {error.get('message', 'no message')}" if error else None,
        "traceback": error.get("traceback"),
        "started_at": status.get("started_at"),
        "ended_at": status.get("ended_at"),
        "wall_time_s": (ended - started).total_seconds() if started and ended else math.nan,
        "attempt": status.get("attempt"),
    }


def _result_columns(place: str, result: dict[str, Any]) -> dict[str, Any]:
    metrics = result.get("metrics", {})
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise RunFolderError(f"{place}/result.json: metric {name} must be a number or null; got {value!r}")
    missing_as_nan = {name: math.nan if value is None else value for name, value in metrics.items()}
    rest = {key: value for key, value in result.items() if key != "metrics"}
    return {**_columns(rest), **missing_as_nan}


def _read_time(place: str, key: str, text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{place}: {key} must be an ISO time such as 2026-01-31T12:00:00; got {text!r}") from error


def _columns(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"a.b": value}` for nested mappings; lists become JSON text, so that every value can be compared."""
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in flatten(nested).items()}
