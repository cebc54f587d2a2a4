"""Runs into data frames: one row a run, one row a held-out row, one row a training step.

Runs are read from their folders, or from the W&B files in which they are mirrored; both give the same frames.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.sources.frame_cache import FrameCache, stamp_of
from analysis.sources.parallel import read_in_processes
from analysis.sources.row_table import RowTable
from analysis.sources.run_folders import RECORD_FILES, find_run_folders, history_rows, read_json_lines, run_rows
from analysis.sources.run_row import BASE_COLUMNS
from analysis.sources.wandb_project import SCHEME, OnlineRun, project_runs, read_curves, read_rows
from analysis.sources.wandb_runs import mirrored_history, mirrored_rows, read_runs, run_key, wandb_files
from qlora_lab.errors import ConfigError, RunFolderError

ROW_COLUMNS = ("set", "key", "family", "loss_sum", "target_tokens", "target_bytes", "exact_match")
REQUIRED_COLUMNS = frozenset(ROW_COLUMNS) - {"family"}
FIRST_COLUMNS = ("run_id", "step", "time_s")  # of a history
Source = Path | str | Iterable[Path | str]


def load_runs(
    source: Source, *, cache: Path | Literal[False] | None = None, aliases: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Read runs into one row a run, whatever became of the run.

    Args:
        source: a run folder, a folder of run folders, an offline W&B folder (`wandb/`), a W&B project
            (`wandb://ENTITY/PROJECT`) or a run of one (`wandb://ENTITY/PROJECT/RUN_ID`), or a list of these.
        cache: a folder where rows are kept, so that only new and changed runs are read again; None: in the project's
            cache; False: nothing is kept.
        aliases: metrics that were logged under another name, as `{other name: name}`. Without it a metric of two names
            stays two columns, which `analysis.study.audit` names.

    Returns:
        One row a run, in the order of the folders' names, with the columns
        `run_id`, `state` (one of `run_row.STATES`), `reason` (why a run failed or cannot be read), `seed`,
        `started_at`, `ended_at`, `wall_time_s` (of the last attempt), `attempt`, `traceback`, `folder`, `also_in`,
        then `config.GROUP.KEY`, `environment.KEY`, `data.COUNT`, and the metrics by their names (`eval/loss`).
        What a run does not have is NaN or None. A damaged folder is a row in state `unreadable`. W&B's files give the
        same cells, but for `folder`; of an attempt that was killed they lack up to its last 15 seconds. A damaged W&B
        file is named in `reason`; its run is `unreadable` unless it has finished, when all that can be missing is part
        of its curve.

        A run that is in several places is one row: that of the folder which is named by its id, or else of the place
        that comes first. `also_in` (JSON) lists the others, which are not read into any number.

    Raises:
        RunFolderError: `source` does not exist, or W&B cannot be reached.
        ConfigError: a run has different values under a metric's two names.
    """
    rows, others = _kept("runs", _Found(source), run_rows, cache)
    frame = runs_frame(rows.frame())
    if others:
        frame["also_in"] = [json.dumps(others[run_id]) if run_id in others else None for run_id in frame["run_id"]]
    return _renamed(frame, aliases or {})


