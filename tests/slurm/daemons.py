"""Daemons of a folder, known by the process ids that they leave there, and commands that talk to them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class Daemons:
    """What runs for the cluster in `folder`, whose commands are run with `environment`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def run(self, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands against this cluster; look at `returncode` yourself."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )

    def output(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def start(self, *command: str) -> None:
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

    def pid_file(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.pid"

    def alive(self, name: str) -> bool:
        """Say whether a daemon runs; one that nobody has reaped yet does not."""
        try:
            pid = int(self.pid_file(name).read_text())
            status = Path(f"/proc/{pid}/status").read_text()
        except (OSError, ValueError):
            return False
        lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return lines["Name"].startswith(name.split("-")[0][:8]) and not lines["State"].startswith("Z")

    def end(self, name: str, signum: signal.Signals, patience_s: float = 5) -> None:
        if not self.alive(name):
            return
        pid = int(self.pid_file(name).read_text())
        os.kill(pid, signum)
        if not wait_until(lambda: not self.alive(name), patience_s, required=False):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self.alive(name), 5)


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
