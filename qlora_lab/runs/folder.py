"""The run folder: the truth about one run, on disk.

runs/RUN_ID/  config.yaml  environment.json  status.json  metrics.jsonl  result.json
              data/removed.jsonl  evaluation/rows.jsonl  evaluation/benchmarks/NAME.jsonl
              generations/held_out.jsonl  checkpoints/  adapter/
              evaluations/NAME-HASH/ (of finished runs; see `runs.evaluations`)
"""

import contextlib
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.attempt import now, this_process
from qlora_lab.runs.causes import CODE, GPU_MEMORY, HOST_MEMORY, INFRASTRUCTURE, NO_SPACE, cause_of
from qlora_lab.runs.config_text import config_text
from qlora_lab.runs.files import (
    link_or_copy,
    read_json,
    whole_lines,
    write_atomic,
    write_json,
    write_json_lines,
)
from qlora_lab.runs.heartbeat import Observer
from qlora_lab.runs.lease import POLL_S, Claim, Lease
from qlora_lab.runs.mirror import RECORDS

FINISHED, RUNNING, FAILED, INTERRUPTED, NEW = "finished", "running", "failed", "interrupted", "new"

OBSERVER = Observer()  # of this process, which has to see a heartbeat elsewhere once
KEPT_ATTEMPTS = 100  # of the earlier ones, in status.json
# Failures that another micro-batch may prevent; a lack of memory may bear the name of any error.
OF_THE_MICRO_BATCH = (GPU_MEMORY, HOST_MEMORY, CODE)


class RunFolder:
    """Paths and files of one run; each is written whole but metrics.jsonl, which grows by lines.

    Inside `lock`, or with a `lease` of `claim`, everything that is written is refused once a later attempt has the run.
    """

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        self.path = path
        self.lease = lease
        self.run_id = path.name
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"

    @classmethod
    def create(cls, runs_dir: Path, run_id: str, config: RunConfig) -> "RunFolder":
        """Return the folder of `run_id`, writing its configuration unless it is finished, or being executed.

        What is no part of a run's identity, such as where its data lie, may differ from attempt to attempt. Only the
        threads stay, and the micro-batch, unless the run failed for want of memory or in the code: with others it would
        not end with the same bits.
        """
        folder = cls(runs_dir / run_id)
        status = folder.status()
        if (status is None or status["state"] != FINISHED) and not folder.is_held():
            values = {"run_id": run_id, **asdict(config)}
            if status is not None:
                from qlora_lab.runs.config_file import trainer_values

                anew = status["state"] == FAILED and status.get("cause") in OF_THE_MICRO_BATCH
                kept = ("threads",) if anew else ("threads", "micro_batch_size")
                values["trainer"] |= trainer_values(folder.config_file, kept)
            write_atomic(folder.config_file, config_text(values))
        return folder

    def config(self) -> RunConfig:
        """Read the resolved configuration.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        from qlora_lab.runs.config_file import read_config  # OmegaConf comes in here

        return read_config(self.config_file, self.run_id)

    def state(self) -> str:
        """Return new, running, finished, failed or interrupted; a run whose process died is interrupted."""
        return states_of([self])[0]

    def status(self) -> dict[str, Any] | None:
        """Return what is recorded of the run, None where no attempt has begun.

        Raises:
            RunFolderError: the file is damaged.
        """
        file = self.path / "status.json"
        try:
            return read_json(file) if file.exists() else None
        except ValueError as error:
            raise damaged_status(file, error) from error

    def attempts(self) -> int:
        """Return how many attempts at the run have begun."""
        return int((self.status() or {}).get("attempt", 0))

    def begin(self, **elsewhere: str | None) -> None:
        """Record that an attempt at the run starts now, in this process, and keep what became of the one before.

        Args:
            elsewhere: job, node and log of an attempt that could not record this itself.
        """
        if self.lease is not None:
            self.lease.keep_reserve()
        before = self.status()
        history = [] if before is None else [*before.get("history", []), _summary(before)]
        here = this_process()
        self._write_status(
            state=RUNNING,
            started_at=now(),
            ended_at=None,
            **(here if not elsewhere else dict.fromkeys(here) | elsewhere),
            attempt=self.lease.attempt if self.lease is not None else 1 + self.attempts(),
            elapsed_s=self.elapsed_s(),
            cause=None,
            error=None,
            history=history[-KEPT_ATTEMPTS:],
        )

    def elapsed_s(self) -> float:
        """Return the seconds that all attempts so far took; of a killed one, those until its last line of metrics."""
        recorded = (self.status() or {}).get("elapsed_s", 0.0)
        return max(recorded, (self.last_metrics() or {}).get("time_s", 0.0))

    def end(
        self, state: str, elapsed_s: float, error: BaseException | None = None, *, cause: str | None = None
    ) -> None:
        """Record how the attempt ended, the seconds over all attempts, and the traceback of what ended it.

        Args:
            cause: one of `runs.causes`, where more is known than the error says.
        """
        status = self.status() or {}
        details = None
        if error is not None:
            trace = "".join(traceback.format_exception(error))
            details = {"type": type(error).__name__, "message": str(error), "traceback": trace}
            cause = cause or cause_of(error)
        ended = {"state": state, "ended_at": now(), "elapsed_s": elapsed_s, "cause": cause, "error": details}
        self._write_status(**{**status, **ended, "step": (self.last_metrics() or {}).get("step")})

    def _write_status(self, **status: Any) -> None:
        """Write status.json, on a full disk with the space that was kept for it."""
        file = self.path / "status.json"
        try:
            write_json(file, status, self.lease)
        except OSError as error:
            if self.lease is None or error.errno not in NO_SPACE:
                raise
            self.lease.give_up_reserve()
            write_json(file, status, self.lease)

    def write_environment(self, environment: dict[str, Any]) -> None:
        write_json(self.path / "environment.json", environment, self.lease)

    def environment(self) -> dict[str, Any] | None:
        file = self.path / "environment.json"
        return read_json(file) if file.exists() else None

    def write_evaluation(self, rows: list[dict[str, Any]], generations: list[dict[str, Any]]) -> None:
        write_json_lines(self.path / "evaluation" / "rows.jsonl", rows, self.lease)
        write_json_lines(self.path / "generations" / "held_out.jsonl", generations, self.lease)

    def write_benchmarks(self, items: Mapping[str, list[dict[str, Any]]]) -> None:
        """Write what was found out about every item of each benchmark."""
        for name, records in items.items():
            write_json_lines(self.path / "evaluation" / "benchmarks" / f"{name}.jsonl", records, self.lease)

    def keep_removed_rows(self, file: Path) -> None:
        """Keep the list of removed rows, which all runs of a data set have in common, as one file on the disk."""
        link_or_copy(file, self.path / "data" / "removed.jsonl", self.lease)

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / "result.json", result, self.lease)

    def result(self) -> dict[str, Any]:
        return read_json(self.path / "result.json")

    def summary(self) -> dict[str, Any]:
        """Return how the run stands, for its mirror: metrics by name, and below RECORDS what else its files say."""
        result = self.result() if (self.path / "result.json").exists() else {}
        metrics = result.pop("metrics", {})
        records = {"environment": self.environment(), "status": self.status(), "result": result or None}
        return {**metrics, RECORDS: records}

    def last_metrics(self) -> dict[str, Any] | None:
        """Return the newest whole line of metrics.jsonl, for showing progress."""
        lines = self._metrics_lines()
        return json.loads(lines[-1]) if lines else None

    def has_metric(self, step: int, name: str) -> bool:
        """Say whether metrics.jsonl has a metric of a step, from this attempt or one before."""
        for line in self._metrics_lines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed attempt
                record = json.loads(line)
                if record["step"] == step and name in record:
                    return True
        return False

    def _metrics_lines(self) -> list[bytes]:
        """Return the whole lines of metrics.jsonl; a killed run may have left half of one."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        return whole_lines(file)[0]

    def is_held(self) -> bool:
        """Say whether a living process, on any machine, holds the run; of many runs, ask `held`."""
        return self in held([self])

    def claim(self) -> Claim:
        """Return what tries for the run's lease."""
        return Claim(self.path, last_attempt=self.attempts)

    @contextmanager
    def lock(self, *, poll_s: float = POLL_S, log: Any = print) -> Iterator[Lease]:
        """Hold the run, waiting while another process executes it; who dies or falls silent loses it."""
        told = f"run {self.run_id} is being executed by another process; waiting for it"
        lease = self.claim().wait(told, poll_s=poll_s, log=log)
        with self.holding(lease):
            yield lease

    @contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """Write under `lease` inside the block, and release it."""
        self.lease = lease
        try:
            yield
        finally:
            self.lease = None
            lease.release()


