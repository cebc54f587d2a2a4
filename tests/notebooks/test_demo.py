"""The demo runs from its first cell to its last, without a network, on a tiny model."""

import ast
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from qlora_lab.config.schema import RunConfig
from tests.evaluation.finished_runs import finished
from tests.helpers import composed

NOTEBOOK = Path(__file__).parents[2] / "analysis/notebooks/demo.ipynb"
CELL_S = 300  # a loaded machine takes its time to import torch


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_demo_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(tmp_path / "runs", "optim.learning_rate=0.05")
    monkeypatch.setenv("QLORA_LAB_DEMO_MODEL", "tiny_random")
    monkeypatch.setenv("QLORA_LAB_DEMO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[2]), os.environ.get("PYTHONPATH", "")]))
    notebook = read()
    here = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=here).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "\n".join(output.get("text", "") for output in outputs)
    assert f"run {run.run_id}: eval/loss" in said
    assert "\ngpu kernels: " in said, "what runs, or what runs in its place and why"
    assert "tuned:" in said and "tiny_random:" in said
    assert "a switch takes" in said and "logits in the batch differ by" in said
    assert "logits differ by" in said and "perplexity" in said, "the merge was compared"
    (difference,) = [line.split()[-5] for line in said.splitlines() if line.startswith("its logits differ by at most")]
    assert float(difference) < 1e-3
    assert (tmp_path / "runs/merged" / run.run_id / "merge.json").is_file()


def test_what_the_demo_would_train_is_a_run() -> None:
    (source,) = [cell.source for cell in read().cells if "TRAIN = [" in cell.source]
    lists = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign | ast.AugAssign)]
    words = [word for value in lists if isinstance(value, ast.List) for word in value.elts]
    names = {"MODEL": "smollm2_135m", "RUNS": "runs"}
    arguments = [eval(ast.unparse(word), names) for word in words]
    assert "trainer.compute_dtype=float32" in arguments, "what a GPU before Ampere needs"
    assert isinstance(composed(*arguments), RunConfig)


def test_the_demo_is_kept_without_outputs() -> None:
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in read().cells)
