"""launcher=slurm without a cluster, against commands that only look like SLURM's; with one: tests/slurm."""

import json
import os
import signal
import subprocess
import sys
import time
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
number=$(ls "$FAKE_SLURM" | grep -c script); script="$FAKE_SLURM/script$number"; cat > "$script"
last=$(grep -oE -- "--array=0-[0-9]+" "$script" | grep -oE "[0-9]+$")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=$((43 + task)) SLURM_ARRAY_JOB_ID=4$number SLURM_ARRAY_TASK_ID=$task \\
    bash "$script" > "$FAKE_SLURM/task$number.$task" 2>&1 < /dev/null &
done
echo "4$number"
"""
SCONTROL = "#!/bin/bash\necho 'MaxArraySize            = 1001'\n"
SQUEUE = "#!/bin/bash\n"  # everything is over as soon as one asks


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put sbatch, squeue and scontrol on the PATH; the folder returned holds them and what they leave."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def command(runs_dir: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={runs_dir}", *overrides]


def sweep(runs_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(runs_dir, *overrides), capture_output=True, text=True, check=False, timeout=240)


def test_a_study_is_submitted_and_left_alone(slurm: Path, tmp_path: Path) -> None:
    """The command ends at once; the same command later tells how the runs ended."""
    runs_dir = tmp_path / "runs"
    given = [
        "optim.learning_rate=1e39,1e-3",
        "optim.warmup_share=0",
        "optim.schedule=constant",
        "launcher.slurm.partition=gpu",
        "launcher.slurm.memory_gb=3",
        "launcher.slurm.setup=[hostname]",
    ]
    done = sweep(runs_dir, *given)
    assert done.returncode == 0, done.stderr
    assert "submitted 2 runs in jobs 40, 41" in done.stdout and "go on without this command" in done.stdout
    (plan,) = runs_dir.glob("studies/*/*/plan.json")
    folders = [RunFolder(runs_dir / run["run_id"]) for run in json.loads(plan.read_text())["runs"]]
    deadline = time.monotonic() + 300
    while sorted(folder.state() for folder in folders) != [FAILED, FINISHED]:
        assert time.monotonic() < deadline, [file.read_text() for file in slurm.glob("task*")]
        time.sleep(0.2)
    assert {folder.config().trainer.threads for folder in folders} == {1}
    causes = {(folder.status() or {})["cause"] for folder in folders}
    assert causes == {None, "nan"}
    script = (slurm / "script1").read_text()
    for option in ("--array=0-0", "--partition=gpu", "--mem=3G", "--cpus-per-task=1", "--time=240", "--comment="):
        assert f"#SBATCH {option}" in script
    assert "--dependency=afterok:40" in script and "\nhostname\n" in script
    (plan,) = (runs_dir / "studies" / "study").glob("*/plan.json")
    assert len(json.loads(plan.read_text())["runs"]) == 2
    after = sweep(runs_dir, *given, "sweep.retry_failed=false")
    assert after.returncode == 1 and "1 of 2 runs did not finish" in after.stderr


def test_what_sbatch_refuses_is_said(slurm: Path, tmp_path: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    done = sweep(tmp_path / "runs", "seed=0,1", "launcher.slurm.partition=gpu")
    assert done.returncode == 2
    assert "sbatch refused (sbatch: error: invalid partition specified: gpu)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_waits_may_be_stopped(slurm: Path, tmp_path: Path, signum: signal.Signals, status: int) -> None:
    (slurm / "sbatch").write_text('#!/bin/bash\ncat > "$FAKE_SLURM/script"\necho 42\n')
    # the job waits in the queue for ever
    (slurm / "squeue").write_text(
        """#!/bin/bash
[ -e "$FAKE_SLURM/script" ] || exit 0
echo "42|0|PENDING||normal|Priority|$(grep -o 'qlora_lab [0-9a-f]*' "$FAKE_SLURM/script" | head -1)"
"""
    )
    process = subprocess.Popen(
        command(tmp_path / "runs", "seed=0", "launcher.wait=true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "1 new" not in (line := process.stdout.readline()) or "runs" in line:
        assert line, process.communicate()[1]
    process.send_signal(signum)
    _, said = process.communicate(timeout=240)
    assert process.returncode == status
    assert "the runs go on without this command" in said
    assert "Traceback" not in said


def test_a_machine_without_slurm_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun here, whatever the machine has
    done = sweep(tmp_path)
    assert done.returncode == 2
    assert (
        "launcher=slurm needs sbatch, squeue and scontrol on this machine" in done.stderr
        and "Traceback" not in done.stderr
    )
