"""A SLURM cluster of several nodes on this one machine, with fake GPUs: real daemons, private to one folder.

No systemd, no cgroups, nothing below /etc. Debian's slurmd is built for several nodes on one host (`slurmd -N NAME`);
a GPU must be a device file, and a link to /dev/null is one.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.slurm.accounting import start_accounting
from tests.slurm.configuration import Size, write_configuration
from tests.slurm.daemons import Daemons, wait_until

BASE_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
ACCOUNTING_COMMANDS = ("slurmdbd", "mariadbd", "mariadb-install-db")
REFUSED = "launch failed requeued held"  # SLURM's reason for a job that a node would not start


def missing(accounting: bool) -> str | None:
    """Say why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "the daemons of SLURM need root"
    wanted = BASE_COMMANDS + (ACCOUNTING_COMMANDS if accounting else ())
    absent = [name for name in wanted if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/slurm/install.sh)"
    return None


class Cluster:
    """Daemons in `folder`, listening on ports from `port` up; `environment` makes SLURM's commands talk to them."""

    def __init__(self, folder: Path, port: int, *, accounting: bool, size: Size | None = None) -> None:
        self.folder = folder
        self.port = port
        self.accounting = accounting
        self.size = size or Size()
        self.node_names = self.size.node_names
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }
        self.daemons = Daemons(folder, self.environment)
        self.run, self.output = self.daemons.run, self.daemons.output

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
        write_configuration(self.folder, self.port, self.size, accounting=self.accounting)
        self._start_munged()
        self.start_accounting()
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        self.wait_for_nodes()

    def stop(self) -> None:
        """Cancel every job and end every daemon this object's folder knows the process id of."""
        if self.daemons.alive("slurmctld"):
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--user=root", timeout_s=20)
            wait_until(lambda: not self.run("squeue", "-h", "-t", "R,CG,S").stdout, 15, required=False)
        for name in [*(f"slurmd-{node}" for node in self.node_names), "slurmctld", "slurmdbd", "mariadb", "munged"]:
            self.daemons.end(name, signal.SIGTERM, patience_s=15)

    # ---- single daemons

    def start_controller(self) -> None:
        if not self.daemons.alive("slurmctld"):
            self.daemons.pid_file("slurmctld").unlink(missing_ok=True)
            self.daemons.start("slurmctld")
        wait_until(lambda: self.run("scontrol", "ping").returncode == 0, 30)

    def kill_controller(self) -> None:
        self.daemons.end("slurmctld", signal.SIGKILL)

    def start_accounting(self) -> None:
        if self.accounting:
            start_accounting(self.daemons, self.port + 2)

    def kill_accounting(self) -> None:
        self.daemons.end("slurmdbd", signal.SIGKILL)

    @contextlib.contextmanager
    def other_settings(self, settings: Mapping[str, str]) -> Iterator[None]:
        """Have another text in the place of each in slurm.conf, and a controller that has read it, inside the block."""
        file = self.folder / "etc" / "slurm.conf"
        before = text = file.read_text()
        for old, new in settings.items():
            assert old in text, old
            text = text.replace(old, new)
        try:
            self._restart_controller(file, text)
            yield
        finally:
            self._restart_controller(file, before)

    def _restart_controller(self, file: Path, settings: str) -> None:
        # asked to end, it saves its state: a killed one may give ids of ended jobs again, which nodes refuse to start
        self.daemons.end("slurmctld", signal.SIGTERM, patience_s=30)
        file.write_text(settings)
        self.start_controller()
        self.wait_for_nodes()

    def start_node(self, name: str) -> None:
        if not self.daemons.alive(f"slurmd-{name}"):
            self.daemons.pid_file(f"slurmd-{name}").unlink(missing_ok=True)
            self.daemons.start("slurmd", "-N", name)

    def ask_nodes(self) -> None:
        """Let every node say what runs there.

        A controller that was killed believes that what ended meanwhile still runs, until nodes report, every 100 s.
        """
        self.run("scontrol", "reconfigure")

    def release_refused(self) -> None:
        """Let jobs start that a node refused: a controller killed before it saved gave them the ids of ended ones."""
        for line in self.output("squeue", "-h", "-r", "-t", "PD", "-o", "%i|%r").splitlines():
            job, reason = line.split("|", 1)
            if reason == REFUSED:
                self.run("scontrol", "release", job)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon, but not what it has started: job steps go on, as behind a broken network."""
        self.daemons.end(f"slurmd-{name}", signal.SIGKILL)

    def give_up_node(self, name: str) -> None:
        """Tell SLURM that a node is down, as it would find out itself after a while: its jobs start elsewhere."""
        self.output("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

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
        return all(reason == REFUSED for reason in lines)

    def empty(self) -> bool:
        return not self.output("squeue", "-h", "-t", "PD,R,CG,S,CF")

    def _start_munged(self) -> None:
        if self.daemons.alive("munged"):
            return
        run = self.folder / "run"
        for stale in run.glob("munge*"):
            stale.unlink()
        key = self.folder / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            key.chmod(0o400)
        self.daemons.start(
            "munged",
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log",
            f"--seed-file={self.folder}/munge/seed",
            "--num-threads=2",
        )
        wait_until(lambda: self.run("munge", "-S", f"{run}/munge.socket", "-n").returncode == 0, 15)


@contextlib.contextmanager
def running(folder: Path, port: int, *, accounting: bool, size: Size | None = None) -> Iterator[Cluster]:
    cluster = Cluster(folder, port, accounting=accounting, size=size)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
