"""What the runs that are left will take: time, by runs of the same shape that have finished; disk and inodes."""

import os
import shutil
import stat
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.folder import FINISHED, RUNNING
from qlora_lab.sweep.arithmetic import training_operations
from qlora_lab.sweep.plan import Plan, PlannedRun
from qlora_lab.sweep.plan_file import read_plan_file
from qlora_lab.sweep.states import RunState, read_states

EARLIER_PLANS = 3  # that are looked through for runs of the same shape
MEASURED_FOLDERS = 3  # of finished runs of a kind, that are looked through
NO_FIXED_NUMBER = 0  # of inodes, as statvfs says it
TERA = 1e12
EXAMPLE_RATE = 100 * TERA  # operations a second, in which a bound on operations is also said as hours
MEASURED, PREDICTED = "finished runs", "their configurations"

# What a run's folder holds when no run can be looked at. Inodes: the folder with config.yaml, environment.json,
# status.json, metrics.jsonl and result.json; a folder with a file each for rows and generations; the adapter's folder
# with weights and configuration; the folder of checkpoints, and five files in a folder for each; those of W&B.
RECORDS_INODES, EVALUATION_INODES, ADAPTER_INODES, CHECKPOINT_INODES, WANDB_INODES = 6, 4, 3, 6, 13
RECORDS_BYTES, WANDB_BYTES = 60_000, 70_000  # in blocks of 4 KiB
STEP_BYTES = 300  # of metrics.jsonl
ROW_BYTES = 500  # of what is written of an evaluated row
STATES_BYTES = 32_000  # of a checkpoint, besides weights and optimizer

Shape = tuple[object, ...]
Sizes = tuple[int, int]  # bytes, inodes


@dataclass(frozen=True)
class Forecast:
    """What the runs that are left will take.

    Attributes:
        runs: that are left and not running.
        known: of them, those of whose shape a run has finished; hours are only theirs.
        hours: that those will take in all, one after the other, on the GPU or on the CPU.
        operations: floating-point ones that training the others takes at most; None where that is not known.
        on_gpu: whether any of them runs on one.
        disk_bytes, inodes: that all of them will leave; None where no run has finished and they cannot be predicted.
        disk_by: what they are judged by, MEASURED (of some at least) or PREDICTED.
        free_bytes, free_inodes: of the file system of the runs; inodes None where it has no fixed number.
    """

    runs: int
    known: int
    hours: float
    operations: float | None
    on_gpu: bool
    disk_bytes: int | None
    inodes: int | None
    disk_by: str
    free_bytes: int
    free_inodes: int | None

    @property
    def is_short(self) -> bool:
        """Say whether the file system has less room than the runs will take."""
        too_few = self.free_inodes is not None and (self.inodes or 0) > self.free_inodes
        return (self.disk_bytes or 0) > self.free_bytes or too_few

    def text(self) -> str:
        """Return the forecast for a person."""
        unit = "GPU-hours" if self.on_gpu else "hours of CPU runs"
        if not self.known:
            time = f"{unit}: not known before a run of the same shape has finished{self._bound()}"
        else:
            rest = f" for {self.known:,} of the {self.runs:,} runs" if self.known < self.runs else ""
            time = f"{unit}: about {self.hours:,.2f}{rest}, as finished runs of the same shape took{self._bound()}"
        if self.disk_bytes is None or self.inodes is None:
            return f"{time}\ndisk: not known before a run has finished; {_size(self.free_bytes)} free"
        free = f"{_size(self.free_bytes)} free"
        if self.free_inodes is not None:
            free += f" and {self.free_inodes:,} inodes"
        disk = f"disk: about {_size(self.disk_bytes)} and {self.inodes:,} inodes, judged by {self.disk_by}; {free}"
        return f"{time}\n{disk}" + ("; THAT IS NOT ENOUGH: free some, or set paths.runs_dir" if self.is_short else "")

    def _bound(self) -> str:
        """Say what bounds the time of runs that none has been like."""
        if not self.operations or not self.on_gpu:
            return ""
        hours = self.operations / EXAMPLE_RATE / 3600
        which = "the runs" if not self.known else "the others"
        return (
            f";\n  training {which} takes at most {self.operations:.2g} floating-point operations with the longest "
            f"rows:\n  {hours:,.1f} GPU-hours on GPUs that sustain {EXAMPLE_RATE / TERA:.0f} TFLOP/s, an example "
            "and no measurement; evaluation comes on top"
        )


