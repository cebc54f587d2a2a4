"""Every notebook runs on the folders of finished runs, and is committed without what it printed."""

import os
from collections.abc import Callable, Iterator
from itertools import permutations, product
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from qlora_lab.ratings.judgments import FIRST, SECOND, Judgment, write_judgments
from tests.analysis.study_folders import FakeRun, two_arms, write_study

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
OWN_TESTS = ("demo",)
CELL_S = 300  # a loaded machine is slow
Execute = Callable[[NotebookNode], None]


def arms(name: str, key: str, axis: str, values: list[object]) -> list[FakeRun]:
    """Two seeds of an arm for each value of one axis; the later the value, the higher the loss."""
    group, _, last = key.partition(".")
    return [
        FakeRun(
            f"{name}{place}{seed}",
            seed=seed,
            mean_loss=0.4 + 0.1 * place + 0.005 * seed,
            config={group: {last: value}},
            axes={axis: str(value), "seed": str(seed)},
        )
        for place, value in enumerate(values)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execute]:
    """One kernel for all notebooks, in a folder with the studies that they open; starting one takes seconds."""
    here = tmp_path_factory.mktemp("work")
    runs = here / "runs"
    studies = {
        "dataset_quality": two_arms(),
        "adapter_placement": arms("place", "adapter.placement", "adapter", ["all_linear", "attention"]),
        "adapter_rank": arms("rank", "adapter.rank", "adapter.rank", [2, 8]),
        "data_types": arms("type", "quant.format", "quant", ["none", "nf4", "int4"]),
        "guanaco": arms("size", "model.name", "model", ["llama_7b", "llama_13b"]),
    }
    for name, its_runs in studies.items():
        write_study(runs, its_runs, name=name, caution="These runs are made up.")
    write_judgments(here / "ratings.jsonl", judgments())
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=CELL_S, resources={"metadata": {"path": str(here)}})

    def run(notebook: NotebookNode) -> None:
        client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f"), *notebook.cells])
        for number, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("QLORA_LAB_CACHE", str(here / "cache"))
        with client.setup_kernel():
            yield run


def judgments() -> list[Judgment]:
    """Two judges on 12 questions and three systems, both orders: the larger mostly wins."""
    systems = ("large", "middle", "small")
    found = []
    for judge, upset in (("gpt", 5), ("ann", 4)):
        for question, (first, second) in product(range(12), permutations(systems, 2)):
            larger_first = systems.index(first) < systems.index(second)
            verdict = FIRST if larger_first != (question % upset == 0) else SECOND
            found.append(Judgment(str(question), first, second, verdict, judge))
    return found


@pytest.mark.parametrize("file", [file for file in NOTEBOOKS if file.stem not in OWN_TESTS], ids=lambda file: file.stem)
def test_notebook_runs_on_finished_runs(file: Path, execute: Execute) -> None:
    notebook = nbformat.read(file, as_version=4)
    execute(notebook)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("text/html" in output.get("data", {}) for output in shown)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_valid_and_holds_no_output(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "clear its outputs before committing"
