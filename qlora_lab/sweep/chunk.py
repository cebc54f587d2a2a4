"""What a worker needs to know, in one file that is on disk before anything is submitted."""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.files import read_json, write_json
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.sweep.scheduler import Job
from qlora_lab.sweep.settle import is_given_up

ARRAY, POOL = "array", "pool"  # one run a task, or tasks that take runs until none is left
NONCE_LENGTH = 10  # hex digits
CLASS_LENGTH = 8


@dataclass(frozen=True)
class Chunk:
    """Runs that are submitted together.

    Attributes:
        folder: of everything that is submitted for a study; absolute, as are all paths here.
        nonce: tells this submission from every other.
        mode: ARRAY, or POOL.
        run_ids: in the order in which tasks and workers take them.
        attempts: at each run that had begun when it was submitted.
        tasks: of a pool.
        per_gpu: processes of each task of a pool, which share its GPU.
        limit_s: how long a task may run; None where nothing ends it.
        resources: what each task asks for; None where there is no scheduler to ask.
        generation: of the circuit breaker: one for all that one command submits.
        max_failures: first runs of a class that may fail alike before the others are held back.
        commit: of the code that planned the runs; None outside git.
        code_sha256: of its Python files; None where the workers start at once.
        canary: whether other runs wait for the end of its only one.
        plan_file: where the configurations of runs are that have no folder yet; None where all have one.
    """

    folder: Path
    runs_dir: Path
    nonce: str
    mode: str
    run_ids: list[str]
    attempts: list[int]
    tasks: int
    per_gpu: int
    limit_s: float | None
    resources: SlurmConfig | None
    generation: str
    max_failures: int
    commit: str | None
    code_sha256: str | None = None
    plan_file: str | None = None
    canary: bool = False

    @property
    def file(self) -> Path:
        return chunk_file(self.folder, self.nonce)

    @cached_property
    def resource_class(self) -> str:
        return resource_class(self.resources)

    def run(self, index: int) -> RunFolder:
        return RunFolder(self.runs_dir / self.run_ids[index])

    def is_open(self, index: int) -> bool:
        """Say whether a run is neither finished nor failed, nor out of tries, since it was submitted."""
        status = self.run(index).status()
        if status is None:
            return True
        failed = status["state"] == FAILED or is_given_up(status)
        failed_since = failed and status["attempt"] > self.attempts[index]
        return status["state"] != FINISHED and not failed_since

    def write(self) -> None:
        values = asdict(self) | {"folder": str(self.folder), "runs_dir": str(self.runs_dir)}
        write_json(self.file, values)

    @classmethod
    def read(cls, file: Path) -> "Chunk":
        """Read a chunk back.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        try:
            values: dict[str, Any] = read_json(file)
            resources = SlurmConfig(**values.pop("resources")) if values["resources"] else values.pop("resources")
            folder, runs_dir = Path(values.pop("folder")), Path(values.pop("runs_dir"))
            return cls(folder=folder, runs_dir=runs_dir, resources=resources, **values)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{file} cannot be read ({error}); start the study again, which submits its runs anew"
            ) from error


def new_nonce() -> str:
    return uuid.uuid4().hex[:NONCE_LENGTH]


def chunk_file(folder: Path, nonce: str) -> Path:
    return folder / "chunks" / f"{nonce}.json"


def resource_class(resources: SlurmConfig | None) -> str:
    """Return a short name for what runs ask of the cluster: those with the same one may share an array."""
    text = json.dumps(asdict(resources) if resources is not None else None, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:CLASS_LENGTH]


class QueuedRuns:
    """The runs that jobs wait for or execute; the file of each submission is read once, for any number of its jobs.

    Args:
        folder: of the plan; each submission left a file there, and names it in its jobs' comment.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {file.stem: file for file in folder.glob("*/chunks/*.json")}
        self._chunks: dict[str, tuple[str, list[str]]] = {}

    def of(self, job: Job) -> tuple[list[str], bool]:
        """Return the runs of a job, and whether it has one task for each; a pool takes any of its runs."""
        nonce = job.comment.rpartition(" ")[2]
        if nonce not in self._files:
            return [], False
        if nonce not in self._chunks:
            chunk = read_json(self._files[nonce])
            self._chunks[nonce] = chunk["mode"], chunk["run_ids"]
        mode, run_ids = self._chunks[nonce]
        if mode == POOL:
            return run_ids, False
        return [run_ids[task] for task in job.tasks or (0,)], True
