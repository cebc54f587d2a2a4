"""launcher=slurm without a cluster: submitit's own submission path against commands that only look like SLURM's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder

STUDY = [
    "model=tiny_random",
    "data.rows=16",
    "evaluation.rows=16",
    "evaluation.max_new_tokens=24",
    "tracking=none",
    "trainer.max_steps=1",
    "launcher=slurm",
    "launcher.slurm.gpus_per_run=0",
    "launcher.slurm.cpus_per_run=1",
]
# Starts the tasks of a job array in the background, as a cluster would; a node knows nothing of the login shell.
SBATCH = """#!/bin/bash
script="${@: -1}"; cp "$script" "$FAKE_SLURM/script"
last=$(grep -oE -- "--array=0-[0-9]+" "$script" | grep -oE "[0-9]+$")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((43 + task)) SLURM_ARRAY_JOB_ID=42 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_PROCID=0 \\
    bash "$script" > "$FAKE_SLURM/task$task" 2>&1 < /dev/null &
done
echo "Submitted batch job 42"
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = "#!/bin/bash\necho 'JobID|State|NodeList'\n"  # accounting is slow: it knows of no job yet


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put sbatch, srun and sacct on the PATH; the folder returned holds them and what they leave."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={runs_dir}", *overrides]


def sweep(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs_dir, *overrides), capture_output=True, text=True, check=False, timeout=240)


def test_a_study_runs_as_a_job_array(slurm: Path, tmp_path: Path) -> None:
    """One run finishes and one fails, which its folder says long before SLURM's accounting does."""
    runs_dir = tmp_path / "runs"
    done = sweep(
        runs_dir,
        "optim.learning_rate=1e39,1e-3",
        "optim.warmup_share=0",
        "optim.schedule=constant",
        "launcher.slurm.partition=gpu",
        "launcher.slurm.memory_gb=3",
        "launcher.slurm.setup=[hostname]",
    )
    assert done.returncode == 1, done.stderr
    assert "submitted 2 runs as job array 42" in done.stdout
    folders = [RunFolder(file.parent) for file in runs_dir.glob("*/config.yaml")]
    assert sorted(folder.state() for folder in folders) == [FAILED, FINISHED]
    assert {folder.config().trainer.threads for folder in folders} == {1}
    script = (slurm / "script").read_text()
    for option in ("--array=0-1%2", "--partition=gpu", "--mem=3GB", "--cpus-per-task=1", "--time=240"):
        assert f"#SBATCH {option}" in script
    (plan,) = (runs_dir / "studies" / "study").glob("*/plan.json")
    assert len(json.loads(plan.read_text())["runs"]) == 2


def test_what_sbatch_refuses_is_said(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    done = sweep(tmp_path / "runs", "seed=0,1", "launcher.slurm.partition=gpu")
    assert done.returncode == 2
    assert "sbatch refused the runs (sbatch: error: invalid partition specified: gpu)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_that_its_jobs_go_on(
    slurm: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'Submitted batch job 42'\n")  # they wait in the queue
    process = subprocess.Popen(
        command(tmp_path / "runs", "seed=0,1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "submitted 2 runs" not in (line := process.stdout.readline()):
        assert line, "it ended before it submitted"
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "job array 42 goes on without this command; to stop it too: scancel 42" in said
    assert "Traceback" not in said


def test_a_machine_without_slurm_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun here, whatever the machine has
    done = sweep(tmp_path)
    assert done.returncode == 2
    assert "launcher=slurm needs sbatch on this machine" in done.stderr and "Traceback" not in done.stderr
