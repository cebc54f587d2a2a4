"""Runs of tiny random models, executed to their end for tests to evaluate."""

from dataclasses import replace
from pathlib import Path

from qlora_lab import run
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.helpers import tiny

LAPTOP = Hardware("some CPU", frozenset(), 2, ())


def planned(runs_dir: Path, *overrides: str) -> RunFolder:
    """Create the folder of a run of a few steps, which has not begun."""
    config = tiny(runs_dir, "data.rows=8", "evaluation.rows=8", "trainer.device=cpu", "trainer.max_steps=2", *overrides)
    resolved = resolve(config, LAPTOP, lambda source: None)
    resolved = replace(resolved, trainer=replace(resolved.trainer, threads=1))
    return RunFolder.create(runs_dir, run_id(resolved), resolved)


def finished(runs_dir: Path, *overrides: str) -> RunFolder:
    folder = planned(runs_dir, *overrides)
    assert run.execute(folder.path) == FINISHED
    return folder
