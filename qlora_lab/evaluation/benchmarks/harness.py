"""lm-evaluation-harness on the same rows and the same model, to check our scores against. Needs the package lm_eval."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.benchmarks.examinee import Examinee, Texts


@dataclass(frozen=True)
class HarnessTask:
    """A task that the harness defines, on other rows.

    Attributes:
        definition: path of its YAML file below lm_eval/tasks, such as "piqa/piqa.yaml".
        files: JSON Lines of rows in the schema of the task's hub set, by split.
        changes: keys of the definition to set otherwise.
    """

    definition: str
    files: Mapping[str, Path]
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class HarnessScores:
    """Metrics by the harness's names, and of each item the log-likelihoods of its choices, in the order of the rows."""

    metrics: dict[str, float]
    log_likelihoods: list[list[float]]


def harness_scores(
    examinee: Examinee, tasks: Mapping[str, HarnessTask], *, shots: int = 0, batch_size: int = 8
) -> dict[str, HarnessScores]:
    """Let the harness ask multiple-choice tasks.

    Args:
        tasks: by a name of one's own.
        shots: worked examples before each question.
        batch_size: rows in a batch.

    Raises:
        ConfigError: the package lm_eval is missing.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "lm-evaluation-harness is not installed; install it with pip install 'qlora_lab[harness]'"
        ) from error
    definitions = Path(lm_eval.__file__).parent / "tasks"
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks.items():
            changed = {
                "include": str(definitions / task.definition),
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(file) for split, file in task.files.items()}},
                **task.changes,
            }
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(changed))
        model = HFLM(
            pretrained=examinee.model,
            tokenizer=examinee.tokenizer,
            batch_size=batch_size,
            max_length=examinee.max_length_tokens,
            add_bos_token=bool(Texts.of(examinee).before),
        )
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=shots,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False),
        )
    return {
        name: HarnessScores(
            {
                key.removesuffix(",none"): value
                for key, value in found["results"][name].items()
                if key.endswith(",none")
            },
            [
                [float(score[0]) for score in sample["filtered_resps"]]
                for sample in sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
            ],
        )
        for name in tasks
    }
