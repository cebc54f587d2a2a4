"""Every notebook runs on the folders of finished runs, and is committed without what it printed."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations, product
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from analysis.opened import open_study
from qlora_lab.evaluation.benchmarks.mmlu_rows import LETTERS
from qlora_lab.ratings.files import load_answers, load_ratings
from qlora_lab.ratings.judgments import FIRST, SECOND, Judgment, write_judgments
from tests.command_line import call

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {file.stem: file for file in sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))}
OWN_TESTS = ("demo",)
CELL_S = 300  # a loaded machine is slow
# The studies that notebooks open, of runs that take a moment each.
SMALL = ("model=tiny_random", "tracking=none", "launcher=in_process", "trainer.threads=1")
SMALL += ("data.rows=8", "evaluation=default", "evaluation.rows=8", "evaluation.max_new_tokens=24")
STUDIES = {
    "dataset_quality": ("trainer.max_steps=2",),
    "adapter_placement": ("trainer.max_steps=2", "adapter=all_linear,attention", "seed=0"),
    "adapter_rank": ("trainer.max_steps=2", "adapter.rank=2,8", "seed=0"),
    "data_types": ("quant=none,nf4",),
    "guanaco": ("trainer.max_steps=2", "model.architecture.num_layers=1,2", "seed=0"),
    "chatbot_tournament": ("trainer.max_steps=4", "data=procedural_clean_128", "model.architecture.num_layers=1,2,3,4"),
}
OPENED_BY = {"data_quality": "dataset_quality", "scaling": "guanaco"} | {name: name for name in STUDIES}
OPENED_BY["mmlu_against_chatbot_score"] = OPENED_BY.pop("chatbot_tournament")
MMLU = "eval/mmlu/val/0shot/hendrycks_micro"
Execute = Callable[[str], list[NotebookNode]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the studies of notebooks have been run."""
    folder = tmp_path_factory.mktemp("work")
    for name, narrowed in STUDIES.items():
        done = call("qlora_lab.sweep.__main__", f"+experiment={name}", *SMALL, *narrowed, cwd=folder)
        assert done.returncode == 0, done.stderr
    write_judgments(folder / "ratings.jsonl", judgments())
    rate_systems(folder)
    return folder


@pytest.fixture(scope="module")
def execute(here: Path) -> Iterator[Execute]:
    """One kernel for all notebooks; starting one takes seconds. Returns what a notebook shows."""
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=CELL_S, resources={"metadata": {"path": str(here)}})

    def run(name: str) -> list[NotebookNode]:
        notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
        client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f"), *notebook.cells])
        for number, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, number)
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("QLORA_LAB_CACHE", str(here / "cache"))
        with client.setup_kernel():
            yield run


def rate_systems(folder: Path) -> None:
    """Ask the runs of the tournament's study MMLU, and write ratings of them by verdicts that are made up."""
    right = 8 * [0] + 6 * [1] + 4 * [2] + 2 * [3]  # no two letters alike: a tiny model may always say the same
    lines = [
        {
            "subject": "arithmetic",
            "input": f"What is {n} + {n}?\n{choices(2 * n, at)}\nAnswer:",
            "output": LETTERS[at],
        }
        for n, at in enumerate(right)
    ]
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ("evaluation=mmlu_study", f"evaluation.benchmarks.mmlu.path={folder / 'mmlu.jsonl'}", "threads=1")
    done = call("qlora_lab.evaluate", "study=chatbot_tournament", *asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    signed = sorted(
        {json.loads(file.read_text())["system"] for file in folder.glob("runs/*/evaluations/*/result.json")}
    )
    write_judgments(folder / "of_systems.jsonl", judgments(signed, {"gpt": 5}))
    told = call("qlora_lab.tournament", "of_systems.jsonl", "--json", "--orders", "100", cwd=folder)
    assert told.returncode == 0, told.stderr
    (folder / "ratings.json").write_text(told.stdout)


def choices(answer: int, at: int) -> str:
    return "\n".join(f"{letter}. {answer + place - at}" for place, letter in enumerate(LETTERS))


def judgments(
    systems: Sequence[str] = ("large", "middle", "small"), upsets: Mapping[str, int] | None = None
) -> list[Judgment]:
    """Judges on 12 questions and some systems, both orders: the earlier mostly wins, but on every `upset` question."""
    found = []
    for judge, upset in (upsets or {"gpt": 5, "ann": 4}).items():
        for question, (first, second) in product(range(12), permutations(systems, 2)):
            larger_first = systems.index(first) < systems.index(second)
            verdict = FIRST if larger_first != (question % upset == 0) else SECOND
            found.append(Judgment(str(question), first, second, verdict, judge))
    return found


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name not in OWN_TESTS])
def test_notebook_runs_on_finished_runs(name: str, here: Path, execute: Execute) -> None:
    shown = execute(name)
    tables = "".join(output.get("data", {}).get("text/html", "") for output in shown)
    assert "<table" in tables
    if name in OPENED_BY:
        study = open_study(OPENED_BY[name], here / "runs")
        assert study.answer.not_counted.empty and all(arm in tables for arm in study.answer.arms)
        printed = "".join(output.get("text", "") for output in shown)
        assert study.answer.sentence in printed
        assert any("image/png" in output.get("data", {}) for output in shown)
        first = next(cell for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code")
        assert first.source.startswith("%matplotlib inline\n"), "figures are shown in a kernel of its own, too"


def test_the_tournament_runs_on_the_released_verdicts(here: Path, execute: Execute, data_slices: Path) -> None:
    known = load_answers([data_slices / "qlora_eval" / "generations"])
    released = load_ratings([data_slices / "qlora_eval" / "pairwise_gpt4_vicuna"], known).judgments
    write_judgments(here / "ratings.jsonl", released)
    printed = "".join(output.get("text", "") for output in execute("tournament_and_agreement"))
    assert "65b-guanaco" in printed and "gpt4" in printed


def test_mmlu_is_correlated_with_the_ratings_of_the_same_runs(here: Path, execute: Execute) -> None:
    shown = execute("mmlu_against_chatbot_score")
    study = open_study("chatbot_tournament", here / "runs")
    against = study.against_ratings(here / "ratings.json")
    assert sorted(against.table["arm"]) == sorted(study.answer.arms) and against.notes == []
    assert set(against.table["systems"]) == {1} and against.table[MMLU].nunique() > 1
    (row,) = against.correlations.to_dict("records")
    assert row["arms"] == 4 and row["low"] < row["high"] and 0 < row["p"] <= 1
    assert against.words in "".join(output.get("text", "") for output in shown)


def test_sizes_are_lines_apart_from_what_varies_at_each_size(here: Path, execute: Execute) -> None:
    axes = open_study("guanaco", here / "runs").scaling_figure().axes[0]
    assert len(axes.get_xticks()) == 2 and axes.get_xscale() == "log"
    assert sorted(axes.get_legend_handles_labels()[1]) == [
        "learning_rate=0.0001",
        "learning_rate=0.0002",
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_valid_and_holds_no_output(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "clear its outputs before committing"
