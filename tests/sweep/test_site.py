"""What a site does not have is refused before anything is submitted, by what SLURM's own commands say."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab.config.schema import LauncherConfig
from qlora_lab.errors import ConfigError, LaunchError
from qlora_lab.sweep.plan import Plan, make_plan
from qlora_lab.sweep.site import check_before_submitting, check_site, check_store, submission, unshared
from tests.helpers import tiny

PARTITIONS = """PartitionName=gpu AllowGroups=ALL Default=YES MaxTime=1-00:00:00 State=UP
PartitionName=short AllowGroups=ALL Default=NO MaxTime=00:30:00 State=UP
PartitionName=old AllowGroups=ALL Default=NO MaxTime=UNLIMITED State=DOWN
"""
Site = Callable[[str], None]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Give a function that puts a scontrol with these partitions on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def put(partitions: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "partitions").write_text(partitions)
        scripts = {
            "scontrol": f"case $* in *partition) cat {tmp_path}/partitions;; "
            f"*node) [ ! -f {tmp_path}/nodes ] || cat {tmp_path}/nodes;; *) echo 'MaxArraySize = 6';; esac",
            "squeue": "",
        }
        for name, script in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return put


def asking(tmp_path: Path, *overrides: str) -> LauncherConfig:
    return tiny(tmp_path, "launcher=slurm", *overrides).launcher


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["launcher.slurm.partition=gpus"],
            r"launcher\.slurm\.partition must be one of gpu, short, old; got 'gpus'; did you mean 'gpu'\?",
        ),
        (["launcher.slurm.partition='gpu,lost'"], r"got 'lost'"),
        (
            ["launcher.slurm.partition=short"],
            r"launcher\.slurm\.time_limit_min must be at most 30 in partition short; got 240; with less, a run is",
        ),
        (["launcher.slurm.time_limit_min=2000"], r"must be at most 1440 in partition gpu; got 2000"),
        (["launcher.slurm.partition=old"], r"old takes no jobs now; those that do are gpu, short"),
    ],
)
def test_what_a_site_does_not_have_is_refused(site: Site, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    site(PARTITIONS)
    with pytest.raises(ConfigError, match=sentence):
        check_site(asking(tmp_path, *overrides))


def test_what_a_site_has_or_does_not_tell_is_left_to_it(site: Site, tmp_path: Path) -> None:
    site(PARTITIONS)
    for partition in ("null", "gpu", "'short,gpu'"):
        check_site(asking(tmp_path, f"launcher.slurm.partition={partition}"))
    site("MaxArraySize = 1001\n")
    check_site(asking(tmp_path, "launcher.slurm.partition=secret"))
    site(PARTITIONS.replace("Default=YES", "Default=NO"))
    with pytest.raises(ConfigError, match="must be set, since SLURM has no default here; it has gpu, short, old"):
        check_site(asking(tmp_path))


def test_a_machine_of_no_cluster_is_told_so(site: Site, tmp_path: Path) -> None:
    site("")
    (tmp_path / "bin" / "scontrol").write_text(
        "#!/bin/bash\necho 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1\n"
    )
    with pytest.raises(LaunchError, match=r"finds no cluster, .* run from a login node, set SLURM_CONF, or use"):
        check_site(asking(tmp_path))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    config = tiny(tmp_path, "launcher=slurm")
    return make_plan("study", [({"seed": str(seed)}, replace(config, seed=seed)) for seed in range(12)])


def test_without_slurm_nothing_is_written_and_a_plan_is_shown_all_the_same(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = plan.runs[0].config.launcher
    with pytest.raises(LaunchError, match="launcher=slurm needs sbatch, squeue and scontrol on this machine"):
        check_before_submitting(plan, launcher)
    shown = submission(plan, plan.runs, launcher)
    assert shown.arrays is None and "arrays are not known: launcher=slurm needs sbatch" in shown.text()


def test_arrays_and_tasks_are_those_the_limits_allow(site: Site, plan: Plan, tmp_path: Path) -> None:
    site(PARTITIONS)
    launcher = plan.runs[0].config.launcher
    shown = submission(plan, plan.runs, launcher)
    # a canary, and 11 more in arrays of 5 at most
    assert (shown.runs, shown.arrays, shown.tasks, shown.left, shown.queued) == (12, 4, 12, 0, 0)
    assert "in 4 job arrays of 12 tasks together" in shown.text()
    pool = submission(plan, plan.runs, replace(launcher, pool=True, max_parallel=3))
    assert (pool.arrays, pool.tasks) == (2, 4)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("= 6'", "= 6'; echo 'MaxJobCount = 6'"))
    few = submission(plan, plan.runs, launcher)
    assert (few.arrays, few.tasks, few.left) == (2, 5, 0), "a canary, and a pool of 4"


def test_a_folder_that_nodes_may_not_see_is_warned_of(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda1 / ext4 rw 0 0\nserver:/home {tmp_path}/home nfs4 rw 0 0\ntmpfs {tmp_path}/fast tmpfs rw\n"
    )
    assert unshared(tmp_path / "home" / "runs", mounts) == ()
    assert "is on tmpfs, which other machines see only if" in str(unshared(tmp_path / "fast" / "runs", mounts))
    assert "is on ext4" in str(unshared(tmp_path / "runs", mounts))
    assert unshared(tmp_path, tmp_path / "none") == ()


HERE = socket.gethostname()
MOUNTS = "/dev/sda1 / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /fast tmpfs rw\noverlay /box overlay rw\n"
HAS = "CPUTot=64 RealMemory=512000 Gres=gpu:4"
NODES = f"""NodeName=front NodeAddr=10.0.0.1 NodeHostName={HERE} Partitions=short {HAS}
NodeName=fake01 NodeAddr=127.0.0.1 NodeHostName=elsewhere Partitions=short {HAS}
NodeName=gpu01 NodeAddr=gpu01 NodeHostName=gpu01 Partitions=gpu,long {HAS}
NodeName=gpu02 NodeAddr=gpu02 NodeHostName=gpu02 Partitions=gpu {HAS}
"""


@pytest.mark.parametrize(
    ("folder", "overrides", "refused", "warned"),
    [
        ("/fast/runs", [], True, False),
        ("/box/runs", ["launcher.slurm.partition=gpu"], True, False),
        ("/fast/runs", ["launcher.slurm.partition=short"], False, False),  # whose nodes are this machine
        ("/fast/runs", ["launcher.shared_runs_dir=true"], False, False),
        ("/var/runs", [], False, True),  # perhaps exported
        ("/var/runs", ["launcher.slurm.partition=short"], False, False),
        ("/home/runs", [], False, False),
    ],
)
def test_a_folder_that_no_node_can_see_is_refused(
    site: Site, tmp_path: Path, folder: str, overrides: list[str], refused: bool, warned: bool
) -> None:
    site(PARTITIONS)
    (tmp_path / "nodes").write_text(NODES)
    (tmp_path / "mounts").write_text(MOUNTS)
    launcher = asking(tmp_path, *overrides)
    if refused:
        with pytest.raises(
            ConfigError, match=rf"got {folder}, which is on .*, while jobs may start on gpu01, gpu02; set"
        ):
            check_store(Path(folder), launcher, tmp_path / "mounts")
    else:
        assert bool(check_store(Path(folder), launcher, tmp_path / "mounts")) == warned


def test_where_slurm_does_not_tell_its_nodes_a_folder_of_one_machine_is_warned_of(site: Site, tmp_path: Path) -> None:
    site(PARTITIONS)
    (tmp_path / "mounts").write_text(MOUNTS)
    (warning,) = check_store(Path("/fast/runs"), asking(tmp_path), tmp_path / "mounts")
    assert "is on tmpfs" in warning


def test_what_no_node_has_is_refused_before_anything_is_submitted(site: Site, plan: Plan, tmp_path: Path) -> None:
    site(PARTITIONS)
    (tmp_path / "nodes").write_text(NODES)
    launcher = plan.runs[0].config.launcher
    check_site(launcher)
    asking_too_much = replace(launcher, slurm=replace(launcher.slurm, memory_gb=600))
    for look in (check_before_submitting, lambda plan, asked: submission(plan, plan.runs, asked)):
        with pytest.raises(ConfigError, match=r"memory_gb must be at most 500 in partition gpu, where no .*; got 600"):
            look(plan, asking_too_much)


def test_what_a_partition_gives_no_job_is_refused_before_anything_is_submitted(
    site: Site, plan: Plan, tmp_path: Path
) -> None:
    site(PARTITIONS.replace("State=UP", "State=UP MaxCPUsPerNode=6 MaxMemPerNode=UNLIMITED", 1))
    (tmp_path / "nodes").write_text(NODES)
    with pytest.raises(ConfigError, match=r"cpus_per_run must be at most 6 in partition gpu, where no .*; got 8"):
        check_before_submitting(plan, plan.runs[0].config.launcher)


def test_nothing_is_written_where_the_nodes_would_not_find_it(
    site: Site, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site(PARTITIONS)
    (tmp_path / "nodes").write_text(NODES)
    monkeypatch.setattr("qlora_lab.sweep.site.file_system", lambda folder, mounts: "tmpfs")
    launcher = plan.runs[0].config.launcher
    for look in (lambda: check_before_submitting(plan, launcher), lambda: submission(plan, plan.runs, launcher)):
        with pytest.raises(ConfigError, match="must be a folder that the nodes of SLURM share"):
            look()
