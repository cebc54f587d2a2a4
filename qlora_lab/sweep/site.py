"""What can be told before anything is submitted: whether the site has what is asked for, and what it would get."""

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from qlora_lab.config import hardware
from qlora_lab.config.schema import LauncherConfig
from qlora_lab.errors import ConfigError, LaunchError, unknown_name
from qlora_lab.sweep.chunk import QueuedRuns
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.needs import side_by_side
from qlora_lab.sweep.plan import Plan, PlannedRun
from qlora_lab.sweep.settle import memory_factor
from qlora_lab.sweep.slurm.arrays import Group, batches_of
from qlora_lab.sweep.slurm.commands import UnreachableError, run
from qlora_lab.sweep.slurm.inventory import check_nodes, site_nodes
from qlora_lab.sweep.slurm.outcome import surplus
from qlora_lab.sweep.slurm.reconcile import queued_by_other_plans
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from qlora_lab.sweep.slurm.task import seconds
from qlora_lab.sweep.status import duration

NO_CLUSTER = "Could not establish a configuration source"  # what its commands say outside of any cluster
# File systems of one machine, which others see where it exports them, and such as nobody exports.
OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
NEVER_SHARED = ("tmpfs", "ramfs", "overlay")
LOOPBACK = ("127.", "localhost", "::1")
MOUNTS = Path("/proc/mounts")


