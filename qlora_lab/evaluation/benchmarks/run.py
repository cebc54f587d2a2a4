"""Every benchmark of a configuration, one after the other.

BENCHMARKS names those that exist; a new one is a function there, and its metrics in config/benchmark_names.py.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.evaluation.benchmarks import glue, multiple_choice
from qlora_lab.evaluation.benchmarks.crows_pairs import crows_pairs
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.items import ItemReader, Ready
from qlora_lab.evaluation.benchmarks.mmlu import mmlu
from qlora_lab.evaluation.benchmarks.natural_instructions import natural_instructions, rouge_l_scorer
from qlora_lab.evaluation.benchmarks.perplexity import perplexity
from qlora_lab.runs.progress import progress_bar

Benchmark = Callable[[Examinee, BenchmarkConfig, ItemReader], Ready]
BENCHMARKS: dict[str, Benchmark] = {
    "mmlu": mmlu,
    **multiple_choice.TASKS,
    "crows_pairs": crows_pairs,
    "perplexity": perplexity,
    "natural_instructions": natural_instructions,
    **glue.TASKS,
}


@dataclass(frozen=True)
class BenchmarkOutcome:
    """Metrics by their whole names, and by the benchmark's name the records of its items.

    `revisions` are the commits of the hub sets that were read, by the benchmark's name and the set's id.
    """

    metrics: dict[str, float]
    items: dict[str, list[dict[str, Any]]]
    revisions: dict[str, dict[str, str]]


def check_packages(benchmarks: Iterable[BenchmarkConfig]) -> None:
    """Refuse benchmarks whose packages are missing, before there is work to lose.

    Raises:
        ConfigError: one is missing.
    """
    if any(config.task == "natural_instructions" for config in benchmarks):
        rouge_l_scorer()


def check_benchmarks(examinee: Examinee, benchmarks: Mapping[str, BenchmarkConfig]) -> None:
    """Read and tokenize the rows of every benchmark and keep nothing, so that bad ones are refused before training.

    Raises:
        ConfigError, DataError, ModelError: as `run_benchmarks`, whatever is not about what the model says.
    """
    for name, config in benchmarks.items():
        BENCHMARKS[config.task](examinee, config, _reader(examinee, name))


def run_benchmarks(
    examinee: Examinee,
    benchmarks: Mapping[str, BenchmarkConfig],
    *,
    weights_context: Callable[[torch.nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> BenchmarkOutcome:
    """Run benchmarks on a model, on the device where it is.

    Args:
        benchmarks: by name; the names of their metrics are in config/benchmark_names.py.
        weights_context: entered around all of them with the model; a place to keep expanded weights.

    Raises:
        DataError: rows that are missing, broken, of another schema, or longer than the model's context.
        ModelError: the tokenizer cannot be scored so.
    """
    metrics: dict[str, float] = {}
    items: dict[str, list[dict[str, Any]]] = {}
    revisions: dict[str, dict[str, str]] = {}
    if not benchmarks:  # nothing to expand the weights for
        return BenchmarkOutcome(metrics, items, revisions)
    model = examinee.model
    was_training = model.training
    model.eval()
    try:
        with weights_context(model):
            for name, config in benchmarks.items():
                reader = _reader(examinee, name)
                ready = BENCHMARKS[config.task](examinee, config, reader)
                with progress_bar(ready.size, what=name, unit="item") as bar:
                    scores = ready.score(bar.update)
                prefix = config.metric_prefix(name)
                metrics.update({f"{prefix}/{metric}": value for metric, value in scores.metrics.items()})
                items[name], revisions[name] = scores.items, reader.revisions
    finally:
        model.train(was_training)
    return BenchmarkOutcome(metrics, items, {name: found for name, found in revisions.items() if found})


def _reader(examinee: Examinee, name: str) -> ItemReader:
    return ItemReader(f"evaluation.benchmarks.{name}", examinee.cache_dir, examinee.data_dir)
