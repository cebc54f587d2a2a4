"""The plan of a study: every run with its id, its place on the axes, and what is already done."""

import errno
import hashlib
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lab.config import hardware
from qlora_lab.config.architecture import check_task, linear_layers
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.placement import match_linears
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, ModelError, unknown_name
from qlora_lab.runs.files import write_json
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder, now
from qlora_lab.runs.identity import of_the_result, run_id
from qlora_lab.sweep.dotted import flatten
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.metric_names import check_metric
from qlora_lab.wheels import WHEELS, default_cache_dir, wheel_file

Point = dict[str, str]
PLAN_ID_LENGTH = 8  # hex digits


@dataclass(frozen=True)
class PlannedRun:
    run_id: str
    axes: Point
    config: RunConfig
    state: str  # when it was planned

    def folder(self, runs_dir: Path) -> RunFolder:
        return RunFolder(runs_dir / self.run_id)


@dataclass(frozen=True)
class Plan:
    name: str
    runs_dir: Path
    runs: list[PlannedRun]
    repeated: int  # points that another point already stands for

    @property
    def folder(self) -> Path:
        """One for each distinct plan, so that a narrowed study leaves the whole one's report alone."""
        study = self.runs[0].config.study
        told_apart = [sorted(run.run_id for run in self.runs), study.question, study.metric, study.goal]
        digest = hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()[:PLAN_ID_LENGTH]
        return self.runs_dir / "studies" / self.name / digest

    @property
    def axis_names(self) -> list[str]:
        return list(self.runs[0].axes)

    def to_do(self, *, retry_failed: bool) -> list[PlannedRun]:
        """Return the runs that are not finished, failed ones only when they are to be tried again."""
        done = {FINISHED} if retry_failed else {FINISHED, FAILED}
        return [run for run in self.runs if run.folder(self.runs_dir).state() not in done]

    def states(self) -> dict[str, str]:
        return {run.run_id: run.folder(self.runs_dir).state() for run in self.runs}

    def text(self) -> str:
        """Return the plan as a table for a terminal; of many runs the first ones."""
        header = [*self.axis_names, "run", "state"]
        rows = [[*run.axes.values(), run.run_id, run.state] for run in self.runs]
        widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        counts = {
            state: sum(run.state == state for run in self.runs) for state in dict.fromkeys(r.state for r in self.runs)
        }
        summary = ", ".join(f"{count} {state}" for state, count in counts.items())
        question = self.runs[0].config.study.question
        lines = [lines[0], *listed(lines[1:], what="more runs")]
        title = f"study {self.name}" + (f": {question}" if question else "")
        repeated = f"; {self.repeated} repeated combinations left out" if self.repeated else ""
        return "\n".join([title, *lines, f"{len(self.runs)} runs: {summary}{repeated}"])

    def write(self) -> dict[str, Any]:
        """Create every run's folder, write plan.json into the plan's folder, and return what it holds.

        Raises:
            ConfigError: paths.runs_dir cannot be written.
        """
        check_runs_dir(self.runs_dir)
        for run in self.runs:
            RunFolder.create(self.runs_dir, run.run_id, run.config)
        study = self.runs[0].config.study
        record = {
            "study": {"name": self.name, "question": study.question, "metric": study.metric, "goal": study.goal},
            "axes": self.axis_names,
            "fixed": self.fixed(),
            "runs": [{"run_id": run.run_id, "axes": run.axes, "status_at_plan": run.state} for run in self.runs],
            "created_at": now(),
            "command": " ".join(["python -m qlora_lab.sweep", *sys.argv[1:]]),
        }
        write_json(self.folder / "plan.json", record)
        return record

    def fixed(self) -> dict[str, Any]:
        """Return the configuration values, dotted, that all runs share."""
        flats = [flatten(of_the_result(run.config)) for run in self.runs]
        return {
            key: value for key, value in flats[0].items() if all(key in flat and flat[key] == value for flat in flats)
        }


