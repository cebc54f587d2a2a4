"""What the runs that are left will take, judged by runs of the same shape that have finished: time, disk, inodes."""

import os
import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.config.schema import LauncherConfig, RunConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.folder import FAILED, FINISHED, RUNNING
from qlora_lab.sweep.plan import Plan, PlannedRun, planned
from qlora_lab.sweep.plan_file import read_plan_file
from qlora_lab.sweep.status import duration

EARLIER_PLANS = 3  # that are looked through for runs of the same shape
MEASURED_FOLDERS = 5  # finished runs whose folders are looked through
NO_FIXED_NUMBER = 0  # of inodes, as statvfs says it


@dataclass(frozen=True)
class Forecast:
    """What the runs that are left will take.

    Attributes:
        runs: that are left and not running.
        known: of them, those of whose shape a run has finished; hours are only theirs.
        hours: that those will take in all, one after the other, on the GPU or on the CPU.
        on_gpu: whether any of them runs on one.
        disk_bytes, inodes: that all of them will leave; None before any run has finished.
        free_bytes, free_inodes: of the file system of the runs; inodes None where it has no fixed number.
    """

    runs: int
    known: int
    hours: float
    on_gpu: bool
    disk_bytes: int | None
    inodes: int | None
    free_bytes: int
    free_inodes: int | None

    def text(self) -> str:
        """Return the forecast for a person."""
        unit = "GPU-hours" if self.on_gpu else "hours of CPU runs"
        if not self.known:
            time = f"{unit}: not known before a run of the same shape has finished"
        else:
            rest = f" for {self.known:,} of the {self.runs:,} runs" if self.known < self.runs else ""
            time = f"{unit}: about {self.hours:,.2f}{rest}, as finished runs of the same shape took"
        if self.disk_bytes is None or self.inodes is None:
            return f"{time}\ndisk: not known before a run has finished; {_size(self.free_bytes)} free"
        free = f"{_size(self.free_bytes)} free"
        if self.free_inodes is not None:
            free += f" and {self.free_inodes:,} inodes"
        disk = f"disk: about {_size(self.disk_bytes)} and {self.inodes:,} inodes; {free}"
        short = self.disk_bytes > self.free_bytes or (self.free_inodes is not None and self.inodes > self.free_inodes)
        return f"{time}\n{disk}" + ("; THAT IS NOT ENOUGH: free some, or set paths.runs_dir" if short else "")


def forecast(plan: Plan, runs: Sequence[PlannedRun]) -> Forecast:
    """Judge what runs of a plan will take by those that have finished, of it and of the newest plans beside it."""
    finished = [run for run in plan.runs if run.state == FINISHED]
    shapes = [_shape(run.config) for run in runs]
    times = _times(finished)
    for file in _newest_plans(plan):
        if all(shape in times for shape in shapes):
            break
        try:
            record = read_plan_file(file)
        except RunFolderError:
            continue  # of older code, or damaged: another study's, which this one can do without
        beside = [run for run in planned(record.study, record.rows).runs if run.state == FINISHED]
        times = _times(beside) | times
        finished = finished or beside
    medians = {shape: statistics.median(each) for shape, each in times.items()}
    known = [medians[shape] for shape in shapes if shape in medians]
    sizes = [_size_of(run.folder(plan.runs_dir).path) for run in finished[-MEASURED_FOLDERS:]]
    there = next(path for path in (plan.runs_dir.resolve(), *plan.runs_dir.resolve().parents) if path.exists())
    system = os.statvfs(there)
    return Forecast(
        runs=len(runs),
        known=len(known),
        hours=sum(known) / 3600,
        on_gpu=any(run.config.trainer.device == "cuda" for run in runs),
        disk_bytes=round(statistics.mean(size for size, _ in sizes) * len(runs)) if sizes else None,
        inodes=round(statistics.mean(inodes for _, inodes in sizes) * len(runs)) if sizes else None,
        free_bytes=shutil.disk_usage(there).free,
        free_inodes=system.f_favail if system.f_files != NO_FIXED_NUMBER else None,
    )


def to_submit(runs: Sequence[PlannedRun], launcher: LauncherConfig) -> str:
    """Say what would be started, and where."""
    if not runs:
        return "nothing is left to execute"
    count = f"would execute {len(runs):,} run{'s' if len(runs) > 1 else ''}"
    if launcher.kind != "slurm":
        where = {"in_process": "one after the other in this process"}.get(launcher.kind, "on this machine")
        at_once = f", {launcher.max_parallel} at a time" if launcher.max_parallel else ""
        return f"{count} {where}{at_once}"
    slurm = launcher.slurm
    limit = duration(60 * slurm.time_limit_min)
    needs = f"{slurm.gpus_per_run} GPU, {slurm.cpus_per_run} CPUs, {slurm.memory_gb} GB, {limit} each"
    at_once = f", at most {launcher.max_parallel} at a time" if launcher.max_parallel else ""
    return f"{count} on SLURM (partition {slurm.partition or 'default'}; {needs}){at_once}"


def waiting(plan: Plan, *, retry_failed: bool) -> list[PlannedRun]:
    """Return the runs that the plan would start: what is to be done and not running already."""
    over = {FINISHED, RUNNING} if retry_failed else {FINISHED, RUNNING, FAILED}
    return [run for run in plan.runs if run.state not in over]


def _times(finished: Iterable[PlannedRun]) -> dict[tuple[object, ...], list[float]]:
    """Return the seconds that finished runs took, by shape."""
    times: dict[tuple[object, ...], list[float]] = {}
    for run in finished:
        if run.status is not None:
            times.setdefault(_shape(run.config), []).append(run.status.elapsed_s)
    return times


def _newest_plans(plan: Plan) -> list[Path]:
    files = (plan.runs_dir / "studies").glob("*/*/plan-*.json")
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:EARLIER_PLANS]


def _shape(config: RunConfig) -> tuple[object, ...]:
    """Return what decides how long a run takes, as far as a configuration tells."""
    trainer, data = config.trainer, config.data
    return (
        *(config.model.name, config.quant.format, config.adapter.kind, config.adapter.placement),
        *(trainer.device, trainer.batch_size, trainer.max_steps, trainer.max_train_tokens, trainer.compute_dtype),
        *(data.max_source_tokens, data.max_target_tokens, config.evaluation.rows, config.evaluation.max_new_tokens),
    )


def _size_of(folder: Path) -> tuple[int, int]:
    """Return the bytes on disk and the inodes of a run's folder, itself included."""
    entries: Iterable[Path] = [folder, *folder.rglob("*")]
    found = [path.lstat() for path in entries]
    return sum(each.st_blocks * 512 for each in found), len(found)


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
