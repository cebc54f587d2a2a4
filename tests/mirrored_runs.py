"""Runs as W&B mirrors them offline, with the values that a test chooses; see the fixture `isolated_wandb`."""

from pathlib import Path
from typing import Any

import wandb

from analysis.sources.wandb_runs import wandb_files
from qlora_lab.runs.mirror import RECORDS, STEP
from tests.wandb_file import records

QUIET = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "x_save_requirements": False,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
}


def mirrored(folder: Path, run_id: str, lines: list[dict[str, Any]], summary: dict[str, Any], **config: Any) -> Path:
    """Write an offline run with W&B itself, and return its file."""
    before = set(wandb_files(folder / "wandb"))
    run = wandb.init(
        mode="offline", project="p", id=run_id, dir=str(folder), config=config, settings=wandb.Settings(**QUIET)
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, summary="none")
    for line in lines:
        run.log(line)
    run.summary.update(summary)
    run.finish()
    (file,) = set(wandb_files(folder / "wandb")) - before
    records(file, timeout_s=240)  # `finish` does not wait for it
    return file


def standing(state: str, **metrics: float) -> dict[str, Any]:
    status = {"state": state, "started_at": "2026-01-01T00:00:00", "ended_at": "2026-01-01T00:01:04", "attempt": 1}
    return {"status": state, **metrics, RECORDS: {"status": status, "environment": {"threads": 2}, "result": {"n": 7}}}