def check_runs_dir(runs_dir: Path) -> None:
    """Make the folder of all runs where it is missing.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(runs_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"paths.runs_dir must be a folder that can be written; got '{runs_dir}' ({error.strerror}); "
            "try paths.runs_dir=runs"
        ) from error


def make_plan(name: str, runs: list[tuple[Point, RunConfig]]) -> Plan:
    """Resolve and check every run, and look up what is already done.

    Raises:
        ConfigError: a run that cannot work, such as an adapter that matches no layer of its model, or a metric to
            decide by that no run will report.
    """
    machine = hardware.detect()
    runs_dir = Path(runs[0][1].paths.runs_dir)
    planned: dict[str, PlannedRun] = {}
    for point, composed in runs:
        config = prepare(composed, machine)
        identifier = run_id(config)
        state = RunFolder(runs_dir / identifier).state()
        planned.setdefault(identifier, PlannedRun(identifier, point, config, state))
    check_metric(run.config for run in planned.values())
    return Plan(name, runs_dir, list(planned.values()), repeated=len(runs) - len(planned))


def prepare(config: RunConfig, machine: hardware.Hardware) -> RunConfig:
    """Resolve what is left open and check what needs no weights, before anything is loaded.

    Raises:
        ConfigError: the adapter matches no layer.
        ModelError, DataError: the model or the data are not on this machine.
    """
    data_dir = Path(config.paths.data_dir)
    resolved = resolve(config, machine, lambda source: source_fingerprint(source, data_dir))
    if resolved.trainer.threads is None:
        resolved = replace(resolved, trainer=replace(resolved.trainer, threads=threads_of_a_run(config, machine)))
    _check_device(resolved, machine)
    _check_placement(resolved)
    _check_inputs(resolved)
    return resolved


def threads_of_a_run(config: RunConfig, machine: hardware.Hardware) -> int:
    """Return a run's share of the cores: on SLURM those it asks for, not those of the machine that plans."""
    if config.launcher.kind == "slurm":
        return config.launcher.slurm.cpus_per_run
    return max(1, machine.cores // parallel_runs(config, machine))


def parallel_runs(config: RunConfig, machine: hardware.Hardware) -> int:
    """Return how many runs share this machine: one a GPU, else one a core, or as the launcher says."""
    launcher = config.launcher
    if launcher.kind == "in_process":
        return 1
    return launcher.max_parallel or len(machine.gpus) or machine.cores


def _check_device(config: RunConfig, machine: hardware.Hardware) -> None:
    if config.trainer.device == "cuda" and config.launcher.kind != "slurm" and not machine.gpus:
        raise ConfigError(
            "trainer.device must be cpu or auto, since this process sees no GPU; got 'cuda'; "
            "plan it where one is, or with launcher=slurm"
        )


def _check_placement(config: RunConfig) -> None:
    """Refuse an adapter that matches no layer, where the model's layers are known without loading it."""
    architecture, adapter = config.model.architecture, config.adapter
    if architecture is not None and config.model.source == "random" and architecture.model_type not in FAMILIES:
        raise ConfigError(unknown_name("model.architecture.model_type", architecture.model_type, FAMILIES))
    check_task(config.model)
    layers = linear_layers(architecture) if architecture is not None else None
    if layers is not None and adapter.kind == "lora":
        match_linears([name for name, _, _ in layers], adapter.placement, adapter.target_regex, adapter.last_k_layers)


def _check_inputs(config: RunConfig) -> None:
    """Refuse a run whose model or data are not on this machine, in the plan rather than in every run.

    Hub ids are left to the run: nodes may reach a hub that this machine does not. A wheel is hashed once, however
    many runs name it.
    """
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    model = config.model
    if model.source == "wheel":
        _check_wheel("model.wheel", model.wheel or "", cache_dir, of_a_model=True)
    elif model.source in ("folder", "gguf") and not Path(model.path or "").exists():
        raise ModelError(f"model.path does not exist: {model.path}; give the path of a {model.source}")
    sets = {f"evaluation.sets.{name}": source for name, source in config.evaluation.sets.items()}
    for place, source in {"data.source": config.data.source, **sets}.items():
        if source.kind == "wheel":
            _check_wheel(f"{place}.wheel", source.wheel or "", cache_dir, of_a_model=False)


def _check_wheel(key: str, name: str, cache_dir: Path, *, of_a_model: bool) -> None:
    """Refuse a wheel that is none, or holds something else, or is not in the cache."""
    allowed = [known for known, wheel in WHEELS.items() if (wheel.gguf is not None) == of_a_model]
    if name not in allowed:
        raise ConfigError(unknown_name(key, name, allowed))
    wheel_file(name, cache_dir)
