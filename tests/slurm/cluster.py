"""A SLURM cluster of several nodes on this one machine, with fake GPUs: real daemons, private to one folder.

No systemd, no cgroups, nothing below /etc. Debian's slurmd is built for several nodes on one host (`slurmd -N NAME`);
a GPU must be a device file, and a link to /dev/null is one. Every wait of SLURM's is set as short as it goes, so that
what takes a real cluster minutes to notice is noticed here in seconds.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BASE_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db")
SUBMIT_LIMIT, RUN_LIMIT = 100, 8  # of the QOS `capped`


def missing(accounting: bool) -> str | None:
    """Say why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "the daemons of SLURM need root"
    wanted = BASE_COMMANDS + (ACCOUNTING_COMMANDS if accounting else ())
    absent = [name for name in wanted if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/slurm/install.sh)"
    return None


@dataclass(frozen=True)
class Size:
    nodes: int = 3
    gpus: int = 4
    cpus: int = 16
    memory_mb: int = 32768
    max_array: int = 1001
    min_job_age_s: int = 300  # how long a finished job stays in squeue


class Cluster:
    """Daemons in `folder`, listening on ports from `port` up; `environment` makes SLURM's commands talk to them."""

    def __init__(self, folder: Path, port: int, *, accounting: bool, size: Size | None = None) -> None:
        self.folder = folder
        self.port = port
        self.accounting = accounting
        self.size = size or Size()
        self.node_names = [f"gpu{number:02d}" for number in range(1, self.size.nodes + 1)]
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }

    # ---- whole cluster

    def start(self) -> None:
        """Start what does not run, and wait until every node takes jobs."""
        for name in ("run", "log", "state", "dev", "etc", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for name in self.node_names:
            (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "munge").chmod(0o700)
        for index in range(self.size.gpus):
            device = self.folder / "dev" / f"nvidia{index}"
            if not device.is_symlink():
                device.symlink_to("/dev/null")
        self._write_configuration()
        self._start_munged()
        if self.accounting:
            self._start_mariadb()
            self._start_slurmdbd()
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Cancel every job and end every daemon this object's folder knows the process id of."""
        if self._alive("slurmctld"):
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--user=root", timeout_s=20)
            wait_until(lambda: not self.run("squeue", "-h", "-t", "R,CG,S").stdout, 15, required=False)
        for name in [*(f"slurmd-{node}" for node in self.node_names), "slurmctld", "slurmdbd", "mariadb", "munged"]:
            self._end(name, signal.SIGTERM, patience_s=15)

    def run(self, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands against this cluster; look at `returncode` yourself."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )

    def output(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    # ---- single daemons

    def start_controller(self) -> None:
        if not self._alive("slurmctld"):
            self._pid_file("slurmctld").unlink(missing_ok=True)
            self._daemon("slurmctld")
        wait_until(lambda: self.run("scontrol", "ping").returncode == 0, 30)

    def kill_controller(self) -> None:
        self._end("slurmctld", signal.SIGKILL)

    def start_node(self, name: str) -> None:
        if not self._alive(f"slurmd-{name}"):
            self._pid_file(f"slurmd-{name}").unlink(missing_ok=True)
            self._daemon("slurmd", "-N", name)

    def ask_nodes(self) -> None:
        """Let every node say what runs there.

        A controller that was killed believes that what ended meanwhile still runs, until nodes report, every 100 s.
        """
        self.run("scontrol", "reconfigure")

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon, but not what it has started: job steps go on, as behind a broken network."""
        self._end(f"slurmd-{name}", signal.SIGKILL)

    def drain(self, name: str) -> None:
        self.output("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")

    def resume(self, name: str) -> None:
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def node_state(self, name: str) -> str:
        return self.output("sinfo", "-h", "-n", name, "-p", "gpu", "-o", "%t")

    def wait_for_nodes(self) -> None:
        def ready() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%t").stdout.split()
            return len(states) == self.size.nodes and all(s in ("idle", "mix", "alloc", "comp") for s in states)

        if not wait_until(ready, 20, required=False):
            for name in self.node_names:  # down or drained by what went before
                self.resume(name)
            wait_until(ready, 40)

    # ---- jobs

    def submit(self, command: str, *options: str) -> str:
        """Submit a job of somebody else, and return its id."""
        return self.output("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", command)

    def job_states(self, *selection: str) -> dict[str, str]:
        """Return the state of each job or array task, finished ones too while SLURM remembers them."""
        lines = self.output("squeue", "-h", "-r", "-t", "all", "-o", "%i %T", *selection).splitlines()
        return dict(line.split() for line in lines)

    def quiet(self) -> bool:
        """Say whether nothing runs, and nothing waits that SLURM means to start."""
        lines = self.output("squeue", "-h", "-t", "PD,R,CG,S,CF", "-o", "%r").splitlines()
        return all(reason == "launch failed requeued held" for reason in lines)

    def empty(self) -> bool:
        return not self.output("squeue", "-h", "-t", "PD,R,CG,S,CF")

    # ---- how each daemon is started

    def _write_configuration(self) -> None:
        size, folder, host = self.size, self.folder, socket.gethostname().split(".")[0]
        nodes = f"gpu[01-{size.nodes:02d}]"
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={self.port}",
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
        if self.accounting:
            lines += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={self.port + 1}",
                f"AccountingStoragePass={folder}/run/munge.socket",
                "AccountingStorageEnforce=associations,limits,qos",
            ]
        else:
            lines += ["AccountingStorageType=accounting_storage/none"]
        for number, name in enumerate(self.node_names, start=1):
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + 10 + number} "
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
            f"DbdPort={self.port + 1}",
            "SlurmUser=root",
            f"PidFile={folder}/run/slurmdbd.pid",
            f"LogFile={folder}/log/slurmdbd.log",
            "StorageType=accounting_storage/mysql",
            "StorageHost=127.0.0.1",
            f"StoragePort={self.port + 2}",
            "StorageUser=slurm",
            "StoragePass=slurm",
            "StorageLoc=slurm_acct",
            "CommitDelay=1",
        ]
        for name, content in {"slurm.conf": lines, "gres.conf": gres, "slurmdbd.conf": dbd}.items():
            file = folder / "etc" / name
            file.write_text("\n".join(content) + "\n")
            file.chmod(0o600 if name == "slurmdbd.conf" else 0o644)

    def _start_munged(self) -> None:
        if self._alive("munged"):
            return
        run = self.folder / "run"
        for stale in run.glob("munge*"):
            stale.unlink()
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        self._daemon(
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/munge/seed",
            "--num-threads=2",
        )
        wait_until(lambda: self.run("munge", "-S", f"{run}/munge.socket", "-n").returncode == 0, 15)

    def _start_mariadb(self) -> None:
        data, run = self.folder / "mysql", self.folder / "run"
        options = ["--no-defaults", "--user=root", f"--datadir={data}"]
        if not self._alive("mariadb"):
            (run / "mariadb.pid").unlink(missing_ok=True)
            if not (data / "mysql").is_dir():
                data.mkdir(exist_ok=True)
                of_root = ["--skip-test-db", "--auth-root-authentication-method=normal"]
                self.output("mariadb-install-db", *options, *of_root)
            with (self.folder / "log" / "mariadb.log").open("w") as log:
                subprocess.Popen(
                    [
                        "mariadbd",
                        *options,
                        f"--socket={run}/mysql.sock",
                        "--bind-address=127.0.0.1",
                        f"--port={self.port + 2}",
                        f"--pid-file={run}/mariadb.pid",
                        "--innodb-buffer-pool-size=64M",
                        "--innodb-lock-wait-timeout=900",
                        "--innodb-flush-log-at-trx-commit=0",
                        "--performance-schema=OFF",
                        "--skip-log-bin",
                    ],
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        wait_until(lambda: self._sql("select 1").returncode == 0, 60)
        for statement in (
            "create database if not exists slurm_acct",
            "create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm'",
            "create user if not exists 'slurm'@'localhost' identified by 'slurm'",
            "grant all on slurm_acct.* to 'slurm'@'127.0.0.1'",
            "grant all on slurm_acct.* to 'slurm'@'localhost'",
        ):
            done = self._sql(statement)
            assert done.returncode == 0, done.stderr

    def _sql(self, statement: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            "mariadb", "--no-defaults", "-S", f"{self.folder}/run/mysql.sock", "-u", "root", "-e", statement
        )

    def _start_slurmdbd(self) -> None:
        if not self._alive("slurmdbd"):
            self._pid_file("slurmdbd").unlink(missing_ok=True)
            self._daemon("slurmdbd")
        wait_until(lambda: self.run("sacctmgr", "-n", "show", "cluster").returncode == 0, 60)
        if "capped" in self.output("sacctmgr", "-n", "-P", "show", "qos", "format=name").split():
            return
        for words in (
            "add cluster tests",
            "add account tests Cluster=tests Description=tests Organization=tests",
            "add user root Cluster=tests Account=tests DefaultAccount=tests",
            f"add qos capped MaxSubmitJobsPerUser={SUBMIT_LIMIT} MaxJobsPerUser={RUN_LIMIT}",
            "modify user root where Cluster=tests set QOS=normal,capped DefaultQOS=normal",
        ):
            self.run("sacctmgr", "-i", *words.split())

    # ---- processes

    def _daemon(self, *command: str) -> None:
        """Start a command that puts itself into the background."""
        subprocess.run(
            command,
            env=self.environment,
            check=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _pid_file(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.pid"

    def _alive(self, name: str) -> bool:
        """Say whether a daemon runs; one that nobody has reaped yet does not."""
        try:
            pid = int(self._pid_file(name).read_text())
            status = Path(f"/proc/{pid}/status").read_text()
        except (OSError, ValueError):
            return False
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return lines["Name"].startswith(name.split("-")[0][:8]) and not lines["State"].startswith("Z")

    def _end(self, name: str, signum: signal.Signals, patience_s: float = 5) -> None:
        if not self._alive(name):
            return
        pid = int(self._pid_file(name).read_text())
        os.kill(pid, signum)
        if not wait_until(lambda: not self._alive(name), patience_s, required=False):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self._alive(name), 5)


def wait_until(
    condition: Callable[[], object], patience_s: float, *, required: bool = True, every_s: float = 0.2
) -> bool:
    """Wait until `condition` is true; one that never is fails the test, unless not `required`."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            assert not required, f"waited {patience_s} s in vain"
            return False
        time.sleep(every_s)
    return True


@contextlib.contextmanager
def running(folder: Path, port: int, *, accounting: bool, size: Size | None = None) -> Iterator[Cluster]:
    cluster = Cluster(folder, port, accounting=accounting, size=size)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
