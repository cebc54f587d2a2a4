"""Real training on the cluster, from the command line: interrupted runs end with the bits of uninterrupted ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlora_lab.runs.causes import DISK
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.small_disk import fill, small_disk
from tests.wandb_stand_in import Faults, wandb_stand_in

ROOT = Path(__file__).parents[2]
STUDY = [
    "model=tiny_random",
    "data.rows=32",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.device=cpu",  # for a cluster, runs are planned for GPUs unless told otherwise
    "seed=0,1",
    "adapter.dropout=0.1",
    "trainer.max_steps=60",
    "trainer.checkpoint_every_steps=10",
]
ON_SLURM = ["launcher=slurm", "launcher.slurm.cpus_per_run=1", "launcher.slurm.memory_gb=4"]


def sweep(
    cluster: Cluster,
    runs_dir: Path,
    *overrides: str,
    study: Sequence[str] = STUDY,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, **(variables or {}), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_lab.sweep",
            *study,
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


@pytest.fixture(scope="module")
def straight(whole_session: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of runs that nobody interrupted."""
    runs_dir = tmp_path_factory.mktemp("straight")
    done = sweep(whole_session, runs_dir, "launcher=in_process")
    assert done.returncode == 0, done.stderr
    return weights(runs_dir)


def newest_checkpoint(run: RunFolder) -> Path:
    return max(run.checkpoints.glob("step_*"))


def test_interrupted_runs_end_with_the_same_bits(cluster: Cluster, tmp_path: Path, straight: dict[str, bytes]) -> None:
    """One is told to stop; the other is killed, and then its newest checkpoint is damaged too."""
    done = sweep(cluster, tmp_path, *ON_SLURM)
    assert done.returncode == 0 and "submitted 2 runs" in done.stdout, done.stderr
    runs = [RunFolder(tmp_path / run_id) for run_id in straight]
    hit: list[RunFolder] = []

    def interrupt_each_once() -> bool:
        for run in runs:
            if run not in hit and len(list(run.checkpoints.glob("step_*"))) > 1:
                hit.append(run)
                os.kill((run.status() or {})["pid"], [signal.SIGUSR2, signal.SIGKILL][len(hit) - 1])
        return len(hit) == 2

    wait_until(interrupt_each_once, 200, every_s=0.02)
    wait_until(cluster.quiet, 120)
    damaged = newest_checkpoint(hit[1])
    os.truncate(damaged / "parameters.safetensors", 100)
    patient = sweep(cluster, tmp_path, *ON_SLURM, "launcher.wait=true")
    assert patient.returncode == 0, patient.stderr
    assert [run.state() for run in runs] == [FINISHED] * 2
    assert weights(tmp_path) == straight
    assert all((run.status() or {})["attempt"] == 2 for run in runs)
    log = Path((hit[1].status() or {})["log"]).read_text()
    assert f"checkpoint of step {int(damaged.name.partition('_')[2])} is damaged" in log


def test_a_full_disk_while_checkpointing(cluster: Cluster, tmp_path: Path, straight: dict[str, bytes]) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        done = sweep(cluster, disk, *ON_SLURM, "seed=0")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: any(disk.glob("*/checkpoints/step_*")), 200, every_s=0.02)
        (run,) = [RunFolder(file.parent) for file in disk.glob("*/config.yaml")]
        # less than a checkpoint, also after an older one was removed
        wait_until(lambda: fill(disk, leaving=50 << 10) and cluster.quiet(), 120)
        status = run.status() or {}
        assert (status["state"], status["cause"]) == (FAILED, DISK)
        assert "earlier checkpoints are as they were (step" in status["error"]["message"]
        fill(disk).unlink()
        patient = sweep(cluster, disk, *ON_SLURM, "seed=0", "launcher.wait=true")
        assert patient.returncode == 0, patient.stderr
        assert weights(disk) == {run.run_id: straight[run.run_id]}
        assert (run.status() or {})["attempt"] == 2


def test_a_pool_on_the_cluster_whose_tracking_is_turned_away(cluster: Cluster, tmp_path: Path) -> None:
    """No run minds that W&B's server answers all of them with 429."""
    given = ["trainer.max_steps=2", "optim.learning_rate=1e-3,2e-3", "launcher.pool=true", "launcher.max_parallel=1"]
    given += ["tracking=wandb_online", "tracking.init_timeout_s=3", "tracking.finish_timeout_s=1"]
    study = [override for override in STUDY if override != "tracking=none"]
    with wandb_stand_in() as server:
        server.faults = Faults(status=429)
        home = server.environment(tmp_path / "home")
        (tmp_path / "home").mkdir()
        done = sweep(cluster, tmp_path / "runs", *ON_SLURM, *given, "launcher.wait=true", study=study, variables=home)
        assert server.struck > 0
    assert done.returncode == 0, done.stderr
    runs = [RunFolder(file.parent) for file in (tmp_path / "runs").glob("*/config.yaml")]
    assert [run.state() for run in runs] == [FINISHED] * 4
    assert all(run.attempts() == 1 and any(run.path.glob("wandb/*/run-*.wandb")) for run in runs)
    assert len({(run.status() or {})["pid"] for run in runs}) == 2, "the canary, and one worker for the rest"
