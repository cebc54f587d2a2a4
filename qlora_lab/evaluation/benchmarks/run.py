"""Every benchmark of a configuration, one after the other.

BENCHMARKS names those that exist; a new one is a function there, and its metrics in config/benchmark_names.py.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.evaluation.benchmarks import glue, multiple_choice
from qlora_lab.evaluation.benchmarks.crows_pairs import crows_pairs
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores
from qlora_lab.evaluation.benchmarks.likelihood import Advance
from qlora_lab.evaluation.benchmarks.mmlu import mmlu
from qlora_lab.evaluation.benchmarks.natural_instructions import natural_instructions, rouge_l_scorer
from qlora_lab.evaluation.benchmarks.perplexity import perplexity
from qlora_lab.evaluation.progress import progress_bar

# From an examinee, a benchmark's configuration, where that stands, and what is told the number of items.
Benchmark = Callable[[Examinee, BenchmarkConfig, str, Callable[[int], Advance]], BenchmarkScores]
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
    """Metrics by their whole names, and by the benchmark's name the records of its items."""

    metrics: dict[str, float]
    items: dict[str, list[dict[str, Any]]]


def check_packages(benchmarks: Iterable[BenchmarkConfig]) -> None:
    """Refuse benchmarks whose packages are missing, before there is work to lose.

    Raises:
        ConfigError: one is missing.
    """
    if any(config.task == "natural_instructions" for config in benchmarks):
        rouge_l_scorer()


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
    model = examinee.model
    was_training = model.training
    model.eval()
    try:
        with weights_context(model):
            for name, config in benchmarks.items():
                place = f"evaluation.benchmarks.{name}"
                with ExitStack() as bars:
                    scores = BENCHMARKS[config.task](examinee, config, place, partial(_bar, bars, name))
                prefix = config.metric_prefix(name)
                metrics.update({f"{prefix}/{metric}": value for metric, value in scores.metrics.items()})
                items[name] = scores.items
    finally:
        model.train(was_training)
    return BenchmarkOutcome(metrics, items)


def _bar(bars: ExitStack, name: str, items: int) -> Advance:
    return bars.enter_context(progress_bar(items, what=name, unit="item")).update
