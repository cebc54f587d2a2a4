"""lm-evaluation-harness on our models, and our scores beside its own on the same rows and the same tiny model."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets.exceptions import DatasetGenerationError
from hydra import compose

from qlora_lab.config.schema import BenchmarkConfig, EvaluateConfig, HarnessConfig, RowsConfig
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluate import evaluate
from qlora_lab.evaluation.definitions import definitions_sha256, local_rows, sets_of_hub
from qlora_lab.evaluation.harness import (
    HarnessScores,
    harness_scores,
    harness_tasks,
    item_of,
    loaded_tasks,
    metrics_of,
    task_manager,
)
from tests.evaluation.benchmarks.choice_rows import arc_rows, hellaswag_rows, piqa_rows, winogrande_rows
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run, write_rows
from tests.evaluation.benchmarks.harness_definitions import write_definition
from tests.evaluation.benchmarks.test_crows_pairs import ROWS as SENTENCE_PAIRS
from tests.evaluation.benchmarks.test_mmlu import hub_rows
from tests.evaluation.finished_runs import finished
from tests.helpers import hydra_on_conf

with_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install 'qlora_lab[harness]'"
)
TASKS: dict[str, tuple[str, str, Callable[[int], list[dict[str, Any]]]]] = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", hellaswag_rows),
    "piqa": ("piqa/piqa.yaml", "validation", piqa_rows),
    "arc": ("arc/arc_easy.yaml", "test", arc_rows),
    "winogrande": ("winogrande/default.yaml", "validation", winogrande_rows),
    "crows_pairs": ("crows_pairs/crows_pairs_english.yaml", "test", lambda count: SENTENCE_PAIRS[:count]),
}
MMLU = "mmlu/default/_default_template_yaml"


def define(folder: Path, task: str, rows: int, **changes: Any) -> None:
    """Write a definition of one of TASKS, on rows of ours."""
    definition, split, make = TASKS[task]
    file = write_rows(folder.parent / f"{task}.jsonl", make(rows))
    others = {f"{other}_split": None for other in ("training", "validation", "test") if other != split}
    write_definition(folder, task, definition, {split: file}, **others, **changes)


def log_likelihoods(scores: HarnessScores, task: str) -> list[list[float]]:
    """Return those of each item's choices, in the order of the rows."""
    items = sorted((item for item in scores.items if item["task"] == task), key=lambda item: item["item"])
    return [[response[0] for response in item["responses"]] for item in items]