@dataclass(frozen=True)
class Submission:
    """What would be started.

    Attributes:
        runs: that are left, those in jobs submitted before not among them.
        queued: runs that such jobs wait for or execute.
        arrays, tasks: of SLURM, at most; None elsewhere, and where SLURM cannot be asked.
        left: runs for which the site has no room now.
        not_known: why SLURM cannot be asked.
        notes: on the folder of the runs, and on what limits how many are executed at once.
    """

    runs: int
    queued: int
    launcher: LauncherConfig
    arrays: int | None = None
    tasks: int | None = None
    left: int = 0
    not_known: str | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return it for a person."""
        return "\n".join([self._first_line(), *filter(None, [self.not_known]), *self.notes])

    def _first_line(self) -> str:
        queued = f"; {self.queued:,} wait or run in jobs submitted before" if self.queued else ""
        if not self.runs:
            return f"nothing is left to execute{queued}"
        launcher = self.launcher
        count = f"would execute {self.runs:,} run{'s' if self.runs > 1 else ''}"
        at_once = f", at most {launcher.max_parallel} at a time" if launcher.max_parallel else ""
        if launcher.kind != "slurm":
            where = {"in_process": "one after the other in this process"}.get(launcher.kind, "on this machine")
            return f"{count} {where}{at_once}"
        slurm = launcher.slurm
        limit = duration(60 * slurm.time_limit_min)
        needs = f"{slurm.gpus_per_run} GPU, {slurm.cpus_per_run} CPUs, {slurm.memory_gb} GB, {limit} each"
        arrays = f" in {self.arrays:,} job arrays of {self.tasks:,} tasks together" if self.arrays is not None else ""
        left = f"; {self.left:,} runs are above the site's limit now" if self.left else ""
        return f"{count} on SLURM (partition {slurm.partition or 'default'}; {needs}){arrays}{at_once}{left}{queued}"


def submission(plan: Plan, runs: Sequence[PlannedRun], launcher: LauncherConfig) -> Submission:
    """Return what would be started of a plan, asking SLURM where it is the launcher.

    Raises:
        ConfigError: SLURM has not what is asked for.
    """
    if launcher.kind != "slurm":
        why = side_by_side([(run.config, run.need) for run in runs], hardware.detect())[1] if runs else None
        return Submission(len(runs), 0, launcher, notes=(why,) if why is not None else ())
    scheduler = SlurmScheduler()
    try:
        check_site(launcher)
        notes = check_store(plan.runs_dir, launcher)
        queue, limits = scheduler.query(), scheduler.limits
        free = scheduler.free(queue, launcher.slurm.qos)
    except LaunchError as error:
        notes = unshared(plan.runs_dir)
        return Submission(len(runs), 0, launcher, not_known=f"arrays are not known: {error}", notes=notes)
    own_jobs = QueuedRuns(plan.folder)
    queued = {run_id for job in queue if job.goes_on for run_id in own_jobs.of(job)[0]}
    own = {run.run_id for run in plan.runs}
    for other, others in queued_by_other_plans(plan.folder.resolve() / "slurm", plan.runs_dir.resolve(), queue).items():
        queued |= others & own
        notes += (surplus(other, len(others - own)),) if others - own else ()
    to_do = [planned for planned in runs if planned.run_id not in queued]
    slurm = launcher.slurm
    alike: dict[float, list[int]] = {}
    for position, planned in enumerate(to_do):
        factor = memory_factor(planned.status.record if planned.status is not None else None)
        alike.setdefault(factor, []).append(position)
    batches = batches_of(
        [Group(replace(slurm, memory_gb=ceil(slurm.memory_gb * f)), tuple(runs)) for f, runs in alike.items()],
        max_array=limits.max_array,
        free=free,
        pool=launcher.pool or launcher.runs_per_gpu > 1,
        per_gpu=launcher.runs_per_gpu,
        parallel=launcher.max_parallel,
    )
    return Submission(
        runs=len(to_do),
        queued=len(queued),
        launcher=launcher,
        arrays=len(batches),
        tasks=sum(batch.tasks for batch in batches),
        left=len(to_do) - sum(len(batch.runs) for batch in batches),
        notes=notes,
    )


def check_site(launcher: LauncherConfig) -> None:
    """Refuse what SLURM would refuse, or keep waiting for ever.

    Raises:
        ConfigError: there is no such partition, it takes no jobs, or not such long ones, or none of its nodes has the
            GPUs, CPUs and memory that a run asks for.
        LaunchError: SLURM is not on this machine, or does not answer.
    """
    slurm = launcher.slurm
    try:
        lines = run("scontrol", "--oneliner", "show", "partition").splitlines()
    except LaunchError as error:
        if NO_CLUSTER not in str(error):
            raise
        raise LaunchError(
            "launcher=slurm finds no cluster, since SLURM has no configuration on this machine; run from a login "
            "node, set SLURM_CONF, or use launcher=local"
        ) from error
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    partitions = {words["PartitionName"]: words for words in found if "PartitionName" in words}
    key = "launcher.slurm.partition"
    if not partitions:
        return  # a site may keep them to itself; sbatch will say
    if slurm.partition is None:
        names = [name for name, words in partitions.items() if words.get("Default") == "YES"]
        if not names:
            raise ConfigError(f"{key} must be set, since SLURM has no default here; it has {', '.join(partitions)}")
    else:
        names = slurm.partition.split(",")
    for name in names:
        if name not in partitions:
            raise ConfigError(unknown_name(key, name, partitions))
    longest_s = max(seconds(partitions[name].get("MaxTime", "")) for name in names)
    if 60 * slurm.time_limit_min > longest_s:
        raise ConfigError(
            f"launcher.slurm.time_limit_min must be at most {int(longest_s // 60)} in partition {','.join(names)}; got "
            f"{slurm.time_limit_min}; with less, a run is saved, requeued and continued where it stopped"
        )
    if all(partitions[name].get("State", "UP") in ("DOWN", "INACTIVE") for name in names):
        up = [name for name, words in partitions.items() if words.get("State", "UP") == "UP"]
        raise ConfigError(f"{key}: {','.join(names)} takes no jobs now; those that do are {', '.join(up) or 'none'}")
    check_nodes(site_nodes(), names, slurm)


def check_before_submitting(plan: Plan, launcher: LauncherConfig) -> None:
    """Refuse to write or submit anything where SLURM would not take it or its nodes not find it; warn if they may not.

    Raises:
        ConfigError, LaunchError: as `check_site` and `check_store` do, unless SLURM only does not answer: the launch
            deals with that.
    """
    try:
        check_site(launcher)
        notes = check_store(plan.runs_dir, launcher)
    except UnreachableError:
        return
    print("".join(f"{note}\n" for note in notes), end="", flush=True)


def check_store(runs_dir: Path, launcher: LauncherConfig, mounts: Path = MOUNTS) -> tuple[str, ...]:
    """Refuse a folder for the runs that no other machine sees, where jobs may start on others.

    Returns:
        A warning where others may not see it; none where all nodes are this machine.

    Raises:
        ConfigError: it is on a file system in memory, or of a container.
        LaunchError: SLURM does not answer.
    """
    kind = file_system(runs_dir, mounts)
    if launcher.shared_runs_dir or kind not in (*OF_ONE_MACHINE, *NEVER_SHARED):
        return ()
    machines = other_machines(launcher.slurm.partition)
    if machines is None:
        return unshared(runs_dir, mounts)
    if machines and kind in NEVER_SHARED:
        raise ConfigError(
            f"paths.runs_dir must be a folder that the nodes of SLURM share with this machine; got "
            f"{runs_dir.resolve()}, which is on {kind}, while jobs may start on {', '.join(listed(machines))}; set "
            "launcher.shared_runs_dir=true if they do see it"
        )
    return unshared(runs_dir, mounts) if machines else ()


def unshared(runs_dir: Path, mounts: Path = MOUNTS) -> tuple[str, ...]:
    """Return a warning where the folder of the runs lies on a file system that other machines may not see."""
    kind = file_system(runs_dir, mounts)
    if kind not in (*OF_ONE_MACHINE, *NEVER_SHARED):
        return ()
    return (
        f"paths.runs_dir ({runs_dir.resolve()}) is on {kind}, which other machines see only if this one exports it; "
        "where the nodes do not have it under the same path, their jobs end at once without a log",
    )


def file_system(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """Return the type of the file system that a folder, there or still to be made, lies on; None where nobody says."""
    if not mounts.is_file():
        return None
    target = folder.resolve()
    kinds = {Path(line.split()[1]): line.split()[2] for line in mounts.read_text().splitlines()}
    return next((kinds[path] for path in (target, *target.parents) if path in kinds), None)


def other_machines(partition: str | None) -> list[str] | None:
    """Return the nodes where jobs may start that are not this machine; None where SLURM does not say.

    Args:
        partition: names of partitions, with commas; None for all.
    """
    nodes = site_nodes()
    if not nodes:
        return None
    wanted = set(partition.split(",")) if partition is not None else None
    own = socket.gethostname().partition(".")[0]
    found = [
        node.name
        for node in nodes
        if (wanted is None or wanted & node.partitions)
        and node.host.partition(".")[0] != own
        and not node.address.startswith(LOOPBACK)
    ]
    return list(dict.fromkeys(found))
