"""How SLURM's commands are run, against ones that only look like them."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_lab.errors import LaunchError
from qlora_lab.sweep.slurm.commands import UnreachableError, run
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the PATH but the shell's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def put(commands: Path, name: str, script: str) -> None:
    (commands / name).write_text(f"#!/bin/bash\n{script}\n")
    (commands / name).chmod(0o755)


def test_all_tasks_of_an_array_are_heard_of(commands: Path) -> None:
    """Where many single tasks are left; SLURM shortens the list unless it is told not to."""
    put(
        commands,
        "squeue",
        """tasks=$(seq --separator=, 1 2 199)
if [ "${SLURM_BITSTR_LEN:-64}" != 0 ]; then tasks="${tasks:0:60}..."; fi
echo "41|$tasks|PENDING||normal|Priority|qlora_lab ab"
""",
    )
    (job,) = SlurmScheduler().query()
    assert job.tasks == tuple(range(1, 200, 2))


def test_commands_know_nothing_of_the_job_around_us(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(commands, "sbatch", "env | grep ^SLURM_ | sort")
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "1", "SLURM_CONF": "/etc/x.conf"}.items():
        monkeypatch.setenv(name, value)
    assert run("sbatch").split() == ["SLURM_BITSTR_LEN=0", "SLURM_CONF=/etc/x.conf"]


@pytest.mark.parametrize(
    ("action", "command", "first"),
    [
        ("cancel", "scancel", "4_0 4_1"),
        ("hold", "scontrol", "hold 4_0,4_1"),
        ("release", "scontrol", "release 4_0,4_1"),
    ],
)
def test_many_jobs_are_told_in_few_commands(commands: Path, action: str, command: str, first: str) -> None:
    put(commands, command, f'echo "$@" >> {commands}/said')
    getattr(SlurmScheduler(), action)([f"4_{task}" for task in range(1100)])
    said = (commands / "said").read_text().splitlines()
    assert len(said) == 3 and said[0].startswith(first)


def test_jobs_of_all_users_count_where_the_controller_keeps_so_many(commands: Path) -> None:
    put(commands, "scontrol", "echo 'MaxJobCount             = 10000'")
    put(commands, "squeue", 'case "$*" in *--user*) ;; *--all*--states=all*) echo N/A; echo 0-9899%64; echo 7;; esac')
    assert SlurmScheduler().free([], None) == 10_000 - 9_902 - 1


def test_what_a_command_says_before_it_hangs_is_told(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = b"sbatch: error: Slurm job queue full, sleeping and retrying\n"

    def hang(*command: object, **how: object) -> None:
        raise subprocess.TimeoutExpired("sbatch", 90.0, stderr=full)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UnreachableError, match=r"sbatch did not answer within 90 s \(.* queue full, sleep"):
        run("sbatch")


def test_the_books_are_read_in_one_time_zone(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    put(commands, "scontrol", "echo 'AccountingStorageType = accounting_storage/slurmdbd'")
    put(commands, "sacctmgr", ":")
    put(commands, "sacct", 'echo "41_0|FAILED|1:0|gpu01||2G|Unknown|$(date --date=@0 +%Y-%m-%dT%H:%M:%S)"')
    (ending,) = SlurmScheduler().endings(["41_0"])["41_0"]
    assert ending.ended_at == datetime.fromtimestamp(0, UTC)


def test_a_job_that_is_over_need_not_be_told(commands: Path) -> None:
    put(
        commands, "scancel", "echo 'scancel: error: Kill job error on job id 4_0: Invalid job id specified' >&2; exit 1"
    )
    SlurmScheduler().cancel(["4_0"])
    put(commands, "scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(LaunchError, match="permission denied"):
        SlurmScheduler().cancel(["4_0"])
