"""What a cluster of the tests is told: every wait of SLURM's as short as it goes.

So what takes a real cluster minutes to notice is noticed here in seconds.
"""

import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    nodes: int = 3
    gpus: int = 4
    cpus: int = 16
    memory_mb: int = 32768
    max_array: int = 1001
    min_job_age_s: int = 300  # how long a finished job stays in squeue

    @property
    def node_names(self) -> list[str]:
        return [f"gpu{number:02d}" for number in range(1, self.nodes + 1)]


def write_configuration(folder: Path, port: int, size: Size, *, accounting: bool) -> None:
    """Write slurm.conf, gres.conf and slurmdbd.conf into `folder`/etc; ports are counted from `port`."""
    host = socket.gethostname().split(".")[0]
    nodes = f"gpu[01-{size.nodes:02d}]"
    lines = [
        "ClusterName=tests",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # how long a requeued job has to wait: 120 s unless told otherwise
        f"AuthInfo=socket={folder}/run/munge.socket,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmctldTimeout=10",
        "SlurmdTimeout=15",
        "KillWait=5",
        "MessageTimeout=20",
        "CompleteWait=0",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "GresTypes=gpu",
        "DefMemPerCPU=256",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0",
        f"MaxArraySize={size.max_array}",
        "MaxJobCount=60000",
        f"MinJobAge={size.min_job_age_s}",
        "JobRequeue=1",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/log/jobcomp.txt",
        "JobAcctGatherType=jobacct_gather/linux",
        "JobAcctGatherFrequency=task=2",
        "JobAcctGatherParams=OverMemoryKill",
    ]
    if accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            "AccountingStorageHost=127.0.0.1",
            f"AccountingStoragePort={port + 1}",
            f"AccountingStoragePass={folder}/run/munge.socket",
            "AccountingStorageEnforce=associations,limits,qos",
        ]
    else:
        lines += ["AccountingStorageType=accounting_storage/none"]
    for number, name in enumerate(size.node_names, start=1):
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 10 + number} "
            f"CPUs={size.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={size.cpus} ThreadsPerCore=1 "
            f"RealMemory={size.memory_mb} Gres=gpu:{size.gpus} State=UNKNOWN"
        )
    lines += [
        f"PartitionName=gpu Nodes={nodes} Default=YES MaxTime=1-0 DefaultTime=60 PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=scavenge Nodes={nodes} MaxTime=1-0 DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE "
        "GraceTime=10",
    ]
    gres = ["AutoDetect=off", f"NodeName={nodes} Name=gpu File={folder}/dev/nvidia[0-{size.gpus - 1}]"]
    dbd = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/run/munge.socket",
        f"DbdHost={host}",
        "DbdAddr=127.0.0.1",
        f"DbdPort={port + 1}",
        "SlurmUser=root",
        f"PidFile={folder}/run/slurmdbd.pid",
        f"LogFile={folder}/log/slurmdbd.log",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={port + 2}",
        "StorageUser=slurm",
        "StoragePass=slurm",
        "StorageLoc=slurm_acct",
        "CommitDelay=1",
    ]
    for name, content in {"slurm.conf": lines, "gres.conf": gres, "slurmdbd.conf": dbd}.items():
        file = folder / "etc" / name
        file.write_text("\n".join(content) + "\n")
        file.chmod(0o600 if name == "slurmdbd.conf" else 0o644)
