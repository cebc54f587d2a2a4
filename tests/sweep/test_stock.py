"""The same study with Hydra's own sweeper and launcher."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
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
# Of its four runs one is left out, and one diverges.
SEARCH = """# @package _global_
study:
  question: which?
  exclude: [{optim.learning_rate: 1e39, seed: 1}]
optim: {schedule: constant, warmup_share: 0}
hydra:
  sweeper:
    params: {optim.learning_rate: "choice(1e39,1e-3)", seed: "choice(0,1)"}
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
OPTUNA = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra/launcher=basic", "hydra.sweeper.n_jobs=1"]
without_optuna = pytest.mark.skipif(
    not (find_spec("hydra_plugins") and find_spec("hydra_plugins.hydra_optuna_sweeper")),
    reason="hydra-optuna-sweeper is not installed: pip install hydra-optuna-sweeper",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sweeps" / "experiment").mkdir(parents=True)
    (tmp_path / "sweeps" / "experiment" / "mine.yaml").write_text(STUDY)
    (tmp_path / "sweeps" / "experiment" / "search.yaml").write_text(SEARCH)
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


def test_after_a_failure_a_stock_sweeper_executes_the_others(folder: Path) -> None:
    done = sweep(folder, "+experiment=search", "seed=0", *STOCK)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: run [0-9a-f]{12} failed: .*not finite", done.stderr, re.MULTILINE)
    assert sorted(states(folder).values()) == [FAILED, FINISHED]


def states(folder: Path) -> dict[str, str]:
    return {file.parent.name: RunFolder(file.parent).state() for file in folder.glob("runs/*/status.json")}


@without_optuna
def test_optunas_sweeper_finds_the_best_run(folder: Path) -> None:
    drawn = ["hydra.sweeper.sampler.seed=5", "hydra.sweeper.n_trials=4"]  # each of the four once
    done = sweep(folder, "+experiment=search", *OPTUNA, *drawn, "hydra.sweeper.max_failure_rate=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out by study.exclude") == 1
    ended = states(folder)
    assert sorted(ended.values()) == [FAILED, FINISHED, FINISHED]
    found = yaml.safe_load((folder / "runs" / ".hydra" / "optimization_results.yaml").read_text())
    losses = {
        str(run.config().seed): run.result()["metrics"]["eval/loss"]
        for run in (RunFolder(folder / "runs" / run_id) for run_id, state in ended.items() if state == FINISHED)
    }
    assert found["best_value"] == min(losses.values())
    assert str(found["best_params"]["seed"]) == min(losses, key=losses.__getitem__)


@without_optuna
def test_optunas_sweeper_looks_the_way_the_study_does(folder: Path) -> None:
    done = sweep(folder, "+experiment=search", *OPTUNA, "hydra.sweeper.n_trials=1", "study.goal=max")
    assert done.returncode == 2 and not states(folder)
    assert "hydra.sweeper.direction must be maximize, since study.goal=max of eval/loss; got minimize" in done.stderr


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
