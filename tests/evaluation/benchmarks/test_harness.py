"""Our scores beside those of lm-evaluation-harness, on the same rows and the same tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config.schema import BenchmarkConfig, RowsConfig
from qlora_lab.evaluation.benchmarks.harness import HarnessTask, harness_scores
from tests.evaluation.benchmarks.choice_rows import arc_rows, hellaswag_rows, piqa_rows, winogrande_rows
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run, write_rows
from tests.evaluation.benchmarks.test_crows_pairs import ROWS as SENTENCE_PAIRS
from tests.evaluation.benchmarks.test_mmlu import hub_rows

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'qlora_lab[harness]'")

TASKS: dict[str, tuple[str, str, Callable[[int], list[dict[str, Any]]]]] = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", hellaswag_rows),
    "piqa": ("piqa/piqa.yaml", "validation", piqa_rows),
    "arc": ("arc/arc_easy.yaml", "test", arc_rows),
    "winogrande": ("winogrande/default.yaml", "validation", winogrande_rows),
    "crows_pairs": ("crows_pairs/crows_pairs_english.yaml", "test", lambda count: SENTENCE_PAIRS[:count]),
}


def without_other_splits(split: str) -> dict[str, Any]:
    return {f"{other}_split": None for other in ("training", "validation", "test") if other != split}


def test_scores_equal_those_of_the_harness(
    run: Run, make_examinee: MakeExaminee, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examinee = make_examinee()
    subject = "marketing"
    asked, solved = hub_rows(subject, 6), hub_rows(subject, 5, kind="example")
    files = {"test": write_rows(tmp_path / "asked.jsonl", asked), "dev": write_rows(tmp_path / "dev.jsonl", solved)}
    header = BenchmarkConfig.header.replace("{subject}", subject)
    tasks = {"mmlu": HarnessTask("mmlu/default/_default_template_yaml", files, {"description": header})}
    theirs = harness_scores(examinee, tasks, shots=5, batch_size=3)["mmlu"]
    ours = run("mmlu", asked, examinee, shots=5, examples=RowsConfig(kind="file", path="dev.jsonl"))
    assert ours.metrics["hendrycks_micro"] == theirs.metrics["acc"]
    for item, scores in zip(ours.items["mmlu"], theirs.log_likelihoods, strict=True):
        first = item["logits"][0] - scores[0]  # the log of the sum, which is the same for all letters
        # float32 logits, normalised or not
        assert item["logits"] == pytest.approx([score + first for score in scores], abs=1e-4)

    tasks = {
        task: HarnessTask(
            definition, {split: write_rows(tmp_path / f"{task}.jsonl", rows(6))}, without_other_splits(split)
        )
        for task, (definition, split, rows) in TASKS.items()
    }
    found = harness_scores(examinee, tasks, batch_size=5)
    for task, (_, _, rows) in TASKS.items():
        mine = run(task, rows(6), examinee)
        compared = mine.metrics.keys() & found[task].metrics.keys()
        assert compared >= ({"pct_stereotype", "likelihood_diff"} if task == "crows_pairs" else {"acc"})
        assert compared >= {"acc_norm"} or task in ("winogrande", "crows_pairs")
        assert {name: mine.metrics[name] for name in compared} == pytest.approx(
            {name: found[task].metrics[name] for name in compared}, rel=1e-4
        )
        if task != "crows_pairs":
            for item, scores in zip(mine.items[task], found[task].log_likelihoods, strict=True):
                assert item["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
