"""What is no part of a run itself: the question asked, where runs start, and where they are kept and seen."""

import math
from dataclasses import dataclass, field
from typing import Any

from qlora_lab.config.schema.checks import require, require_at_least, require_one_of

# Of python -m qlora_lab.sweep; all but the first two are about a study that was started.
SWEEP_ACTIONS = ("run", "plan", "status", "watch", "resume", "retry", "cancel", "hold", "release", "logs", "clean")


@dataclass
class TrackingConfig:
    mode: str = "offline"
    project: str = "qlora_lab"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout_s: int = 30
    finish_timeout_s: int = 60

    def __post_init__(self) -> None:
        require_one_of("tracking.mode", self.mode, ("offline", "online", "none"))
        require_at_least("tracking.init_timeout_s", self.init_timeout_s, 1)
        require_at_least("tracking.finish_timeout_s", self.finish_timeout_s, 1)


@dataclass
class SlurmConfig:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_run: int = 1
    cpus_per_run: int = 8
    memory_gb: int = 64
    time_limit_min: int = 240
    setup: list[str] = field(default_factory=list)  # shell lines before each run, such as `module load cuda`
    extra: dict[str, Any] = field(default_factory=dict)  # further sbatch options

    def __post_init__(self) -> None:
        require_at_least("launcher.slurm.gpus_per_run", self.gpus_per_run, 0)
        for key in ("cpus_per_run", "memory_gb", "time_limit_min"):
            require_at_least(f"launcher.slurm.{key}", getattr(self, key), 1)


@dataclass
class LauncherConfig:
    kind: str = "local"
    max_parallel: int | None = None  # runs at once; None: by GPUs, or cores and memory
    pool: bool = False  # tasks that take runs until none is left, rather than one task a run
    runs_per_gpu: int = 1  # that share one, in a pool
    gpu_memory_gb: float | None = None  # of one card, in GiB; None: what nvidia-smi says here, not known on SLURM
    shared_runs_dir: bool = False  # slurm: the nodes see paths.runs_dir, whatever its file system looks like
    wait: bool = False  # slurm: show progress until all runs ended, and submit again those that may be
    max_failures: int = 3  # first runs of a kind that may fail alike before the others are held back
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        require_one_of("launcher.kind", self.kind, ("in_process", "local", "pool", "slurm"))
        for key in ("max_parallel", "runs_per_gpu", "max_failures"):
            require_at_least(f"launcher.{key}", getattr(self, key), 1)
        require(
            self.gpu_memory_gb is None or 0 < self.gpu_memory_gb < math.inf,
            f"launcher.gpu_memory_gb must be the GiB of one card, such as 24 or 80; got {self.gpu_memory_gb}",
        )


@dataclass
class PathsConfig:
    runs_dir: str = "runs"
    cache_dir: str | None = None  # None: QLORA_LAB_CACHE, else the user's cache folder
    cache_bases: bool = True  # keep quantized base models there
    data_dir: str = "data"


@dataclass
class PaperConfig:
    """Which printed numbers of the original study stand beside a study's arms; see analysis/study/published.py."""

    file: str | None = None  # in sweeps/paper/; None: none do
    value: str = "value"  # the column of the numbers
    match: dict[str, str] = field(default_factory=dict)  # axis -> column
    names: dict[str, str] = field(default_factory=dict)  # value of an axis -> what the paper calls it
    where: dict[str, Any] = field(default_factory=dict)  # column -> value: other rows are left out; null: not asked
    beside: str | None = None  # column; each of its values stands in a column of its own

    def __post_init__(self) -> None:
        require(
            self.file is None or bool(self.match),
            "study.paper.match must name a column of the paper's table for an axis, such as {data: data}; got {}",
        )


@dataclass
class StudyConfig:
    """The question a study asks, and what its answer must be read with; no part of a run's identity."""

    name: str | None = None
    question: str | None = None
    compares: list[str] = field(default_factory=list)  # axes the question is about, taken as one; none: the first
    metric: str = "eval/loss"
    goal: str = "min"
    paper_found: str | None = None  # by the original study; shown with the plan and with the answer
    caution: str | None = None  # what a reader must not conclude; shown too
    pipeline_check: bool = False  # whether it only shows that everything runs: its answer is no conclusion
    zip: list[list[str]] = field(default_factory=list)  # axes that advance together, rather than being multiplied
    combinations: list[dict[str, Any]] = field(default_factory=list)  # listed ones, multiplied with the axes
    exclude: list[dict[str, Any]] = field(default_factory=list)  # combinations of axis values to leave out
    paper: PaperConfig = field(default_factory=PaperConfig)

    def __post_init__(self) -> None:
        require_one_of("study.goal", self.goal, ("min", "max"))
        require(
            self.name is None or (self.name.strip(". ") != "" and not set(self.name) & set("/\\")),
            f"study.name must be the name of a folder, without slashes; got '{self.name}'",
        )

    def remarks(self) -> list[str]:
        """Return what the answer must be read with, a sentence or more each."""
        check = "This is a check that everything runs; its numbers are no conclusion." if self.pipeline_check else None
        found = f"The original study found: {self.paper_found}" if self.paper_found else None
        return [remark for remark in (check, found, self.caution) if remark]


@dataclass
class SweepConfig:
    action: str = "run"
    retry_failed: bool = True  # as often as the rules of their causes allow; action=retry goes beyond them
    json: bool = False  # plan, status and the like for programs
    run: str | None = None  # logs: the first digits of a run's id
    cause: str | None = None  # retry: only runs that failed for this cause

    def __post_init__(self) -> None:
        require_one_of("sweep.action", self.action, SWEEP_ACTIONS)
