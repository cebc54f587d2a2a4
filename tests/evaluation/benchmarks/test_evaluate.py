"""Benchmarks on a finished run, as python -m qlora_lab.evaluate runs them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from transformers import GraniteConfig, GraniteForCausalLM

from qlora_lab import evaluate as evaluating
from qlora_lab.config.schema import BenchmarkConfig, EvaluateConfig, EvaluationConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ConfigError, DataError, ModelError
from qlora_lab.evaluate import evaluate, evaluate_one
from qlora_lab.evaluation import run_model
from qlora_lab.evaluation.benchmarks.task import benchmark_tasks
from qlora_lab.evaluation.candidates import Base, Candidate
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.evaluation.tasks import Task
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.runs.evaluations import EvaluationFolder
from tests.evaluation.benchmarks.choice_rows import piqa_rows
from tests.evaluation.benchmarks.conftest import write_rows
from tests.helpers import hydra_on_conf
from tests.tiny_models import LLAMA


def test_a_model_gets_a_folder_of_items_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(path: str) -> str:
        """Evaluate, and return what was shown meanwhile."""
        paths = [f"paths.{name}={tmp_path}" for name in ("runs_dir", "data_dir", "cache_dir")]
        chosen = ["run=base", "model=tiny_random", "quant=none", "device=cpu", "threads=1", "evaluation=piqa"]
        with hydra_on_conf(evaluate_schema=EvaluateConfig):
            evaluate(compose("evaluate", [*chosen, *paths, f"evaluation.benchmarks.piqa.path={path}"]))
        return capsys.readouterr().err

    write_rows(tmp_path / "ways.jsonl", piqa_rows(6))
    assert "12/12" in ask("ways.jsonl")  # two choices a question
    (folder,) = tmp_path.glob("bases/*/evaluations/piqa-*")
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["eval/piqa/validation/0shot/acc"] == sum(item["acc"] for item in items) / 6
    assert result["revisions"] == {}  # of hub sets
    (tmp_path / "ways.jsonl").rename(tmp_path / "moved.jsonl")
    assert "12/12" not in ask("moved.jsonl")  # the same rows: nothing is asked again
    write_rows(tmp_path / "moved.jsonl", piqa_rows(7))
    assert "14/14" in ask("moved.jsonl")
    with pytest.raises(DataError, match=r"evaluation.benchmarks.piqa.path 'ways.jsonl' was not found"):
        ask("ways.jsonl")


def base(**model: Any) -> Base:
    return Base(ModelConfig(source="folder", path="nowhere", **model), QuantConfig(), "plain", "float32", "cpu")


def test_a_model_that_cannot_be_asked_everything_is_refused_before_it_is_asked_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(run="a", evaluation=EvaluationConfig())
    benchmarks = {name: BenchmarkConfig(task=name, kind="hub", hub_id="a/b") for name in ("piqa", "mmlu")}
    tasks = benchmark_tasks(benchmarks, batch_tokens=64, data_dir=tmp_path, cache_dir=tmp_path)
    monkeypatch.setattr(run_model, "open_model", None)
    with pytest.raises(ConfigError, match=r"benchmarks\.mmlu\.task 'mmlu' cannot be asked of .* 'seq2seq'"):
        list(evaluate_one(Candidate("tiny", tmp_path, base(task="seq2seq")), tasks, config, None))


def test_what_was_finished_before_a_refusal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig(run="a", evaluation=EvaluationConfig())
    benchmarks = {name: BenchmarkConfig(task="piqa", kind="hub", hub_id=f"a/{name}") for name in ("one", "two")}
    tasks = benchmark_tasks(benchmarks, batch_tokens=64, data_dir=tmp_path, cache_dir=tmp_path)

    def execute(candidate: Candidate, task: Task, folder: EvaluationFolder, opened: Any) -> None:
        if (candidate.name, task.name) == ("a", "two"):
            raise DataError("there is no such set")
        folder.write_result({"system": candidate.name, "metrics": {}})

    monkeypatch.setattr(run_model, "open_model", lambda *_, **__: None)
    monkeypatch.setattr(evaluating, "execute", execute)
    candidates = [Candidate(name, tmp_path / name, base()) for name in ("a", "b")]
    outcomes, refused = evaluating.evaluate_all(candidates, tasks, config)
    assert [(outcome.name, outcome.task) for outcome in outcomes] == [("a", "one"), ("b", "one"), ("b", "two")]
    assert refused == ["a: there is no such set"]


def test_a_base_whose_head_does_more_than_is_scored_is_refused(tmp_path: Path) -> None:
    model = GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=8.0, initializer_range=0.5)).eval()
    piqa = BenchmarkConfig(task="piqa", kind="file", path=str(write_rows(tmp_path / "ways.jsonl", piqa_rows(2))))
    (task,) = benchmark_tasks({"piqa": piqa}, batch_tokens=64, data_dir=tmp_path, cache_dir=tmp_path)
    with pytest.raises(ModelError, match="GraniteForCausalLM does more than a linear layer"):
        task.execute(
            RunModel(model, ByteLevelTokenizer(), "tiny", base(), None), EvaluationFolder(tmp_path, "piqa", {})
        )


def test_a_missing_package_is_told_before_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    config = BenchmarkConfig(task="natural_instructions", kind="hub", hub_id="a/b")
    with pytest.raises(ConfigError, match="needs the package rouge-score"):
        benchmark_tasks({"ni": config}, batch_tokens=64, data_dir=tmp_path, cache_dir=tmp_path)