@with_harness
def test_scores_equal_those_of_the_harness(
    run: Run, make_examinee: MakeExaminee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examinee = make_examinee()
    subject = "marketing"
    asked, solved = hub_rows(subject, 6), hub_rows(subject, 5, kind="example")
    files = {"test": write_rows(tmp_path / "asked.jsonl", asked), "dev": write_rows(tmp_path / "dev.jsonl", solved)}
    header = BenchmarkConfig.header.replace("{subject}", subject)
    write_definition(tmp_path / "tasks", "mmlu", MMLU, files, description=header)
    for task in TASKS:
        define(tmp_path / "tasks", task, rows=6)

    def ask(*tasks: str, **options: Any) -> HarnessScores:
        manager = task_manager(tmp_path / "tasks")
        return harness_scores(
            examinee.model, examinee.tokenizer, tasks, manager, max_length_tokens=examinee.max_length_tokens, **options
        )

    theirs = ask("mmlu", shots=5, batch_size=3)
    ours = run("mmlu", asked, examinee, shots=5, examples=RowsConfig(kind="file", path="dev.jsonl"))
    assert ours.metrics["hendrycks_micro"] == theirs.metrics["mmlu/acc"]
    for item, scores in zip(ours.items["mmlu"], log_likelihoods(theirs, "mmlu"), strict=True):
        first = item["logits"][0] - scores[0]  # the log of the sum, which is the same for all letters
        # float32 logits, normalised or not
        assert item["logits"] == pytest.approx([score + first for score in scores], abs=1e-4)

    theirs = ask(*TASKS, batch_size=5)
    for task, (_, _, rows) in TASKS.items():
        mine = run(task, rows(6), examinee)
        found = {name.removeprefix(f"{task}/"): value for name, value in theirs.metrics.items()}
        compared = mine.metrics.keys() & found.keys()
        assert compared >= ({"pct_stereotype", "likelihood_diff"} if task == "crows_pairs" else {"acc"})
        assert compared >= {"acc_norm"} or task in ("winogrande", "crows_pairs")
        assert {name: mine.metrics[name] for name in compared} == pytest.approx(
            {name: found[name] for name in compared}, rel=1e-4
        )
        if task != "crows_pairs":
            for item, scores in zip(mine.items[task], log_likelihoods(theirs, task), strict=True):
                assert item["log_likelihoods"] == pytest.approx(scores, rel=1e-4)


@with_harness
def test_the_harness_asks_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model as it was trained: quantized, with its adapter."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = finished(tmp_path / "runs", "quant=nf4", "optim.learning_rate=0.05", "evaluation.rows=2")
    metrics = [{"metric": metric} for metric in ("acc", "acc_norm", "f1")]  # f1's values are pairs, of numpy's numbers
    define(tmp_path / "tasks", "piqa", rows=8, metric_list=metrics)

    def ask(*words: str) -> dict[str, Any]:
        paths = [f"paths.{name}={tmp_path / place}" for name, place in (("runs_dir", "runs"), ("data_dir", "."))]
        with hydra_on_conf(evaluate_schema=EvaluateConfig):
            evaluate(compose("evaluate", [f"run={folder.run_id}", "threads=1", *paths, *words]))
        *_, last = capsys.readouterr().out.splitlines()
        found = Path(last.removeprefix(f"{folder.run_id}: "))
        return {
            "items": [json.loads(line) for line in (found / "items.jsonl").read_text().splitlines()],
            **json.loads((found / "result.json").read_text()),
        }

    theirs = ask("evaluation=harness", "evaluation.harness.tasks=[piqa]", "evaluation.harness.definitions=tasks")
    ours = ask("evaluation=piqa", "evaluation.benchmarks.piqa.path=piqa.jsonl")
    for metric in ("acc", "acc_norm"):
        mine = ours["metrics"][f"eval/piqa/validation/0shot/{metric}"]
        assert theirs["metrics"][f"eval/harness/piqa/{metric}"] == mine
    for their, our in zip(theirs["items"], ours["items"], strict=True):
        assert [score for score, _ in their["responses"]] == pytest.approx(our["log_likelihoods"], rel=1e-4)
    monkeypatch.setattr("qlora_lab.evaluation.run_model.open_model", None)  # not needed: it is finished
    again = ["evaluation=harness", "evaluation.harness.tasks=[piqa]", "evaluation.harness.definitions=tasks"]
    assert ask(*again, "evaluation.harness.batch_size=3") == theirs
    with pytest.raises(ConfigError, match=r"tasks defines no task 'piqua'; did you mean 'piqa'"):
        ask("evaluation=harness", "evaluation.harness.tasks=[piqua]", "evaluation.harness.definitions=tasks")


def own_task(folder: Path) -> Path:
    """Write a definition of rows in a file elsewhere, by way of one that it includes; return that file."""
    rows = write_rows(folder.parent / "rows.jsonl", piqa_rows(2))
    template = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": [str(rows)]}}}
    (folder.parent / "template_yaml").write_text(yaml.safe_dump(template))
    folder.mkdir()
    (folder / "own.yaml").write_text("task: own\ninclude: ../template_yaml\ndoc_to_text: !function words.text\n")
    (folder / "words.py").write_text("def text(doc): return doc['goal']\n")
    return rows


def test_other_rows_or_definitions_are_another_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    rows = own_task(folder)
    first = definitions_sha256(folder)
    (folder / "__pycache__").mkdir()  # as reading a `!function` leaves it
    (folder / "__pycache__" / "words.cpython-311.pyc").write_bytes(b"compiled")
    assert definitions_sha256(folder) == first
    whole = rows.read_bytes()
    rows.write_bytes(whole + b"\n")
    second = definitions_sha256(folder)
    (folder / "words.py").write_text("def text(doc): return doc['sol1']\n")
    assert len({first, second, definitions_sha256(folder)}) == 3


def test_hub_sets_are_told_from_local_rows() -> None:
    configs = {
        "own": {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}},
        "boolq": {"dataset_path": "super_glue", "dataset_kwargs": None},
        "piqa": {"dataset_path": "some/piqa", "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}},
    }
    assert sets_of_hub(configs) == ["some/piqa", "super_glue"]


def test_a_folder_here_is_no_part_of_a_hub_set_that_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    row = tmp_path / "data" / "rows.jsonl"
    row.write_text("{}")
    template = tmp_path / "template_yaml"
    template.write_text(yaml.safe_dump({"dataset_kwargs": {"data_dir": "data"}}))
    task = tmp_path / "task.yaml"
    for path, expected in (("some/piqa", set()), ("json", {("data", Path("data/rows.jsonl"))})):
        task.write_text(yaml.safe_dump({"include": "template_yaml", "dataset_path": path}))
        assert local_rows([task, template]) == expected


def test_what_the_harness_finds_is_kept_as_json_has_it() -> None:
    results = {"own": {"alias": "own", "acc,none": np.float32(0.5), "f1,strict": 1, "acc_stderr,none": "N/A"}}
    assert metrics_of(results) == {"own/acc": 0.5, "own/f1/strict": 1.0}
    sample = {
        "doc_id": 3, "target": {"of": np.int64(1)}, "filter": "strict", "filtered_resps": [np.arange(2.0)],
        "metrics": ["f1"], "f1": (np.float32(1), {"gold": np.ones(1)}),
    }  # fmt: skip
    item = {"task": "own", "item": 3, "filter": "strict", "target": {"of": 1}, "responses": [[0.0, 1.0]]}
    assert json.loads(json.dumps(item_of("own", sample))) == item | {"f1": [1.0, {"gold": [1.0]}]}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Dataset scripts are no longer supported,\nbut found own.py"),
        DatasetGenerationError("An error occurred"),
        ImportError("install sacrebleu"),
    ],
)
def test_data_that_do_not_load_are_one_sentence(error: Exception) -> None:
    class Manager:
        def load(self, name: str) -> None:
            raise error

    with pytest.raises(DataError, match=r"cannot read the data of 'own': \w") as refusal:
        loaded_tasks(Manager(), "own")
    assert "\n" not in str(refusal.value)


def test_without_the_harness_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"install it with pip install 'qlora_lab\[harness\]'"):
        harness_tasks(HarnessConfig(tasks=["boolq"]), data_dir=tmp_path)
    with pytest.raises(DataError, match=r"harness\.definitions 'none' is no folder"):
        harness_tasks(HarnessConfig(tasks=["boolq"], definitions="none"), data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"harness\.tasks must name tasks"):
        HarnessConfig(tasks=[]).check()
