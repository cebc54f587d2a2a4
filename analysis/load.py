"""Runs into data frames: one row a run, one row a held-out row, one row a training step.

Runs are read from their folders, or from the W&B files in which they are mirrored; both give the same frames.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.sources.frame_cache import KEY, Entry, FrameCache, Read, stamp_of
from analysis.sources.run_folders import (
    RECORD_FILES,
    find_run_folders,
    load_run,
    read_history,
    read_id,
    read_json_lines,
)
from analysis.sources.run_row import BASE_COLUMNS
from analysis.sources.wandb_project import SCHEME, OnlineRun, project_runs
from analysis.sources.wandb_runs import MirroredRun, read_runs, run_key, wandb_files
from qlora_lab.errors import ConfigError, RunFolderError

ROW_COLUMNS = ("set", "key", "family", "loss_sum", "target_tokens", "target_bytes", "exact_match")
Source = Path | str | Iterable[Path | str]


def load_runs(source: Source, *, cache: Path | Literal[False] | None = None) -> pd.DataFrame:
    """Read runs into one row a run, whatever became of the run.

    Args:
        source: a run folder, a folder of run folders, an offline W&B folder (`wandb/`), a W&B project
            (`wandb://ENTITY/PROJECT`), or a list of these.
        cache: a folder where rows are kept, so that only new and changed runs are read again; None: in the project's
            cache; False: nothing is kept.

    Returns:
        One row a run, in the order of the folders' names, with the columns
        `run_id`, `state` (one of `run_row.STATES`), `reason` (why a run failed or cannot be read), `seed`,
        `started_at`, `ended_at`, `wall_time_s` (of the last attempt), `attempt`, `traceback`, `folder`,
        then `config.GROUP.KEY`, `environment.KEY`, `data.COUNT`, and the metrics by their names (`eval/loss`).
        What a run does not have is NaN or None. A damaged folder is a row in state `unreadable`. W&B's files give the
        same cells, but for `folder`; of an attempt that was killed they know the configuration and the curve alone.

    Raises:
        RunFolderError: `source` does not exist, or W&B cannot be reached.
        ConfigError: two of the sources hold a run of the same id.
    """
    found = _Found(source)
    entries = [
        Entry(str(folder.resolve()), stamp_of([folder / name for name in RECORD_FILES])) for folder in found.folders
    ]

    def read(keys: list[str]) -> pd.DataFrame:
        mirrored = found.read_mirrored(keys)
        rows = [mirrored[key].row() if key in mirrored else load_run(Path(key)) for key in keys]
        return runs_frame(rows).assign(**{KEY: keys})

    return _checked(_kept("runs", entries + found.mirrored_entries(), read, cache))


def load_history(
    source: Source, metrics: Iterable[str] | None = None, *, cache: Path | Literal[False] | None = None
) -> pd.DataFrame:
    """Read the curves of runs.

    Args:
        source: as for `load_runs`, and so is `cache`.
        metrics: columns to keep; None: all.

    Returns:
        One row a step of a run: `run_id`, `step`, `time_s`, and the metrics by name; sorted by run and step. A step
        that was taken twice, since the run went on from a checkpoint, has the values of the last time.

    Raises:
        RunFolderError: `source` does not exist, or W&B cannot be reached.
        ConfigError: two of the sources hold curves of a run of the same id.
    """
    found = _Found(source)
    curves = [folder for folder in found.folders if (folder / "metrics.jsonl").exists()]
    entries = [
        Entry(str(folder.resolve()), stamp_of([folder / "config.yaml", folder / "metrics.jsonl"])) for folder in curves
    ]

    def read(keys: list[str]) -> pd.DataFrame:
        mirrored = found.read_mirrored(keys, with_history=True)
        frames = [
            mirrored[key].history().assign(**{KEY: key, "run_id": mirrored[key].run_id})
            if key in mirrored
            else read_history(Path(key)).assign(**{KEY: key, "run_id": read_id(Path(key))})
            for key in keys
        ]
        whole = [frame for frame in frames if len(frame)]
        return pd.concat(whole, ignore_index=True) if whole else pd.DataFrame(columns=[KEY, "run_id"], dtype=object)

    history = _checked(_kept("history", entries + found.mirrored_entries(), read, cache))
    first = ["run_id", "step", "time_s"]
    wanted = sorted(set(history.columns) - set(first)) if metrics is None else list(metrics)
    return history.reindex(columns=[*first, *wanted])


def _kept(what: str, entries: Sequence[Entry], read: Read, cache: Path | Literal[False] | None) -> pd.DataFrame:
    if cache is False:
        return read([entry.key for entry in entries])
    places = sorted({entry.key.rpartition("/")[0] for entry in entries})
    return FrameCache("\n".join([what, *places]), cache).frame(entries, read)


def runs_frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Put rows of `load_run` into a data frame; an empty list keeps the base columns."""
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(BASE_COLUMNS))


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


class _Found:
    """What a source holds: run folders, W&B's files by run, and runs of W&B projects."""

    def __init__(self, source: Source) -> None:
        items = [source] if isinstance(source, str | Path) else source
        self.folders: list[Path] = []
        self._files: dict[str, list[Path]] = {}
        self._online: dict[str, OnlineRun] = {}
        for item in items:
            if str(item).startswith(SCHEME):
                self._online |= project_runs(str(item))
                continue
            files = wandb_files(Path(item).resolve())
            for file in files:
                of_run = self._files.setdefault(run_key(file), [])
                of_run += [file] if file not in of_run else []
            if not files:
                self.folders += find_run_folders(Path(item))
        self.folders = list({folder.resolve(): folder for folder in self.folders}.values())  # each once

    def mirrored_entries(self) -> list[Entry]:
        return [
            *(Entry(key, stamp_of(files)) for key, files in self._files.items()),
            *(Entry(key, run.stamp) for key, run in self._online.items()),
        ]

    def read_mirrored(self, keys: Sequence[str], *, with_history: bool = False) -> dict[str, MirroredRun]:
        """Return those of the runs that W&B has, by key; the history of one on a server is asked for only on demand."""
        runs = read_runs([file for key in keys for file in self._files.get(key, [])])
        return runs | {key: self._online[key].read(with_history) for key in keys if key in self._online}


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame without KEY, once it is certain that rows of one id are of one run.

    Raises:
        ConfigError: they are of several.
    """
    runs = frame[["run_id", KEY]].drop_duplicates()
    twice = runs[runs["run_id"].duplicated(keep=False)]
    if len(twice):
        run_id = twice["run_id"].iloc[0]
        one, other, *_ = twice.loc[twice["run_id"] == run_id, KEY]
        raise ConfigError(f"run {run_id} comes twice, in {one} and {other}; give one of them")
    return frame.drop(columns=KEY).reset_index(drop=True)