def held(folders: Iterable[RunFolder]) -> set[RunFolder]:
    """Return the runs that living processes hold, on any machine, after one wait for the heartbeats of all."""
    asked = list(folders)
    own = {folder for folder in asked if folder.lease is not None and folder.lease.is_held()}
    by_path = {folder.path: folder for folder in asked if folder not in own}
    return own | {by_path[path] for path in OBSERVER.living(by_path)}


def states_of(folders: Sequence[RunFolder]) -> list[str]:
    """Return the state of each run, as `RunFolder.state` does, after one wait for the heartbeats of all."""
    states = [str((folder.status() or {"state": NEW})["state"]) for folder in folders]
    running = [folder for folder, state in zip(folders, states, strict=True) if state == RUNNING]
    gone = set(running) - held(running)
    return [_state_now(folder) if folder in gone else state for folder, state in zip(folders, states, strict=True)]


def _state_now(folder: RunFolder) -> str:
    """Return the state of a run that nobody holds: it may have ended since it was seen to run."""
    state = str((folder.status() or {"state": NEW})["state"])
    return INTERRUPTED if state == RUNNING else state


def _summary(status: dict[str, Any]) -> dict[str, Any]:
    """Return what a run keeps of an attempt that is over; one that ended without a word still says that it runs."""
    kept = ("attempt", "state", "cause", "started_at", "ended_at", "elapsed_s", "step", "host", "node", "job")
    summary = {key: status.get(key) for key in kept} | {"error": (status.get("error") or {}).get("message")}
    if status["state"] == RUNNING:
        summary["cause"] = INFRASTRUCTURE
    return summary


def damaged_status(file: Path, error: ValueError) -> RunFolderError:
    return RunFolderError(f"{file} is damaged ({error}); remove it, and the run goes on from its checkpoint")
