"""python -m qlora_lab.evaluate run=ID evaluation=vicuna: benchmarks and prompts on finished runs, and on adapters."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qlora_lab.config import hardware
from qlora_lab.config.command import command
from qlora_lab.config.exit_status import FAILED
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.schema import BASE, EvaluateConfig
from qlora_lab.errors import ConfigError, QloraLabError, RunFolderError
from qlora_lab.evaluation.candidates import Candidate, adapted, alone, asked_base, base_of, trained
from qlora_lab.runs.attempt import now
from qlora_lab.runs.evaluations import EvaluationFolder
from qlora_lab.runs.find import check_finished, find_run
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.heap import restart_with_heap_settings
from qlora_lab.sweep.status import find_study
from qlora_lab.wheels import default_cache_dir

if TYPE_CHECKING:  # torch: only once there is something to evaluate
    from qlora_lab.evaluation.tasks import Task


def evaluate(node: DictConfig) -> None:
    """Evaluate what the configuration names, and print a table; finished evaluations stand."""
    config = typed_from_hydra(node, EvaluateConfig)
    candidates = candidates_of(config)
    from qlora_lab.evaluation.tasks import tasks_of

    tasks = tasks_of(config.evaluation, data_dir=Path(config.paths.data_dir), cache_dir=cache_dir_of(config))
    if not tasks:
        raise ConfigError(
            "this evaluation has neither benchmarks nor prompts; choose one that has, such as evaluation=vicuna"
        )
    outcomes, refused = evaluate_all(candidates, tasks, config)
    print(table(outcomes))
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.folder.path}")
    if refused:
        print("\n".join(f"error: {sentence}" for sentence in refused), file=sys.stderr)
        sys.exit(FAILED)


@dataclass(frozen=True)
class Outcome:
    """A finished evaluation of one model."""

    name: str
    task: str
    folder: EvaluationFolder
    result: dict[str, Any]


def candidates_of(config: EvaluateConfig) -> list[Candidate]:
    """Return the models that are asked for; none of them twice.

    Raises:
        RunFolderError: there is no such run or study, or one that is named has no result.
        ConfigError: an id that was read as a number.
        ModelError: there is no such adapter, or files of the model that was named are missing.
    """
    runs_dir = Path(config.paths.runs_dir)
    if config.adapter_folder is not None:
        base = asked_base(config, hardware.detect())
        return [adapted(base, Path(config.adapter_folder), runs_dir, config.system)]
    if config.run == BASE:
        return [alone(asked_base(config, hardware.detect()), runs_dir, config.system)]
    if config.study is not None:
        folders = finished_of_study(runs_dir, config.study)
    else:
        names = config.run if isinstance(config.run, list) else [config.run]
        folders = [find_run(runs_dir, run_name(name)) for name in names]
    if config.weights == BASE:
        for folder in folders:
            check_finished(folder)
        found = [alone(base_of(folder.config()), runs_dir, config.system) for folder in folders]
    else:
        found = [trained(folder, config.system or readable_name(folder)) for folder in folders]
    return list({candidate.path: candidate for candidate in found}.values())


def run_name(given: object) -> str:
    """Return a run's name as text, which Hydra may have read as a number.

    Raises:
        ConfigError: as one whose digits are gone.
    """
    if isinstance(given, str | int) and not isinstance(given, bool):
        return str(given)
    raise ConfigError(
        f"run must be ids, folders or base; got {given}, which is how an id such as 12e345678901 is read without "
        "quotes; write run='\"ID\"'"
    )


def finished_of_study(runs_dir: Path, study: str) -> list[RunFolder]:
    """Return the runs of a study that have a result, naming the others.

    Raises:
        RunFolderError: there is no such study, or none of its runs has a result.
    """
    folders = [RunFolder(runs_dir / run_id) for run_id in find_study(runs_dir, study).places]
    states = {folder.run_id: folder.state() for folder in folders}
    left_out = [f"{run_id} ({state})" for run_id, state in states.items() if state != FINISHED]
    if len(left_out) == len(folders):
        raise RunFolderError(f"no run of study '{study}' is finished: {', '.join(left_out)}")
    if left_out:
        print(f"left out, without a result: {', '.join(left_out)}", flush=True)
    return [folder for folder in folders if states[folder.run_id] == FINISHED]


def readable_name(folder: RunFolder) -> str:
    """Return a run's study and its place there, or its id where that is not known."""
    study = folder.config().study.name
    with suppress(QloraLabError):  # no plan of it here: the run was started alone, or its folder was copied
        place = find_study(folder.path.parent, study or "").places.get(folder.run_id, {})
        if place:
            return f"{study}: {', '.join(f'{axis}={value}' for axis, value in place.items())}"
    return folder.run_id


