"""What an evaluation consists of: benchmarks and sets of prompts, each of which becomes a folder of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_lab.config.schema import EvaluationConfig
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.runs.evaluations import EvaluationFolder


@dataclass(frozen=True)
class Task:
    """One benchmark or one set of prompts.

    Attributes:
        name: of it; the folder begins with it.
        settings: everything that decides the result besides the model, as plain values.
        execute: evaluates a model, writes what belongs into the folder besides result.json, and returns the metrics.
            It is called with the folder's lease held and inside `RunModel.computing`; what an earlier attempt that
            was interrupted left in the folder is still there.
    """

    name: str
    settings: dict[str, Any]
    execute: Callable[[RunModel, EvaluationFolder], dict[str, float]]


def tasks_of(evaluation: EvaluationConfig) -> list[Task]:
    """Return what `evaluation` asks for, in its order."""
    return []