def forecast(plan: Plan, runs: Sequence[PlannedRun]) -> Forecast:
    """Judge what runs of a plan will take by those that have finished, of it and of the newest plans beside it."""
    finished = [(run.run_id, run.config, run.status) for run in plan.runs if run.state == FINISHED and run.status]
    shapes = [_shape(run.config) for run in runs]
    times = _times(finished)
    for file in _newest_plans(plan):
        if all(shape in times for shape in shapes):
            break
        try:
            rows = read_plan_file(file).rows
        except RunFolderError:
            continue  # of older code, or damaged: another study's, which this one can do without
        states = read_states(plan.runs_dir, (run_id for run_id, _, _ in rows))
        beside = [(run_id, config, states[run_id]) for run_id, _, config in rows if states[run_id].state == FINISHED]
        times = _times(beside) | times
        finished += beside
    medians = {shape: statistics.median(each) for shape, each in times.items()}
    known = [medians[shape] for shape in shapes if shape in medians]
    others = [training_operations(run.config) for run, shape in zip(runs, shapes, strict=True) if shape not in medians]
    weights = {_weight(run.config) for run in runs}
    measured = _measured_sizes(plan.runs_dir, [each for each in finished if _weight(each[1]) in weights])
    disk = _disk(runs, measured)
    there = next(path for path in (plan.runs_dir.resolve(), *plan.runs_dir.resolve().parents) if path.exists())
    system = os.statvfs(there)
    return Forecast(
        runs=len(runs),
        known=len(known),
        hours=sum(known) / 3600,
        operations=None if None in others else sum(each for each in others if each is not None),
        on_gpu=any(run.config.trainer.device == "cuda" for run in runs),
        disk_bytes=disk[0] if disk is not None else None,
        inodes=disk[1] if disk is not None else None,
        disk_by=MEASURED if measured else PREDICTED,
        free_bytes=shutil.disk_usage(there).free,
        free_inodes=system.f_favail if system.f_files != NO_FIXED_NUMBER else None,
    )


def waiting(plan: Plan, *, retry_failed: bool) -> list[PlannedRun]:
    """Return the runs that the plan would start: what is to be done and not running already."""
    given = {"retry_failed": retry_failed, "beyond_rules": plan.beyond_rules}
    states = [run.status or RunState(run.state, {}) for run in plan.runs]
    return [
        run for run, state in zip(plan.runs, states, strict=True) if state.state != RUNNING and state.is_due(**given)
    ]


def _times(finished: Iterable[tuple[str, RunConfig, RunState]]) -> dict[Shape, list[float]]:
    """Return the seconds that finished runs took, by shape."""
    times: dict[Shape, list[float]] = {}
    for _, config, status in finished:
        times.setdefault(_shape(config), []).append(status.elapsed_s)
    return times


def _newest_plans(plan: Plan) -> list[Path]:
    files = (plan.runs_dir / "studies").glob("*/*/plan-*.json")
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:EARLIER_PLANS]


def _shape(config: RunConfig) -> Shape:
    """Return what decides how long a run takes, as far as a configuration tells."""
    trainer, data = config.trainer, config.data
    return (
        *(config.model.name, config.quant.format, config.adapter.kind, config.adapter.placement),
        *(trainer.device, trainer.batch_size, trainer.max_steps, trainer.max_train_tokens, trainer.compute_dtype),
        *(data.max_source_tokens, data.max_target_tokens, config.evaluation.rows, config.evaluation.max_new_tokens),
        *(trainer.gradient_checkpointing, config.quant.double_quant),
        *sorted([*config.evaluation.benchmarks, *config.evaluation.prompts]),
    )


def _measured_sizes(runs_dir: Path, finished: Iterable[tuple[str, RunConfig, RunState]]) -> dict[Shape, Sizes]:
    """Return what the folders of finished runs take, by what decides that."""
    folders: dict[Shape, list[Path]] = {}
    for run_id, config, _ in finished:
        folders.setdefault(_weight(config), []).append(runs_dir / run_id)
    sizes = {weight: [_size_of(folder) for folder in some[-MEASURED_FOLDERS:]] for weight, some in folders.items()}
    return {
        weight: (round(statistics.mean(size for size, _ in each)), round(statistics.mean(count for _, count in each)))
        for weight, each in sizes.items()
    }


def _disk(runs: Sequence[PlannedRun], measured: dict[Shape, Sizes]) -> Sizes | None:
    """Return the bytes and inodes that runs will leave: by finished ones, else by what a folder is known to hold."""
    sizes = [measured.get(_weight(run.config)) or _predicted_size(run) for run in runs]
    known = [size for size in sizes if size is not None]
    return (sum(size for size, _ in known), sum(inodes for _, inodes in known)) if len(known) == len(sizes) else None


def _weight(config: RunConfig) -> Shape:
    """Return what decides how much a run leaves on the disk."""
    return (*_shape(config), config.adapter.rank, config.optim.name, config.tracking.mode)


def _predicted_size(run: PlannedRun) -> Sizes | None:
    """Return what a run's folder will take; None where the size of its adapter is not predicted."""
    plan = run.need.prediction.plan if run.need is not None else None
    if plan is None:
        return None
    trainer = run.config.trainer
    steps = trainer.max_steps or 0
    checkpoints = min(trainer.keep_checkpoints, -(-steps // trainer.checkpoint_every_steps))
    rows = run.config.evaluation.rows * max(1, len(run.config.evaluation.sets))
    size = RECORDS_BYTES + steps * STEP_BYTES + rows * ROW_BYTES
    size += plan.adapters + checkpoints * (plan.adapters + plan.optimizer + STATES_BYTES)
    inodes = RECORDS_INODES + EVALUATION_INODES + ADAPTER_INODES
    inodes += 1 + checkpoints * CHECKPOINT_INODES if checkpoints else 0
    if run.config.tracking.mode != "none":
        size, inodes = size + WANDB_BYTES, inodes + WANDB_INODES
    return size, inodes


def _size_of(folder: Path) -> Sizes:
    """Return the bytes on disk and the inodes of a run's folder, itself included; not of files that runs share."""
    entries: Iterable[Path] = [folder, *folder.rglob("*")]
    found = [each for each in (path.lstat() for path in entries) if stat.S_ISDIR(each.st_mode) or each.st_nlink == 1]
    return sum(each.st_blocks * 512 for each in found), len(found)


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
