"""Benchmarks on a finished run, as python -m qlora_lab.evaluate runs them."""

import json
from pathlib import Path

import pytest
from hydra import compose

from qlora_lab.config.schema import EvaluateConfig
from qlora_lab.errors import DataError
from qlora_lab.evaluate import evaluate
from tests.evaluation.benchmarks.choice_rows import piqa_rows
from tests.evaluation.benchmarks.conftest import write_rows
from tests.helpers import hydra_on_conf


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
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert metrics["eval/piqa/validation/0shot/acc"] == sum(item["acc"] for item in items) / 6
    (tmp_path / "ways.jsonl").rename(tmp_path / "moved.jsonl")
    assert "12/12" not in ask("moved.jsonl")  # the same rows: nothing is asked again
    write_rows(tmp_path / "moved.jsonl", piqa_rows(7))
    assert "14/14" in ask("moved.jsonl")
    with pytest.raises(DataError, match=r"evaluation.benchmarks.piqa.path 'ways.jsonl' was not found"):
        ask("ways.jsonl")
