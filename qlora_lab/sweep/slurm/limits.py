"""What a site allows, read from SLURM rather than assumed."""

import getpass
import re
from dataclasses import dataclass

from qlora_lab.errors import LaunchError
from qlora_lab.sweep.scheduler import Job
from qlora_lab.sweep.slurm.commands import UnreachableError, run

DEFAULT_MAX_ARRAY = 1001  # SLURM's own


@dataclass(frozen=True)
class SiteLimits:
    """Attributes:
    max_array: tasks that one array may have.
    max_submit: jobs, tasks counted one by one, that the user may have waiting and running; None: no limit is known.
    per_qos: the same for the jobs of each quality of service that has a limit.
    max_jobs: of all users that the controller has in memory, which lately ended ones still are; None: not known.
    default_qos: what a job gets that asks for none.
    accounting: whether finished jobs can be asked for.
    completion_log: the file with a line for each finished job, where the site writes one that can be read.
    """

    max_array: int = DEFAULT_MAX_ARRAY
    max_submit: int | None = None
    per_qos: dict[str, int] | None = None
    max_jobs: int | None = None
    default_qos: str | None = None
    accounting: bool = False
    completion_log: str | None = None

    def free(self, queue: list[Job], qos: str | None, in_memory: int = 0) -> int | None:
        """Return how many more jobs the user may submit to a quality of service; None without a limit.

        Args:
            queue: the user's jobs.
            in_memory: jobs of all users that the controller knows.
        """
        waiting = [job for job in queue if not job.is_over]
        left = []
        if self.max_jobs is not None:
            left.append(self.max_jobs - in_memory - 1)  # SLURM refuses what would reach its limit
        if self.max_submit is not None:
            left.append(self.max_submit - sum(len(job.ids) for job in waiting))
        limit = (self.per_qos or {}).get(qos or self.default_qos or "")
        if limit is not None:
            left.append(limit - sum(len(job.ids) for job in waiting if job.qos == (qos or self.default_qos)))
        return max(0, min(left)) if left else None


def read_limits() -> SiteLimits:
    """Ask SLURM for the limits of its configuration, and its accounting for those of this user.

    Raises:
        UnreachableError: the controller does not answer.
        LaunchError: this is no machine of a cluster.
    """
    settings = dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", run("scontrol", "show", "config"), re.MULTILINE))
    max_array = int(settings.get("MaxArraySize", DEFAULT_MAX_ARRAY)) - 1  # the highest index is one below it
    tasks = re.search(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", ""))
    if tasks:
        max_array = min(max_array, int(tasks[1]))
    accounting = "slurmdbd" in settings.get("AccountingStorageType", "")
    log = settings.get("JobCompLoc") if "filetxt" in settings.get("JobCompType", "") else None
    submit, per_qos, default_qos = _of_the_user() if accounting else (None, {}, None)
    max_jobs = int(settings["MaxJobCount"]) if "MaxJobCount" in settings else None
    return SiteLimits(
        max_array=max_array,
        max_submit=submit,
        per_qos=per_qos,
        max_jobs=max_jobs,
        default_qos=default_qos,
        accounting=accounting,
        completion_log=log,
    )


def _of_the_user() -> tuple[int | None, dict[str, int], str | None]:
    """Return the user's own limit, those of each QOS, and the default QOS; accounting that is away knows none."""
    user = getpass.getuser()
    try:
        columns = "format=cluster,maxsubmitjobs,grpsubmitjobs,defaultqos"
        associations = run("sacctmgr", "-nP", "show", "assoc", f"user={user}", columns)
        qualities = run("sacctmgr", "-nP", "show", "qos", "format=name,maxsubmitjobsperuser,maxsubmitpa,grpsubmit")
    except UnreachableError:
        return None, {}, None
    except LaunchError:  # a site may keep its limits to itself
        return None, {}, None
    rows = [line.split("|") for line in associations.splitlines() if line]
    own = [int(limit) for row in rows for limit in row[1:3] if limit]
    defaults = [row[3] for row in rows if row[3]]
    per_qos = {}
    for line in qualities.splitlines():
        name, *limits = line.split("|")
        numbers = [int(limit) for limit in limits if limit]
        if numbers:
            per_qos[name] = min(numbers)
    return (min(own) if own else None), per_qos, (defaults[0] if defaults else None)
