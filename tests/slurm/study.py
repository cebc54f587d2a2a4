"""Fake studies on a cluster: launch, wait for their end, and look whether anything was lost or done twice."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qlora_lab.runs.folder import FINISHED, RUNNING, RunFolder
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.launcher_names import run_ids

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, but for what a kill or a full disk cut off."""
    found = []
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class FakeStudy:
    """`count` runs of tests/slurm/fake in `runs_dir`; `given` is said to all of them, `settings` to the launcher."""

    def __init__(self, cluster: Cluster, runs_dir: Path, count: int, **settings: Any) -> None:
        self.cluster = cluster
        self.runs_dir = runs_dir
        self.count = count
        self.settings = settings
        self.runs = [RunFolder(runs_dir / run_id) for run_id in run_ids(count)]

    def tell(self, *numbers: int, **given: Any) -> None:
        for number in numbers or range(self.count):
            self.runs[number].path.mkdir(parents=True, exist_ok=True)
            (self.runs[number].path / "fake.json").write_text(json.dumps(given))

    def start(self, **settings: Any) -> subprocess.Popen[str]:
        words = [f"{key}={json.dumps(value)}" for key, value in (self.settings | settings).items()]
        environment = {
            **self.cluster.environment,
            "PYTHONPATH": os.pathsep.join([str(HERE / "fake"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py"), str(self.runs_dir), str(self.count), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, **settings: Any) -> dict[str, Any]:
        process = self.start(**settings)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return json.loads(out.strip().splitlines()[-1])

    def states(self) -> list[str]:
        return [run.state() for run in self.runs]

    def is_finished(self) -> bool:
        return all(state == FINISHED for state in self.states())

    def causes(self, number: int = 0) -> list[str]:
        """Return why the earlier attempts at a run ended."""
        return [attempt["cause"] for attempt in (self.runs[number].status() or {})["history"]]

    def wait_until_begun(self, number: int = 0, step: int = 2) -> dict[str, Any]:
        """Wait until a run has taken some steps, and return its status."""
        run = self.runs[number]
        wait_until(lambda: (run.last_metrics() or {"step": 0})["step"] >= step, 60)
        status = run.status()
        assert status is not None and status["state"] == RUNNING
        return status

    def wait_until_finished(self, patience_s: float = 90) -> None:
        wait_until(self.is_finished, patience_s)

    def wait_until_quiet(self, patience_s: float = 120) -> None:
        quiet = wait_until(self.cluster.quiet, patience_s / 6, required=False, every_s=0.5)
        if not quiet:
            self.cluster.ask_nodes()
            quiet = wait_until(self.cluster.quiet, patience_s, required=False, every_s=0.5)
        assert quiet, self.cluster.output("squeue", "-r", "-t", "PD,R,CG,S,CF", "-o", "%i %T %r %E %N")

    def go_on(self, rounds: int = 4, **settings: Any) -> None:
        """Repeat the command until every run is finished."""
        for _ in range(rounds):
            self.launch(**settings)
            self.wait_until_quiet()
            if self.is_finished():
                return
        raise AssertionError(self.states())

    def check_each_was_done_once(self, *numbers: int) -> None:
        """Every run has one result, its steps follow one another, and no attempt wrote after a later one."""
        for run in [self.runs[number] for number in numbers or range(self.count)]:
            assert run.state() == FINISHED, run.status()
            lines = metrics(run)
            steps, attempts = [line["step"] for line in lines], [line["attempt"] for line in lines]
            assert steps == list(range(1, len(steps) + 1)), f"run {run.run_id}: {lines}"
            assert attempts == sorted(attempts)
            assert run.result()["attempt"] >= attempts[-1]

    def journal(self) -> str:
        """Return what launchers have noted, as it is in the file."""
        file = self.runs_dir / "slurm" / "journal.jsonl"
        return file.read_text() if file.exists() else ""

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted((self.runs_dir / "slurm" / "logs").glob("*.log")))
