"""A run's folder, its mirror in W&B's files, and the W&B project they are synced into say the same, cell by cell."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import wandb

from analysis.load import Source, load_history, load_runs
from qlora_lab import sync
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from qlora_lab.runs.identity import run_id
from qlora_lab.runs.metrics_file import MetricsFile
from qlora_lab.tracking.session import open_session
from tests.helpers import tiny
from tests.wandb_file import records
from tests.wandb_stand_in import WandbStandIn

LAPTOP = Hardware("some CPU", frozenset(), 2, ())
EXIT_BYTES = 12  # of the last record, which a killed run does not write
KILLED = "killed"
RESULT = {"metrics": {"eval/loss": 0.5}, "quantized_share": 1.0, "data": {"train": {"rows": 4}}}


def attempt(runs_dir: Path, seed: int, end: str, steps: Iterable[int]) -> None:
    """Record an attempt as `qlora_lab.run` does; of one that is killed nobody says how it ended."""
    overrides = ("tracking=wandb_offline", "trainer.device=cpu", f"seed={seed}")
    config = resolve(tiny(runs_dir, *overrides), LAPTOP, lambda source: None)
    folder = RunFolder.create(runs_dir, run_id(config), config)
    with folder.lock():
        folder.begin()
        session = open_session(config, folder.run_id, "a_study", folder.path)
        folder.write_environment({"threads": 1, "packages": {"torch": "2"}, "instructions": ["a", "b"]})
        session.begin(folder.summary())
        metrics = MetricsFile(folder, time.monotonic)
        for step in steps:
            session.log(step, metrics.append(step, {"train/loss": 1 / step, "train/norm": float("nan")}))
        if end == KILLED:
            wandb.finish()
            (file,) = folder.path.glob("wandb/*/*.wandb")
            records(file, timeout_s=240)
            file.write_bytes(file.read_bytes()[:-EXIT_BYTES])
            os.utime(file, (0, 0))
            file.parent.rename(file.parent.with_name(f"offline-run-20260101_000000-{folder.run_id}"))  # long ago
            return
        if end == FINISHED:
            folder.write_result(RESULT)
        folder.end(end, 3.0, ValueError("why") if end == FAILED else None)
        session.finish(end, folder.summary())
    records(max(folder.path.glob("wandb/*/*.wandb")), timeout_s=240)  # `finish` does not wait for it


def test_the_three_sources_agree_on_the_same_runs(tmp_path: Path, wandb_server: WandbStandIn) -> None:
    runs_dir = tmp_path / "runs"
    attempt(runs_dir, 0, FAILED, range(1, 4))
    attempt(runs_dir, 1, INTERRUPTED, range(1, 4))
    attempt(runs_dir, 2, KILLED, range(1, 4))
    attempt(runs_dir, 3, KILLED, range(1, 4))
    attempt(runs_dir, 3, FINISHED, range(3, 6))  # from a checkpoint: a step is taken again
    sync.main([str(runs_dir)])
    mirrors = sorted(runs_dir.glob("*/wandb"))
    (project,) = {f"wandb://{entity}/{project}" for entity, project, _ in wandb_server.runs}
    sources: Sequence[Source] = (runs_dir, mirrors, project)
    folders, *others = (by_id(load_runs(source, cache=False)) for source in sources)
    assert sorted(folders["state"]) == ["failed", "finished", "interrupted", "running"]
    assert sorted(folders["attempt"]) == [1, 1, 1, 2]
    for mirrored in others:
        assert set(mirrored.columns) == set(folders.columns)
        pd.testing.assert_frame_equal(mirrored[folders.columns], folders, check_exact=True)
    curves, *others = (load_history(source, cache=False) for source in sources)
    assert len(curves) == 14
    for mirrored in others:
        mirrored = mirrored.sort_values(["run_id", "step"], ignore_index=True)
        pd.testing.assert_frame_equal(mirrored[curves.columns], curves, check_exact=True)


def by_id(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.set_index("run_id").sort_index().drop(columns="folder")
