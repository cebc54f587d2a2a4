"""The mirror of a run in W&B's files says what the run folder says, cell by cell."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.load import load_history, load_runs
from qlora_lab import run
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.helpers import tiny

LAPTOP = Hardware("some CPU", frozenset(), 2, ())
FIRST = ["run_id", "step", "time_s"]


def executed(runs_dir: Path, state: str, *overrides: str) -> RunFolder:
    given = ("data.rows=16", "evaluation.max_new_tokens=24", "trainer.device=cpu", "tracking=wandb_offline")
    config = resolve(tiny(runs_dir, *given, *overrides), LAPTOP, lambda source: None)
    config = replace(config, trainer=replace(config.trainer, threads=1))
    folder = RunFolder.create(runs_dir, run_id(config), config)
    assert run.execute(folder.path) == state
    return folder


def test_the_mirror_agrees_with_the_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    runs_dir = tmp_path / "runs"
    executed(runs_dir, FINISHED, "evaluation.before_training=true")
    executed(runs_dir, FAILED, "optim.learning_rate=1e30", "optim.max_grad_norm=1e30")
    mirrors = sorted(runs_dir.glob("*/wandb"))
    assert len(mirrors) == 2
    folders, mirrored = load_runs(runs_dir, cache=False), load_runs(mirrors, cache=False)
    assert sorted(folders["state"]) == ["failed", "finished"]
    pd.testing.assert_frame_equal(
        mirrored.drop(columns="folder").reindex(columns=folders.columns.drop("folder")),
        folders.drop(columns="folder"),
        check_exact=True,
    )
    assert set(mirrored.columns) == set(folders.columns)
    curves, mirrored_curves = load_history(runs_dir, cache=False), load_history(mirrors, cache=False)
    names = sorted(set(curves.columns) - set(FIRST))
    assert "train/loss" in names and len(curves) >= 4
    pd.testing.assert_frame_equal(mirrored_curves[FIRST + names], curves[FIRST + names], check_exact=True)
