"""Tasks of lm-evaluation-harness (Gao et al. 2024), by its own definitions and metrics, on our models.

The package lm_eval is imported only where such a task is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.schema import CLASSIFICATION, HarnessConfig
from qlora_lab.data.prompts import own_surroundings
from qlora_lab.errors import ConfigError, DataError, nearest
from qlora_lab.evaluation.candidates import Candidate
from qlora_lab.evaluation.definitions import definitions_sha256, sets_of_hub
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.runs.evaluations import EvaluationFolder


@dataclass(frozen=True)
class HarnessScores:
    """Metrics by task and the harness's names, such as boolq/acc, and a record of every item.

    Attributes:
        hub_sets: ids of the hub sets that were read; the harness does not say at which commits.
    """

    metrics: dict[str, float]
    items: list[dict[str, Any]]
    hub_sets: list[str]


@dataclass(frozen=True)
class HarnessTask:
    """One task of the harness, or group of them; see `tasks.Task` for what its methods are called with.

    Attributes:
        manager: the harness's index of definitions.
        definitions_sha256: of one's own definitions, what lies beside them and their rows in local files; None: the
            harness's definitions.
    """

    name: str
    config: HarnessConfig
    manager: Any
    definitions_sha256: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the folder's hash is of; another version of the harness may define the task otherwise."""
        values = asdict(self.config)
        for key in ("tasks", "definitions", "batch_size"):
            del values[key]
        version = metadata.version("lm_eval")
        return {"kind": "harness", "lm_eval": version, "definitions_sha256": self.definitions_sha256, **values}

    def check(self, candidate: Candidate) -> None:
        if candidate.base.model.task == CLASSIFICATION:
            raise ConfigError(
                f"{candidate.name} is a classifier, which lm-evaluation-harness cannot ask; evaluate it with a "
                "benchmark of classes, such as evaluation=glue_sst2"
            )

    def execute(self, subject: RunModel, folder: EvaluationFolder) -> dict[str, Any]:
        """Let the harness ask the task, write a record of each item, and return what belongs into result.json.

        Raises:
            DataError: its data cannot be read.
        """
        scores = harness_scores(
            subject.model,
            subject.tokenizer,
            [self.name],
            self.manager,
            max_length_tokens=subject.base.model.max_length_tokens,
            shots=self.config.shots,
            rows=self.config.rows,
            batch_size=self.config.batch_size,
        )
        folder.write_items(scores.items)
        return {
            "metrics": {f"eval/harness/{name}": value for name, value in scores.metrics.items()},
            "revisions": {},
            "read_at_unrecorded_commits": scores.hub_sets,
        }


def harness_tasks(config: HarnessConfig | None, *, data_dir: Path) -> list[HarnessTask]:
    """Find the definitions of tasks, before any model is loaded; the harness takes 20 s to read its own.

    Raises:
        ConfigError: the package lm_eval is missing, or a task is not defined.
        DataError: the folder of definitions is missing.
    """
    if config is None:
        return []
    folder = None
    if config.definitions is not None:
        folder = next((at for at in (data_dir / config.definitions, Path(config.definitions)) if at.is_dir()), None)
        if folder is None:
            raise DataError(
                f"evaluation.harness.definitions '{config.definitions}' is no folder; give one with YAML files of tasks"
            )
    manager = task_manager(folder)
    for name in config.tasks:
        if name not in manager.all_tasks:
            where = "lm-evaluation-harness" if folder is None else folder
            raise ConfigError(
                f"evaluation.harness.tasks: {where} defines no task '{name}'{nearest(name, manager.all_tasks)}"
            )
    digest = None if folder is None else definitions_sha256(folder)
    return [HarnessTask(name, config, manager, digest) for name in dict.fromkeys(config.tasks)]


def task_manager(definitions: Path | None) -> Any:
    """Return the harness's index of its own definitions, or of those in a folder alone.

    Raises:
        ConfigError: the package lm_eval is missing.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed; install it with pip install 'qlora_lab[harness]'"
        ) from error
    return TaskManager(include_path=definitions, include_defaults=definitions is None)


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    max_length_tokens: int,
    shots: int | None = None,
    rows: int | None = None,
    batch_size: int = 8,
) -> HarnessScores:
    """Let the harness ask a model tasks or groups of them.

    Args:
        manager: see `task_manager`.
        max_length_tokens: that the model reads at once; of longer prompts the harness cuts off the beginning.
        shots: worked examples before each question; None: as each task says.
        rows: the first so many of each task; None: all.
        batch_size: rows in a batch.

    Raises:
        DataError: the data of a task cannot be read.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    before, _ = own_surroundings(tokenizer)
    asked = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=max_length_tokens,
        add_bos_token=bool(before),
    )
    found = lm_eval.simple_evaluate(
        asked,
        tasks=[each for name in names for each in loaded_tasks(manager, name)],
        task_manager=manager,
        num_fewshot=shots,
        limit=rows,
        bootstrap_iters=0,
    )
    items = [item_of(name, sample) for name, its in found["samples"].items() for sample in its]
    return HarnessScores(metrics_of(found["results"]), items, sets_of_hub(found["configs"]))


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return what the harness found of each task that is a number, by TASK/METRIC, or TASK/METRIC/FILTER of answers."""
    return {
        f"{name}/{key.removesuffix(',none').replace(',', '/')}": float(value)
        for name, values in results.items()
        for key, value in values.items()
        if isinstance(value, Real) and "," in key and "_stderr" not in key
    }


def loaded_tasks(manager: Any, name: str) -> list[Any]:
    """Return a task or a group with its data; a tag's tasks."""
    from datasets.exceptions import DatasetsError

    try:
        loaded = manager.load(name)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"lm-evaluation-harness cannot read the data of '{name}': {reason}") from error
    tasks = list(loaded["tasks"].values())
    if any(getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False) for task in tasks):
        raise ConfigError(f"'{name}' runs code that the model wrote, or shows pictures, which is not done here")
    return [loaded["groups"][name]] if name in loaded["groups"] else tasks


def item_of(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the harness found of one item with one filter of answers, as JSON can hold it.

    Of a choice `responses` holds its log-likelihood and more.
    """
    kept = {
        "task": task,
        "item": sample["doc_id"],
        "filter": sample["filter"],
        "target": sample["target"],
        "responses": sample["filtered_resps"],
    }
    return {name: _plain(value) for name, value in (kept | {name: sample[name] for name in sample["metrics"]}).items()}


def _plain(value: Any) -> Any:
    """Return a value without numpy's numbers and arrays, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
