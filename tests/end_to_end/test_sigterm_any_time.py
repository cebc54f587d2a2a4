"""SIGTERM at any moment of training: every step that was taken is in metrics.jsonl and in W&B's file."""

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from analysis.sources.wandb_log import read_wandb_file
from qlora_lab.runs.folder import INTERRUPTED, RunFolder
from qlora_lab.runs.mirror import STEP
from tests.command_line import call
from tests.wandb_file import records

TERMINATED = 143
TRAINING = [
    "model=tiny_random",
    "data.rows=32",
    "evaluation.rows=16",
    "tracking=wandb_offline",
    "trainer.threads=1",
    "trainer.max_steps=100000",
    "trainer.checkpoint_every_steps=100000",
]


@pytest.mark.usefixtures("isolated_wandb")
@pytest.mark.parametrize("moment", range(4))
def test_no_step_is_lost(moment: int, tmp_path: Path) -> None:
    draw = random.Random(moment)
    steps, into_a_step_s = draw.randint(1, 40), draw.uniform(0, 0.05)
    over = threading.Event()
    with ThreadPoolExecutor(1) as other:
        seen = other.submit(terminate_after, steps, into_a_step_s, tmp_path, over)  # this process, which has torch
        done = call("qlora_lab.train.__main__", *TRAINING, f"paths.runs_dir={tmp_path}", cwd=tmp_path)
        over.set()
    assert done.returncode == TERMINATED, done.stderr
    (folder,) = (RunFolder(file.parent) for file in tmp_path.glob("*/config.yaml"))
    assert folder.state() == INTERRUPTED
    (checkpoint,) = folder.checkpoints.glob("step_*")
    taken = list(range(1, 1 + int(checkpoint.name.removeprefix("step_"))))
    assert len(taken) >= seen.result()
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == taken
    (file,) = folder.path.glob("wandb/offline-run-*/*.wandb")
    records(file)  # waits for its end
    assert [line[STEP] for line in read_wandb_file(file).history if "train/loss" in line] == taken


def terminate_after(steps: int, into_a_step_s: float, runs_dir: Path, over: threading.Event) -> int:
    """End this process once a run has written so many lines and that time has passed; returns what was there then."""
    while (seen := sum(file.read_bytes().count(b"\n") for file in runs_dir.glob("*/metrics.jsonl"))) < steps:
        if over.wait(0.002):
            return seen
    time.sleep(into_a_step_s)
    os.kill(os.getpid(), signal.SIGTERM)
    return seen