def evaluate_all(
    candidates: Sequence[Candidate], tasks: Sequence["Task"], config: EvaluateConfig
) -> tuple[list[Outcome], list[str]]:
    """Evaluate every model; where there are several, one that is refused does not keep the others waiting.

    Returns:
        What is finished, and what was refused, in sentences.
    """
    import torch

    from qlora_lab.models.warm import WarmBase

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    bases = WarmBase()
    outcomes: list[Outcome] = []
    refused: list[str] = []
    for candidate in candidates:
        try:
            outcomes.extend(evaluate_one(candidate, tasks, config, bases))  # up to the task that is refused
        except QloraLabError as error:
            if len(candidates) == 1:
                raise
            refused.append(f"{candidate.name}: {error}")
    return outcomes, refused


def evaluate_one(
    candidate: Candidate, tasks: Sequence["Task"], config: EvaluateConfig, bases: Any
) -> Iterator[Outcome]:
    """Evaluate one model, which is opened only where something is left to do, and yield what is finished.

    Raises:
        ConfigError: it is of a kind that cannot be asked one of the tasks; nothing was evaluated.
    """
    from qlora_lab.evaluation.run_model import RunModel, open_model

    for task in tasks:
        task.check(candidate)
    opened: RunModel | None = None
    for task in tasks:
        folder = EvaluationFolder(candidate.path, task.name, task.settings)
        if not folder.is_finished():
            with folder.lock():
                if not folder.is_finished():  # by the process that had it
                    if opened is None:
                        opened = open_model(
                            candidate,
                            cache_dir=cache_dir_of(config),
                            cache_bases=config.paths.cache_bases,
                            bases=bases,
                        )
                    execute(candidate, task, folder, opened)
        result = folder.result()
        if result["system"] != candidate.name:
            print(f"{folder.path} is finished, and signed '{result['system']}'", flush=True)
        yield Outcome(result["system"], task.name, folder, result)


def execute(candidate: Candidate, task: "Task", folder: EvaluationFolder, opened: Any) -> None:
    """Make one evaluation and write all of its folder."""
    import torch

    started = time.monotonic()
    run = candidate.run
    folder.write_config(
        {
            "name": task.name,
            "system": candidate.name,
            "run": run.run_id if run is not None else None,
            "adapter_sha256": candidate.adapter_sha256,
            "base": asdict(candidate.base),
            "threads": torch.get_num_threads(),
        }
    )
    with opened.computing():
        found = task.execute(opened, folder)
    folder.write_result({"system": candidate.name, **found, "time_s": time.monotonic() - started, "ended_at": now()})


def cache_dir_of(config: EvaluateConfig) -> Path:
    return Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()


def table(outcomes: Sequence[Outcome]) -> str:
    """Return one line for each metric of each model."""
    rows = [
        (outcome.name, outcome.task, name, _number(value))
        for outcome in outcomes
        for name, value in outcome.result["metrics"].items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def main() -> None:
    command("evaluate", evaluate, schema=EvaluateConfig, schema_name="evaluate_schema")


if __name__ == "__main__":
    restart_with_heap_settings()
    main()
