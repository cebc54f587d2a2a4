"""Runs from W&B's offline files: what `qlora_lab.tracking` mirrored there, put together again.

A run that was resumed, or killed and started again, leaves several files with one id. They are merged in the order in
which they began: of a step's metrics the last file wins, as does the last one that says how the run stands.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.sources.row_table import Entry, RowTable
from analysis.sources.run_folders import history_of
from analysis.sources.run_row import Records, run_row
from analysis.sources.wandb_log import WandbRun, read_wandb_file
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.mirror import RECORDS, STEP

INTERNAL = "_"  # W&B's own keys begin with it
NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as W&B's server spells them, whose JSON has no such numbers
SHORTEST_S = 15  # W&B writes nothing of a run to its file any earlier


@dataclass
class MirroredRun:
    """One run, from all of its files in the order in which they began."""

    run_id: str
    place: str  # where it was read: a folder, or an address
    records: Records
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    damaged: int = 0  # places of its files that could not be read
    remarks: list[str] = field(default_factory=list)  # on what is missing, where the row is right without it
    problems: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return the run's row of `load_runs`."""
        row = run_row(self.run_id, self.place, self.records, problems=self.problems)
        return row if row["reason"] or not self.remarks else row | {"reason": "; ".join(self.remarks)}

    def history(self) -> list[dict[str, Any]]:
        """Return one mapping a step, sorted by step."""
        return [self.steps[step] for step in sorted(self.steps)]


def mirrored_rows(runs: Mapping[str, MirroredRun]) -> RowTable:
    """Return the rows of runs, by key, as those of `load_runs`."""
    rows = {key: run.row() for key, run in runs.items()}
    return RowTable.of([(Entry(key, row["run_id"], tuple(row)), [row]) for key, row in rows.items()])


def mirrored_history(runs: Mapping[str, MirroredRun]) -> RowTable:
    """Return the curves of runs, by key."""
    return RowTable.of([history_of(key, run.run_id, run.history(), run.damaged) for key, run in runs.items()])


def wandb_files(source: Path) -> list[Path]:
    """Return the run files of an offline W&B folder, of one run's folder in it, or of neither: an empty list."""
    if source.suffix == ".wandb":
        return [source]
    return sorted([*source.glob("run-*.wandb"), *source.glob("*run-*/run-*.wandb")])


def run_key(file: Path) -> str:
    """Return what names the run of a file, the same for all of its files: the folder they lie in, and the id."""
    folder = file.parent.parent if "run-" in file.parent.name else file.parent
    return str(folder / _id_in_name(file))


def read_runs(files: Iterable[Path], *, history: bool = True, summary: bool = True) -> dict[str, MirroredRun]:
    """Read files, or half of what they hold, and merge those of one run; runs come by `run_key`, in its order."""
    by_run: dict[str, list[WandbRun]] = {}
    for file in files:
        by_run.setdefault(run_key(file), []).append(_read(file, history, summary))
    return {key: _merged(_id_in_name(parts[0].file), parts) for key, parts in sorted(by_run.items())}


def _read(file: Path, history: bool, summary: bool) -> WandbRun:
    try:
        return read_wandb_file(file, history=history, summary=summary)
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read: {error.strerror}") from error


def _id_in_name(file: Path) -> str:
    return file.stem.removeprefix("run-")


def _merged(run_id: str, parts: Iterable[WandbRun]) -> MirroredRun:
    # A file without a beginning, of which nobody knows when it began, goes first: it is the last one only if alone.
    ordered = sorted(parts, key=lambda part: (part.run_id is not None, part.started_at))
    last = ordered[-1]
    run = MirroredRun(
        run_id,
        str(last.file.parent),
        records_of(run_id, last.config, _last_summary(ordered)) if last.run_id is not None else Records(),
        steps_of(line for part in ordered for line in part.history),
        sum(part.damage.count for part in ordered),
    )
    damaged = [_damage_of(part) for part in ordered if part.damage.places]
    if (run.records.status or {}).get("state") == "finished":
        run.remarks = damaged  # nothing came after it, and it has the result: some of the curve is missing, no more
    elif damaged:
        run.problems = damaged
    elif last.run_id is None:
        run.problems.append(
            f"{last.file} holds nothing: the run was killed in its first {SHORTEST_S} seconds, before W&B wrote of it"
        )
    return run


def _damage_of(part: WandbRun) -> str:
    places = "a place" if part.damage.places == 1 else f"{part.damage.places} places"
    return f"{part.file} is damaged in {places}; what was written there is left out"


def steps_of(history: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the metrics by training step; of a step that was taken twice those of the last time."""
    steps: dict[int, dict[str, Any]] = {}
    for line in history:
        step = line.get(STEP)
        if isinstance(step, int):
            names = _metrics_among(tuple(line))
            values = [line[name] for name in names]
            if not _all_finite(values):
                values = [_number(value) for value in values]
            steps.setdefault(step, {"step": step}).update(zip(names, values, strict=True))
    return steps


@functools.lru_cache(maxsize=1024)
def _metrics_among(keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if not key.startswith(INTERNAL) and key != STEP]


def _all_finite(values: Sequence[Any]) -> bool:
    """Say whether all are finite numbers, as nearly always: a sum takes a third of the time of asking each."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _last_summary(parts: Sequence[WandbRun]) -> dict[str, Any]:
    """Return what the last file says in which the run recorded how it stands."""
    return next((part.summary for part in reversed(parts) if RECORDS in part.summary), {})


def records_of(run_id: str, config: dict[str, Any], summary: dict[str, Any]) -> Records:
    """Return what a run's folder would hold, from what W&B was told of it."""
    kept = summary.get(RECORDS, {})
    result = kept.get("result")
    if result is not None:
        others = ("status", RECORDS, STEP)
        metrics = {key: _number(value) for key, value in _own(summary).items() if key not in others}
        result = {**result, "metrics": metrics}
    return Records({"run_id": run_id, **_own(config)}, kept.get("environment"), kept.get("status"), result)


def _own(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(INTERNAL)}


def _number(value: Any) -> Any:
    """Return a metric as the run folder has it, where one that is not finite is missing."""
    missing = not math.isfinite(value) if isinstance(value, float) else value in NOT_FINITE
    return math.nan if missing else value
