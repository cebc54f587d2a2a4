"""What an evaluation consists of: benchmarks, sets of prompts, tasks of a harness; each becomes a folder of its own."""

from pathlib import Path
from typing import Any, Protocol

from qlora_lab.config.schema import EvaluationConfig
from qlora_lab.evaluation.answers import prompt_tasks
from qlora_lab.evaluation.benchmarks.task import benchmark_tasks
from qlora_lab.evaluation.candidates import Candidate
from qlora_lab.evaluation.harness import harness_tasks
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.runs.evaluations import EvaluationFolder


class Task(Protocol):
    """One benchmark, one set of prompts or one task of lm-evaluation-harness."""

    @property
    def name(self) -> str:
        """Return what the folder's name begins with."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return everything that decides the result besides the model, as plain values."""

    def check(self, candidate: Candidate) -> None:
        """Refuse a kind of model that cannot be asked this, before it is opened.

        Raises:
            ConfigError: it is one.
        """

    def execute(self, subject: RunModel, folder: EvaluationFolder) -> dict[str, Any]:
        """Evaluate a model, write what belongs into the folder besides result.json, and return what belongs into that.

        Returns:
            `metrics` by name, and `revisions`, the commits of the hub sets that were read by their ids.

        It is called with the folder's lease held and inside `RunModel.computing`. What an earlier attempt that was
        interrupted left in the folder is still there.
        """


def tasks_of(evaluation: EvaluationConfig, *, data_dir: Path, cache_dir: Path) -> list[Task]:
    """Return what `evaluation` asks for, in its order.

    Raises:
        ConfigError: a package that a benchmark needs is missing, or the harness defines no such task.
        DataError: files of benchmarks are missing, or prompts are missing or broken.
    """
    folders = {"data_dir": data_dir, "cache_dir": cache_dir}
    return [
        *benchmark_tasks(evaluation.benchmarks, batch_tokens=evaluation.batch_tokens, **folders),
        *prompt_tasks(evaluation.prompts, **folders),
        *harness_tasks(evaluation.harness, data_dir=data_dir),
    ]
