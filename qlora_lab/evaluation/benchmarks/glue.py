"""GLUE (Wang et al. 2018): each task by the benchmark's own metrics, from classes that a model chooses or writes.

CoLA is scored by Matthews' correlation, MRPC and QQP by accuracy and F1 of the second class, STS-B by Pearson's and
Spearman's correlation with the scores that people gave, the others by accuracy. What is no class of the task is wrong,
and counted as `unreadable`; for STS-B it is a score of -1, as in the code of T5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from qlora_lab.config.schema import CLASSIFICATION, BenchmarkConfig
from qlora_lab.data.glue import GLUE_TASKS, SCORES, glue_rows, number_of
from qlora_lab.data.rows import Row
from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.benchmarks.answers import first_row, prompts_of, written_answers
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores, ItemReader, Ready, spread
from qlora_lab.evaluation.benchmarks.likelihood import Advance
from qlora_lab.models.tasks import class_names, task_of

NO_SCORE = -1.0


@dataclass(frozen=True)
class Labelled:
    """A text, and its label: the name of a class, or of STS-B the score as people gave it, not its nearest fifth."""

    row: Row
    label: str | float


def glue(task: str, examinee: Examinee, config: BenchmarkConfig, reader: ItemReader) -> Ready:
    """Make every text ready to be asked for its class.

    Args:
        task: a name of GLUE_TASKS.

    Raises:
        ConfigError: a classifier of other classes.
        DataError: rows of another schema, or a text that does not fit.
    """
    labels = GLUE_TASKS[task].labels
    if task_of(examinee.model) == CLASSIFICATION and set(class_names(examinee.model.config)) != set(labels):
        raise ConfigError(
            f"{reader.place} asks for the classes {', '.join(labels)}, and the model chooses among "
            f"{', '.join(class_names(examinee.model.config))}; evaluate a model that was trained on this task"
        )
    texts = spread(reader.read(config, partial(labelled, task)), config.rows)
    prompts = prompts_of(examinee, config, reader.place, {number: text.row for number, text in texts.items()})

    def score(advance: Advance) -> BenchmarkScores:
        answers = [answer.text.strip() for answer in written_answers(examinee, config, prompts, advance)]
        targets = [text.label for text in texts.values()]
        items = [
            {"item": number, "target": text.label, "answer": answer, "correct": answer == text.row.target}
            for (number, text), answer in zip(texts.items(), answers, strict=True)
        ]
        return BenchmarkScores(metrics(task, targets, answers), items)

    return Ready(len(prompts), score)


def labelled(task: str, columns: Mapping[str, Any]) -> Labelled | None:
    """Read one record; None where it has no label."""
    row = first_row(partial(glue_rows, task), columns)
    score = number_of(columns["label"]) if row is not None and GLUE_TASKS[task].labels is SCORES else None
    return None if row is None else Labelled(row, row.target if score is None else score)


def metrics(task: str, targets: Sequence[str | float], answers: Sequence[str]) -> dict[str, float]:
    """Return a task's metrics, from 0 to 1 (correlations from -1); NaN where a correlation is not defined.

    Args:
        targets: names of classes; of STS-B scores.
    """
    labels = GLUE_TASKS[task].labels
    if labels is SCORES:
        scores = [number_of(answer) for answer in answers]
        said = [NO_SCORE if score is None or not math.isfinite(score) else score for score in scores]
        right = [float(target) for target in targets]
        defined = len(set(said)) > 1 and len(set(right)) > 1
        return {
            "pearson": float(stats.pearsonr(right, said).statistic) if defined else math.nan,
            "spearman": float(stats.spearmanr(right, said).statistic) if defined else math.nan,
            "unreadable": sum(score == NO_SCORE for score in said),
            "texts": len(targets),
        }
    found: dict[str, float] = {}
    if task in ("cola", "mrpc", "qqp"):
        positive = np.array([target == labels[1] for target in targets])
        # an answer that is no class is wrong: the other class than the right one
        said_positive = np.array(
            [
                answer == labels[1] if answer in labels else target != labels[1]
                for target, answer in zip(targets, answers, strict=True)
            ]
        )
        found = (
            {"matthews": matthews(positive, said_positive)} if task == "cola" else {"f1": f1(positive, said_positive)}
        )
    return {
        **found,
        "acc": sum(target == answer for target, answer in zip(targets, answers, strict=True)) / len(targets),
        "unreadable": sum(answer not in labels for answer in answers),
        "texts": len(targets),
    }


def matthews(right: np.ndarray, said: np.ndarray) -> float:
    """Return Matthews' correlation of two boolean arrays; 0 where one of them is constant."""
    if right.all() or said.all() or not (right.any() and said.any()):
        return 0.0
    return float(np.corrcoef(right, said)[0, 1])


def f1(right: np.ndarray, said: np.ndarray) -> float:
    """Return the F1 of True in two boolean arrays; 0 where neither holds one."""
    either = right.sum() + said.sum()
    return float(2 * (right & said).sum() / either) if either else 0.0


TASKS: dict[str, Callable[..., Ready]] = {f"glue_{task}": partial(glue, task) for task in GLUE_TASKS}