def load_history(
    source: Source,
    metrics: Iterable[str] | None = None,
    *,
    cache: Path | Literal[False] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Read the curves of runs.

    Args:
        source: as for `load_runs`, and so are `cache` and `aliases`.
        metrics: columns to keep; None: all.

    Returns:
        One row a step of a run: `run_id`, `step`, `time_s`, and the metrics by name; by run, and by step within a run.
        A step that was taken twice, since the run went on from a checkpoint, has the values of the last time. Lines
        that cannot be read are left out; `frame.attrs["damaged_lines"]` counts them by run (of W&B's files, the damaged
        places: nobody knows how many lines were there).

    Raises:
        RunFolderError: `source` does not exist, or W&B cannot be reached.
        ConfigError: a run has different values under a metric's two names.
    """
    rows, _ = _kept("history", _Found(source), history_rows, cache)
    history = _renamed(rows.frame(), aliases or {})
    wanted = sorted(set(history.columns) - set(FIRST_COLUMNS)) if metrics is None else list(metrics)
    history = history.reindex(columns=[*FIRST_COLUMNS, *wanted])
    history.attrs["damaged_lines"] = {entry.run_id: entry.damaged for entry in rows.entries if entry.damaged}
    return history


def runs_frame(rows: pd.DataFrame | list[dict[str, Any]]) -> pd.DataFrame:
    """Put rows of `load_run` into a data frame; an empty one keeps the base columns."""
    frame = pd.DataFrame(rows)
    return frame if len(frame) else pd.DataFrame(columns=list(BASE_COLUMNS))


def _renamed(frame: pd.DataFrame, aliases: Mapping[str, str]) -> pd.DataFrame:
    """Put what is under a metric's other name under its name.

    Raises:
        ConfigError: a run has both, and they differ.
    """
    for other, name in aliases.items():
        if other not in frame:
            continue
        if name not in frame:
            frame = frame.rename(columns={other: name})
            continue
        differ = frame[frame[other].notna() & frame[name].notna() & (frame[other] != frame[name])]
        if len(differ):
            raise ConfigError(
                f"{len(differ)} rows have both {other} and {name}, with different values, such as run "
                f"{differ['run_id'].iloc[0]} ({differ[other].iloc[0]} and {differ[name].iloc[0]}): they are two metrics"
            )
        frame = frame.drop(columns=other).assign(**{name: frame[name].fillna(frame[other])})
    return frame


def load_rows(run_folder: Path) -> pd.DataFrame:
    """Read evaluation/rows.jsonl: one row a held-out row, with ROW_COLUMNS.

    `loss_sum` is in nats over the row's target tokens; `exact_match` is 1.0, 0.0, or NaN where it is not defined.

    Raises:
        RunFolderError: the file is missing, holds no row, or has a line that is not a row (named).
    """
    return pd.DataFrame(read_row_columns(run_folder))


def read_row_columns(run_folder: Path) -> dict[str, np.ndarray]:
    """Return the columns of `load_rows` as arrays, which thousands of runs are read into faster than into frames."""
    path = run_folder / "evaluation" / "rows.jsonl"
    rows = []
    for number, row in read_json_lines(path):
        if row is None or not row.keys() >= REQUIRED_COLUMNS:
            raise RunFolderError(
                f"{path}, line {number}, is not a row with {', '.join(ROW_COLUMNS)}; score the run again"
            )
        rows.append(row)
    if not rows:
        raise RunFolderError(f"{path} holds no row; score the run again")
    texts = {name: np.array([row.get(name) for row in rows], dtype=object) for name in ROW_COLUMNS[:3]}
    return texts | {name: np.array([row[name] for row in rows], dtype=float) for name in ROW_COLUMNS[3:]}


Read = Callable[[Sequence[str]], RowTable]


def _kept(
    what: str, found: "_Found", of_folders: Read, cache: Path | Literal[False] | None
) -> tuple[RowTable, dict[str, list[str]]]:
    """Return the rows of every run, each run once, and by id the places that are left out."""

    def read(keys: Sequence[str]) -> RowTable:
        return found.read(keys, of_folders, with_history=what == "history")

    stamps = found.stamps(("config.yaml", "metrics.jsonl") if what == "history" else RECORD_FILES)
    if cache is False:
        return _each_once(read(list(stamps)))
    by_place: dict[str, dict[str, str]] = {}
    for key, stamp in stamps.items():
        by_place.setdefault(_place(key), {})[key] = stamp
    tables = [
        FrameCache(f"{what}\n{place}", cache).rows(of_place, read, found.listed) for place, of_place in by_place.items()
    ]
    return _each_once(RowTable.joined(tables).select(list(stamps)) if tables else read([]))


def _place(key: str) -> str:
    """Return the folder whose runs are kept together: that of the run folders, or the one that holds a `wandb/`.

    The mirror of a run in its own folder, RUN/wandb/, counts as beside the run.
    """
    place = key.rpartition("/")[0]
    if place.endswith("/wandb") and not place.startswith(SCHEME):
        place = str(Path(place).parents[1])
    return place


def _each_once(rows: RowTable) -> tuple[RowTable, dict[str, list[str]]]:
    places: dict[str, list[str]] = {}
    for entry in rows.entries:
        places.setdefault(entry.run_id, []).append(entry.key)
    if len(places) == len(rows.entries):
        return rows, {}
    chosen = {
        run_id: next((key for key in keys if key.rpartition("/")[2] == run_id), keys[0])
        for run_id, keys in places.items()
    }
    others = {run_id: [key for key in keys if key != chosen[run_id]] for run_id, keys in places.items()}
    return rows.select(list(chosen.values())), {run_id: keys for run_id, keys in others.items() if keys}


class _Found:
    """What a source holds: run folders, W&B's files by run, and runs of W&B projects.

    Attributes:
        listed: the folders whose runs are all here, as the keys of their runs begin.
    """

    def __init__(self, source: Source) -> None:
        items = [source] if isinstance(source, str | Path) else list(source)
        self.listed: set[str] = set()
        self._folders: dict[str, None] = {}  # each once
        self._files: dict[str, list[Path]] = {}
        addresses = [str(item).rstrip("/") for item in items if str(item).startswith(SCHEME)]
        self._online: dict[str, OnlineRun] = project_runs(addresses)
        self.listed.update(addresses)  # as no other key begins with the address of a run, that one does no harm
        for item in (item for item in items if not str(item).startswith(SCHEME)):
            place = Path(item).resolve()
            files = wandb_files(place)
            for file in files:
                of_run = self._files.setdefault(run_key(file), [])
                of_run += [file] if file not in of_run else []
            folders = [] if files else find_run_folders(place if place.is_dir() else Path(item))
            self._folders |= dict.fromkeys(map(str, folders))
            if folders != [place]:
                self.listed.add(str(place))

    def stamps(self, record_files: Sequence[str]) -> dict[str, str]:
        """Return what changes with each run, by key; run folders come first, then W&B's files, then its projects."""
        curves_only = "metrics.jsonl" in record_files
        folders = {
            key: stamp_of([f"{key}/{name}" for name in record_files])
            for key in self._folders
            if not curves_only or os.path.exists(f"{key}/metrics.jsonl")  # noqa: PTH110
        }
        return {
            **folders,
            **{key: stamp_of(list(map(str, files))) for key, files in self._files.items()},
            **{key: run.stamp for key, run in self._online.items()},
        }

    def read(self, keys: Sequence[str], of_folders: Read, *, with_history: bool) -> RowTable:
        """Read runs anew."""
        files = [self._files[key] for key in keys if key in self._files]
        of_files = _history_of_files if with_history else _rows_of_files
        online = [self._online[key] for key in keys if key in self._online]
        tables = [
            read_in_processes(of_folders, [key for key in keys if key in self._folders]),
            read_in_processes(of_files, files),
            mirrored_history(read_curves(online)) if with_history else mirrored_rows(read_rows(online)),
        ]
        return RowTable.joined(tables)


def _rows_of_files(files: Sequence[list[Path]]) -> RowTable:
    return mirrored_rows(read_runs([file for of_run in files for file in of_run], history=False))


def _history_of_files(files: Sequence[list[Path]]) -> RowTable:
    return mirrored_history(read_runs((file for of_run in files for file in of_run), summary=False))
