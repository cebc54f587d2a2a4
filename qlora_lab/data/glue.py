"""The tasks of GLUE (Wang et al. 2018) in the columns of the hub, each put as one text.

The text is that of T5 (Raffel et al. 2020, appendix D): the task's name, then each column's name and text. The target
is the class's name on the hub; of STS-B, which has a score from 0 to 5, its nearest fifth, as T5 was trained on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_lab.data.records import BrokenRowError, kind_of, text_of
from qlora_lab.data.rows import Row
from qlora_lab.errors import nearest

NO_LABEL = -1  # in the test splits, whose labels the benchmark keeps to itself
SCORES = tuple(f"{fifth / 5:.1f}" for fifth in range(26))


@dataclass(frozen=True)
class GlueTask:
    """`labels` are the classes in the order of their numbers; of STS-B the scores, which number nothing."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]


GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable")),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": GlueTask(("sentence1", "sentence2"), SCORES),
    "mnli": GlueTask(("hypothesis", "premise"), ("entailment", "neutral", "contradiction")),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def glue_rows(name: str, columns: Mapping[str, Any]) -> list[Row]:
    """Return the row of one GLUE record; none where it has no label."""
    task = GLUE_TASKS[name]
    texts = [f"{column}: {text_of(columns, column).strip()}" for column in task.columns]
    target = label_of(name, columns)
    return [] if target is None else [Row(f"{name} {' '.join(texts)}", target)]


def label_of(name: str, columns: Mapping[str, Any]) -> str | None:
    """Return the class that a record gives by number or by name; None where the benchmark keeps it to itself.

    Raises:
        BrokenRowError: there is no label, or it is none of the task's.
    """
    given = columns["label"] if "label" in columns else text_of(columns, "label")
    labels = GLUE_TASKS[name].labels
    if given in labels:
        return str(given)
    number = number_of(given)
    if number == NO_LABEL:
        return None
    if labels is SCORES:
        if number is not None and 0 <= number <= 5:
            return SCORES[round(number * 5)]
        raise BrokenRowError(f"column 'label' of {name} must be a score from 0 to 5; got {kind_of(given)}")
    if number is not None and number in range(len(labels)):
        return labels[int(number)]
    numbered = ", ".join(f"{place} ({label})" for place, label in enumerate(labels))
    word = f"'{given}'{nearest(given, labels)}" if isinstance(given, str) else kind_of(given)
    raise BrokenRowError(f"column 'label' of {name} must be one of {numbered}; got {word}")


def number_of(given: Any) -> float | None:
    """Return a label's number, which CSV files hold as text."""
    if isinstance(given, bool):
        return None
    try:
        return float(given)
    except (TypeError, ValueError):
        return None
