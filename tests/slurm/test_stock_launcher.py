"""The same study through Hydra's own sweeper and hydra-submitit-launcher, on a real SLURM."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.runs.folder import FINISHED, RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.study import ROOT

PATIENCE_S = 300
STUDY = [
    "+experiment=dataset_quality",
    "model=tiny_random",
    "data=procedural_clean_128",
    "data.rows=16",
    "seed=0,1",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.max_steps=2",
    "trainer.threads=1",
]
STOCK = ["hydra/sweeper=basic", "hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=2"]


def test_stock_sweeper_and_submitit_launcher_execute_a_study(cluster: Cluster, tmp_path: Path) -> None:
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra-submitit-launcher is not installed: pip install hydra-submitit-launcher")
    command = [sys.executable, "-m", "qlora_lab.sweep", *STUDY, *STOCK, "hydra.launcher.timeout_min=10"]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    folders = [RunFolder(path) for path in (tmp_path / "runs").iterdir() if re.fullmatch(r"[0-9a-f]{12}", path.name)]
    assert len(folders) == 2 and all(folder.state() == FINISHED for folder in folders)
    assert all((folder.status() or {})["job"] is not None for folder in folders), "they ran as jobs"
