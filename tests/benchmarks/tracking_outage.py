"""What an outage of W&B does to runs that begin before it or in it: a server that is silent, busy (429), or hangs up.

    python tests/benchmarks/tracking_outage.py [--outage-s 3600]

The server is a stand-in on this machine (tests/wandb_stand_in.py). A run is a process that opens its session with the
time-outs of conf/tracking, logs a step every `--step-s` seconds and ends; it trains nothing. When the outage is over,
`wandb sync` is given what did not arrive by itself.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.wandb_stand_in import Faults, WandbStandIn, wandb_stand_in  # noqa: E402

OUTAGES = {"silent": Faults(silent=True), "busy": Faults(status=429), "hangs up": Faults(drop=True)}
RUN = """
import sys, time
from pathlib import Path
from qlora_lab.tracking.session import open_session
from tests.helpers import tiny

folder, run_id, steps, step_s = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
session = open_session(tiny(folder, "tracking=wandb_online"), run_id, "outage", folder)
opened = time.monotonic()
for step in range(steps):
    time.sleep(max(0.0, opened + step * step_s - time.monotonic()))
    session.log(step, {"train/loss": float(step)})
logged = time.monotonic()
session.finish("finished", {"eval/loss": 1.0})
print(f"late by {logged - opened - (steps - 1) * step_s:.2f} s; finish took {time.monotonic() - logged:.1f} s")
"""


@dataclass(frozen=True)
class Run:
    """One run, and the process that executes it."""

    name: str
    server: WandbStandIn
    folder: Path
    steps: int
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, number: int, server: WandbStandIn, folder: Path, steps: int, step_s: float) -> "Run":
        run_id = f"{number:012x}"
        words = [sys.executable, "-c", RUN, str(folder / run_id), run_id, str(steps), str(step_s)]
        process = subprocess.Popen(
            words,
            env=server.environment(folder / "home") | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return cls(name, server, folder / run_id, steps, process)

    def missing(self) -> int:
        """Return how many points of the curve the server lacks."""
        there = {line.get("train/loss") for line in self.server.history(self.folder.name)}
        return sum(step not in there for step in range(self.steps))

    def sync(self) -> None:
        files = sorted(self.folder.glob("wandb/*run-*"))
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *map(str, files)],
            env=self.server.environment(self.folder.parent / "home"),
            cwd=self.folder.parent,  # it leaves logs in ./wandb
            check=True,
            capture_output=True,
            timeout=300,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outage-s", type=float, default=3600.0)
    parser.add_argument("--around-s", type=float, default=60.0, help="before and after it, while the server answers")
    parser.add_argument("--step-s", type=float, default=5.0)
    options = parser.parse_args()
    around_s, outage_s, step_s = options.around_s, options.outage_s, options.step_s
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        servers = {outage: stack.enter_context(wandb_stand_in()) for outage in OUTAGES}
        runs: list[Run] = []

        def start(name: str, lasts_s: float) -> None:
            for outage, server in servers.items():
                number = len(runs)
                runs.append(
                    Run.start(f"{outage}, {name}", number, server, Path(temporary), round(lasts_s / step_s), step_s)
                )

        start("begun before, ended after", around_s + outage_s + around_s)
        start("begun before, ended in it", around_s + outage_s / 2)
        time.sleep(around_s)
        for outage, server in servers.items():
            server.faults = OUTAGES[outage]
        began = time.monotonic()
        start("begun and ended in it", outage_s / 2)
        time.sleep(max(0.0, began + outage_s - time.monotonic()))
        for server in servers.values():
            server.faults = Faults()
        print(f"an outage of {time.monotonic() - began:.0f} s; a step every {step_s:g} s", flush=True)
        for run in runs:
            said, _ = run.process.communicate(timeout=outage_s + 10 * around_s)
            arrived = run.steps - run.missing()
            if run.missing():
                run.sync()
            last = (said.strip().splitlines() or ["nothing"])[-1]
            print(
                f"{run.name}: exit {run.process.returncode}; {last}; {arrived} of {run.steps} points arrived by "
                f"themselves, {run.missing()} are missing after wandb sync",
                flush=True,
            )


if __name__ == "__main__":
    main()
