"""A benchmark as `python -m qlora_lab.evaluate` runs it on finished runs: its metrics, and items.jsonl."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_lab.config.resolve import benchmark_with_fingerprints
from qlora_lab.config.schema import BenchmarkConfig, TrainerConfig
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.run import check_packages, run_benchmarks
from qlora_lab.evaluation.candidates import Candidate
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.models.loss import check_output_head
from qlora_lab.runs.evaluations import EvaluationFolder
from qlora_lab.runs.fingerprint import source_fingerprint

HEAD_CHECK_TOKENS = 8  # of any vocabulary


@dataclass(frozen=True)
class BenchmarkTask:
    """One benchmark; see `tasks.Task` for what its methods are called with."""

    name: str
    config: BenchmarkConfig
    batch_tokens: int
    data_dir: Path
    cache_dir: Path

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the folder's hash is of: not how rows are batched, nor where a file of known content lies."""
        values = asdict(self.config)
        for source in (values, values["examples"]):
            if source is not None and source["content_sha256"] is not None:
                del source["path"]
        return {"kind": "benchmark", **values}

    def check(self, candidate: Candidate) -> None:
        self.config.check_model(f"evaluation.benchmarks.{self.name}", candidate.base.model.task)

    def execute(self, subject: RunModel, folder: EvaluationFolder) -> dict[str, Any]:
        """Run the benchmark, write a record of each item, and return what belongs into result.json.

        Raises:
            DataError, ModelError: as `run_benchmarks`; ModelError also where a model of no run scales its logits.
        """
        if subject.config is None:  # training has checked that of a run
            check_output_head(subject.model, torch.arange(HEAD_CHECK_TOKENS, device=subject.model.device)[None])
        examinee = Examinee(
            subject.model,
            subject.tokenizer,
            prompt_format=subject.base.prompt_format,
            max_length_tokens=subject.base.model.max_length_tokens,
            batch_tokens=self.batch_tokens,
            loss_chunk_tokens=TrainerConfig().loss_chunk_tokens,
            cache_dir=self.cache_dir,
            data_dir=self.data_dir,
        )
        outcome = run_benchmarks(examinee, {self.name: self.config})
        folder.write_items(outcome.items[self.name])
        return {"metrics": outcome.metrics, "revisions": outcome.revisions.get(self.name, {})}


def benchmark_tasks(
    benchmarks: Mapping[str, BenchmarkConfig], *, batch_tokens: int, data_dir: Path, cache_dir: Path
) -> list[BenchmarkTask]:
    """Find the local files and packages of every benchmark, before any model is loaded.

    Raises:
        ConfigError: a package is missing.
        DataError: a file is missing.
    """
    check_packages(benchmarks.values())
    return [
        BenchmarkTask(
            name,
            benchmark_with_fingerprints(
                config,
                partial(source_fingerprint, data_dir=data_dir, key=f"evaluation.benchmarks.{name}.path"),
            ),
            batch_tokens,
            data_dir,
            cache_dir,
        )
        for name, config in benchmarks.items()
    ]
