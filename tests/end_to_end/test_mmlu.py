"""MMLU on a finished run of the embedded model, as it is asked for at a shell."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import call

ASKED = {"miscellaneous": 3, "world_religions": 2}  # questions of each subject, after five that are worked examples
TRAINING = (
    *("model=smollm2_135m", "data.rows=8", "trainer.max_steps=1", "trainer.threads=1", "tracking=none"),
    *("trainer.batch_size=1", "evaluation.rows=1", "evaluation.max_new_tokens=24", "evaluation.sample_generations=0"),
)
PATIENCE_S = 240  # a process that opens the model takes ten seconds to start, and more on a busy machine


def split(file: Path, folder: Path) -> tuple[Path, Path]:
    """Write questions and worked examples of the study's file, and return their files."""
    kinds: dict[str, list[str]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        subject = json.loads(line)["subject"]
        if seen[subject] < 5 + ASKED.get(subject, 0):
            kinds["solved" if seen[subject] < 5 else "asked"].append(line)
        seen[subject] += 1
    for kind, lines in kinds.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "asked.jsonl", folder / "solved.jsonl"


@pytest.mark.smollm2
def test_five_shots_are_asked_of_a_finished_run(tmp_path: Path, data_slices: Path) -> None:
    runs_dir = f"paths.runs_dir={tmp_path / 'runs'}"
    trained = call("qlora_lab.train.__main__", *TRAINING, runs_dir, cwd=Path.cwd())
    assert trained.returncode == 0, trained.stderr
    (run,) = (file.parent for file in (tmp_path / "runs").glob("*/config.yaml"))
    asked, solved = split(data_slices / "qlora_eval/zero_shot_mmlu_val.json", tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "qlora_lab.evaluate", f"run={run.name}", "evaluation=mmlu", "threads=1", runs_dir),
            *(f"evaluation.benchmarks.mmlu.{key}={value}" for key, value in (("path", asked), ("split", "validation"))),
            f"evaluation.benchmarks.mmlu.examples.path={solved}",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mmlu:   0%|" in done.stderr and "| 5/5 [" in done.stderr, "a progress bar"
    (folder,) = run.glob("evaluations/mmlu-*")
    items: list[dict[str, Any]] = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert Counter(item["subject"] for item in items) == ASKED and {item["shots"] for item in items} == {5}
    right = {subject: sum(item["correct"] for item in items if item["subject"] == subject) for subject in ASKED}
    micro, macro = sum(right.values()) / 5, sum(right[subject] / count for subject, count in ASKED.items()) / 2
    shown = {line.split()[2]: line.split()[3] for line in done.stdout.splitlines() if " eval/mmlu/" in line}
    assert shown["eval/mmlu/validation/5shot/hendrycks_micro"] == f"{micro:.3f}"
    assert shown["eval/mmlu/validation/5shot/qlora_macro"] == f"{macro:.3f}"
