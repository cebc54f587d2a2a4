"""The same study with Hydra's own sweeper and launcher."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.command_line import call

STUDY = """# @package _global_
study:
  question: why?
  zip: [[quant, adapter.rank]]
  exclude: [{quant: nf4, seed: 1}]
hydra:
  sweeper:
    params: {quant: "none,nf4", adapter.rank: "4,8", seed: "0,1"}
"""
TINY = [
    "model=tiny_random",
    "tracking=none",
    "data.rows=16",
    "evaluation.rows=16",
    "trainer.max_steps=1",
    "trainer.threads=1",
]
STOCK = ["hydra/sweeper=basic", "hydra/launcher=basic"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sweeps" / "experiment").mkdir(parents=True)
    (tmp_path / "sweeps" / "experiment" / "mine.yaml").write_text(STUDY)
    (tmp_path / "sweeps" / "experiment" / "listed.yaml").write_text(
        "# @package _global_\nstudy: {combinations: [{quant: none, seed: 1}, {quant: nf4, seed: 2}]}\n"
    )
    return tmp_path


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return call("qlora_lab.sweep.__main__", *TINY, "evaluation.max_new_tokens=24", *overrides, cwd=folder)


def test_stock_sweeper_and_launcher_plan_the_same_runs(folder: Path) -> None:
    ours = sweep(folder, "+experiment=mine", "sweep.action=plan")
    stock = sweep(folder, "+experiment=mine", "sweep.action=plan", *STOCK)
    assert (ours.returncode, stock.returncode) == (0, 0), stock.stderr
    runs = re.findall(r"\b[0-9a-f]{12}\b", ours.stdout)
    assert len(runs) == 3 and runs == re.findall(r"^[0-9a-f]{12}\b", stock.stdout, re.MULTILINE)
    assert stock.stdout.count("left out by study.zip") == 3 and stock.stdout.count("left out by study.exclude") == 2


def test_stock_sweeper_and_launcher_execute_a_run(folder: Path) -> None:
    done = sweep(folder, "+experiment=mine", "quant=nf4", "adapter.rank=8", "seed=0", *STOCK)
    assert done.returncode == 0, done.stderr
    (run,) = re.findall(r"run ([0-9a-f]{12}): eval/loss [\d.]+", done.stdout)
    assert (folder / "runs" / run / "result.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "sweeps"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["+experiment=listed"], "study.combinations needs our own sweeper"),
        (["+experiment=mine", "sweep.action=status"], "sweep.action=status is about a study as a whole"),
    ],
)
def test_what_stock_sweepers_cannot_do_is_refused(folder: Path, overrides: list[str], sentence: str) -> None:
    done = sweep(folder, *overrides, *STOCK)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
