"""Turn every `auto` and None of a configuration into the value a run will use.

Resolving comes before the run id, so that the id names what really runs: the same study resolved on a
laptop and on a GPU node, which compute in other dtypes, gives different runs. What is left to the planner, the threads
and trainer.micro_batch_size=auto, depends on how much of which machine a run gets, and is no part of the id.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TypeVar

from qlora_lab.config.hardware import Hardware, product_dtype
from qlora_lab.config.schema import (
    AUTO,
    BenchmarkConfig,
    EvaluationSetConfig,
    MixPartConfig,
    ModelConfig,
    RowsConfig,
    RunConfig,
    SourceConfig,
)

# Tokens of a micro-batch that fit beside a small model on a laptop; a measured memory plan may raise it.
MICRO_BATCH_TOKENS = 4096
PROMPT_TOKENS = 16  # what a prompt format adds to a row

Source = TypeVar("Source", RowsConfig, SourceConfig, EvaluationSetConfig, MixPartConfig, BenchmarkConfig, ModelConfig)
Fingerprint = Callable[[RowsConfig | ModelConfig], str | None]


def resolve(config: RunConfig, hardware: Hardware, fingerprint: Fingerprint) -> RunConfig:
    """Return `config` with nothing left to choose but trainer.threads and trainer.micro_batch_size=auto.

    Args:
        config: as composed.
        hardware: of the machine that plans; a SLURM run is resolved for a GPU node instead.
        fingerprint: gives the sha256 of a source's or model's files, or None where it has no local file.
    """
    device = _device(config, hardware)
    dtype = _compute_dtype(config, hardware, device)
    data, sets = config.data, config.evaluation.sets
    benchmarks, compared = config.evaluation.benchmarks, data.filter.contamination_sets
    sources: list[RowsConfig | ModelConfig] = [config.model, data.source, *data.mix.values(), *sets.values()]
    sources += [*compared.values(), *(rows for benchmark in benchmarks.values() for rows in benchmark.sources())]
    for source in sources:
        read_from = source.source if isinstance(source, ModelConfig) else source.kind
        if read_from == "hub" and source.hub_id is not None and source.revision is None:
            _warn_of_moving_branch(source.hub_id)
    return replace(
        config,
        model=_with_fingerprint(config.model, fingerprint),
        trainer=replace(
            config.trainer,
            device=device,
            compute_dtype=dtype,
            micro_batch_size=config.trainer.micro_batch_size or _micro_batch_size(config),
        ),
        data=replace(
            data,
            source=_with_fingerprint(data.source, fingerprint),
            mix={name: _with_fingerprint(part, fingerprint) for name, part in data.mix.items()},
            filter=replace(
                data.filter,
                contamination_sets={name: _with_fingerprint(rows, fingerprint) for name, rows in compared.items()},
            ),
        ),
        evaluation=replace(
            config.evaluation,
            sets={name: _with_fingerprint(s, fingerprint) for name, s in sets.items()},
            benchmarks={name: benchmark_with_fingerprints(b, fingerprint) for name, b in benchmarks.items()},
        ),
    )


def _device(config: RunConfig, hardware: Hardware) -> str:
    if config.trainer.device != AUTO:
        return config.trainer.device
    if config.launcher.kind == "slurm":
        return "cuda" if config.launcher.slurm.gpus_per_run > 0 else "cpu"
    return "cuda" if hardware.gpus else "cpu"


def _compute_dtype(config: RunConfig, hardware: Hardware, device: str) -> str:
    if config.trainer.compute_dtype != AUTO:
        return config.trainer.compute_dtype
    if device == "cuda":
        return "bfloat16"  # every GPU since Ampere; older ones set trainer.compute_dtype
    return product_dtype(hardware, device, "bfloat16")


def _micro_batch_size(config: RunConfig) -> int:
    row_tokens = config.data.max_source_tokens + config.data.max_target_tokens + PROMPT_TOKENS
    return min(config.trainer.batch_size, max(1, MICRO_BATCH_TOKENS // row_tokens))


def _with_fingerprint(source: Source, fingerprint: Fingerprint) -> Source:
    return replace(source, content_sha256=source.content_sha256 or fingerprint(source))


def benchmark_with_fingerprints(benchmark: BenchmarkConfig, fingerprint: Fingerprint) -> BenchmarkConfig:
    """Return a benchmark with the hashes of its local files, that of the worked examples too."""
    examples = benchmark.examples
    if examples is not None:
        benchmark = replace(benchmark, examples=_with_fingerprint(examples, fingerprint))
    return _with_fingerprint(benchmark, fingerprint)


@cache  # once for all runs of a plan
def _warn_of_moving_branch(hub_id: str) -> None:
    print(
        f"'{hub_id}' has no revision: its branch main can move on the hub under unchanged run ids; "
        "set revision to a commit to fix what is loaded",
        file=sys.stderr,
    )
