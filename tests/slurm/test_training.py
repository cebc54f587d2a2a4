"""Real training on the cluster, from the command line: interrupted runs end with the bits of uninterrupted ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from qlora_lab.runs.folder import FINISHED, RunFolder
from tests.slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).parents[2]
STUDY = [
    "model=tiny_random",
    "data.rows=32",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "seed=0,1",
    "adapter.dropout=0.1",
    "trainer.max_steps=60",
    "trainer.checkpoint_every_steps=10",
]
ON_SLURM = ["launcher=slurm", "launcher.slurm.cpus_per_run=1", "launcher.slurm.memory_gb=4"]


def sweep(cluster: Cluster, runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_lab.sweep",
            *STUDY,
            f"paths.runs_dir={runs_dir}",
            "trainer.threads=1",
            *overrides,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def weights(runs_dir: Path) -> dict[str, bytes]:
    return {file.parent.parent.name: file.read_bytes() for file in runs_dir.glob("*/adapter/adapter_model.safetensors")}


def test_interrupted_runs_end_with_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    straight = sweep(cluster, tmp_path / "straight", "launcher=in_process")
    assert straight.returncode == 0, straight.stderr
    done = sweep(cluster, tmp_path / "slurm", *ON_SLURM)
    assert done.returncode == 0 and "submitted 2 runs" in done.stdout, done.stderr
    runs = [RunFolder(tmp_path / "slurm" / run_id) for run_id in weights(tmp_path / "straight")]
    hit: set[str] = set()

    def interrupt_each_once() -> bool:
        for run in runs:
            status = run.status()
            if run.run_id not in hit and status is not None and any(run.checkpoints.glob("step_*")):
                hit.add(run.run_id)
                os.kill(status["pid"], [signal.SIGUSR2, signal.SIGKILL][len(hit) - 1])
        return len(hit) == 2

    wait_until(interrupt_each_once, 200, every_s=0.02)
    wait_until(cluster.quiet, 120)
    patient = sweep(cluster, tmp_path / "slurm", *ON_SLURM, "launcher.wait=true")
    assert patient.returncode == 0, patient.stderr
    assert [run.state() for run in runs] == [FINISHED] * 2
    assert weights(tmp_path / "slurm") == weights(tmp_path / "straight")
    assert all((run.status() or {})["attempt"] == 2 for run in runs)


def test_a_pool_on_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    given = ["trainer.max_steps=2", "optim.learning_rate=1e-3,2e-3", "launcher.pool=true", "launcher.max_parallel=1"]
    done = sweep(cluster, tmp_path, *ON_SLURM, *given, "launcher.wait=true")
    assert done.returncode == 0, done.stderr
    runs = [RunFolder(file.parent) for file in tmp_path.glob("*/config.yaml")]
    assert [run.state() for run in runs] == [FINISHED] * 4
    assert len({(run.status() or {})["pid"] for run in runs}) == 2, "the canary, and one worker for the rest"
