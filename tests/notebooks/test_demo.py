"""The demo runs from its first cell to its last, without a network, on a tiny model and on its own."""

import ast
import importlib.util
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from qlora_lab.config.schema import RunConfig
from qlora_lab.ops.registry import CUDA_KERNELS
from qlora_lab.runs.folder import RunFolder
from tests.helpers import composed

NOTEBOOK = Path(__file__).parents[2] / "analysis/notebooks/demo.ipynb"
CELL_S = 300  # a loaded machine takes its time to import torch
# What torch says on Colab's GPU, though everything is computed on the CPU.
AS_ON_A_T4 = """\
import torch

torch.version.cuda = "12.6"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (7, 5)
"""
T4_KERNELS = "reference (pure torch): the GPU has compute capability 7.5, and the kernels need 8.0 (Ampere) or more"
# Of logits: SmolLM2's reach 30, where bfloat16 has steps of 0.125, and thirty layers round before; 1.6 was seen.
MOST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 4.0}


def read(**parameters: Any) -> Any:
    """Return the notebook, with other values after its own parameters, as papermill puts them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (place,) = [place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    injected = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(injected))
    return notebook


@pytest.mark.parametrize(
    ("model", "on_a_t4"),
    [("tiny_random", True), pytest.param("smollm2_135m", False, marks=pytest.mark.smollm2)],
    ids=["tiny_random, as on a T4", "smollm2_135m"],
)
def test_the_demo_trains_where_there_is_nothing_and_runs_to_its_end(
    model: str, on_a_t4: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model == "tiny_random":  # the other one lies in the usual cache
        monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[2]), os.environ.get("PYTHONPATH", "")]))
    notebook = read(MODEL=model, STEPS=1, HELD_OUT_ROWS=2, ANSWER_TOKENS=6)
    if on_a_t4:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(AS_ON_A_T4))
    here = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=CELL_S, kernel_name="python3", resources=here).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "\n".join(output.get("text", "") for output in outputs)
    (run,) = (RunFolder(file.parent) for file in (tmp_path / "runs").glob("*/config.yaml"))
    assert run.config().model.name == model and run.result()["metrics"]["train/steps"] == 1
    assert f"run {run.run_id}: eval/loss" in said
    (kernels,) = [line for line in said.splitlines() if line.startswith("gpu kernels: ")]
    assert kernels == f"gpu kernels: {T4_KERNELS if on_a_t4 else CUDA_KERNELS}", "what runs, or why it does not"
    dtype = run.environment()["compute_dtype"]
    assert dtype == "float32" or not on_a_t4
    assert "tuned:" in said and f"{model}:" in said
    assert "a switch takes" in said and "logits in the batch differ by" in said
    assert "logits differ by" in said and "perplexity" in said, "the merge was compared"
    (difference,) = [line.split()[-5] for line in said.splitlines() if line.startswith("its logits differ by at most")]
    assert float(difference) < MOST_DIFFERENCE[dtype]
    assert (tmp_path / "runs/merged" / run.run_id / "merge.json").is_file()


def test_what_the_demo_would_train_is_a_run() -> None:
    (source,) = [cell.source for cell in read().cells if "TRAIN = [" in cell.source]
    lists = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign | ast.AugAssign)]
    words = [word for value in lists if isinstance(value, ast.List) for word in value.elts]
    names = {"MODEL": "smollm2_135m", "RUNS": "runs", "STEPS": 30, "HELD_OUT_ROWS": 32}
    arguments = [eval(ast.unparse(word), names) for word in words]
    assert "trainer.compute_dtype=float32" in arguments, "what a GPU before Ampere needs"
    assert isinstance(composed(*arguments), RunConfig)


@pytest.mark.parametrize(("capability", "builds"), [((7, 5), False), ((9, 0), True)])
def test_installing_keeps_the_torch_that_is_there(
    capability: tuple[int, int], builds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Colab: torch is there and this package is not. A T4 is spared the build of what could not run on it."""
    (source,) = [cell.source for cell in read().cells if '"pip", "install"' in cell.source]
    started: list[list[str]] = []

    def nothing(words: list[str], **_: Any) -> Any:
        started.append(words[1:])
        return nullcontext(SimpleNamespace(stdout=(), returncode=0))

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qlora_lab" else found(name))
    monkeypatch.setattr("subprocess.Popen", nothing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    exec(source, {"SOURCE": "a/wheel"})
    without = [] if builds else ["--config-settings=cmake.define.QLK_CUDA=OFF"]
    assert started == [["-m", "pip", "install", "--quiet", "a/wheel", f"torch=={torch.__version__}", *without]]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="set SOURCE above"):
        exec(source, {"SOURCE": None})


def test_the_demo_is_kept_without_outputs() -> None:
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in read().cells)
