"""Fake studies on a cluster: launch, wait for their end, and look whether anything was lost or done twice."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_lab.runs.causes import RULES
from qlora_lab.runs.folder import FAILED, FINISHED, NEW, RUNNING, RunFolder
from qlora_lab.sweep.plan import make_plan
from qlora_lab.sweep.settle import may_go_on
from qlora_lab.sweep.slurm.script import nonce_of
from tests.helpers import TINY, tiny
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.launcher_names import run_ids

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def whole_lines(text: str) -> list[dict[str, Any]]:
    """Return the lines of JSON, but for what a kill or a full disk cut off, and what was written right after it."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    return whole_lines((run.path / "metrics.jsonl").read_text())


def check_record(run: RunFolder) -> None:
    """The run's record says that it finished once, and why each earlier attempt did not."""
    status = run.status()
    assert run.state() == FINISHED and status is not None, status
    attempts = [*status["history"], status]
    numbers = [attempt["attempt"] for attempt in attempts]
    assert numbers == sorted(set(numbers)), f"run {run.run_id}: {attempts}"
    assert [attempt["state"] for attempt in attempts].count(FINISHED) == 1 and status["cause"] is None
    assert all(attempt["cause"] in RULES for attempt in status["history"]), f"run {run.run_id}: {attempts}"


def check_one_writer(run: RunFolder) -> None:
    """No attempt at the run wrote after a later one had begun to."""
    moments: dict[int, list[float]] = {}
    for line in whole_lines((run.path / "writers.jsonl").read_text()):
        moments.setdefault(line["attempt"], []).append(line["at"])
    for earlier, later in itertools.pairwise(sorted(moments)):
        assert max(moments[earlier]) < min(moments[later]), f"run {run.run_id} had two writers: {moments}"


def is_out_of_tries(run: RunFolder) -> bool:
    """Say whether a run failed and only `retry` tries it again, after no more attempts than the rule of its cause."""
    status = run.status() or {"state": NEW}
    if status["state"] != FAILED or may_go_on(status):
        return False
    causes = [attempt["cause"] for attempt in [*status["history"], status]]
    last = next((number for number, cause in enumerate(causes[::-1]) if cause != causes[-1]), len(causes))
    assert last <= RULES[causes[-1]].attempts, f"run {run.run_id}: {causes}"
    return True


class FakeStudy:
    """`count` runs of tests/slurm/fake in `runs_dir`; `given` is said to all of them, `settings` to the launcher."""

    JOURNAL = "slurm/journal.jsonl"

    def __init__(self, cluster: Cluster, runs_dir: Path, count: int, **settings: Any) -> None:
        self.cluster = cluster
        self.runs_dir = runs_dir
        self.count = count
        self.settings = settings
        self.variables: dict[str, str] = {}  # of the environment of launchers, and so of their jobs
        self.runs = [RunFolder(runs_dir / run_id) for run_id in run_ids(count)]

    def tell(self, *numbers: int, **given: Any) -> None:
        for number in numbers or range(self.count):
            self.runs[number].path.mkdir(parents=True, exist_ok=True)
            (self.runs[number].path / "fake.json").write_text(json.dumps(given))

    def start(self, **settings: Any) -> subprocess.Popen[str]:
        words = [f"{key}={json.dumps(value)}" for key, value in (self.settings | settings).items()]
        return self._start(str(HERE / "launcher.py"), str(self.runs_dir), str(self.count), *words)

    def _start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        paths = {"PYTHONPATH": os.pathsep.join([str(HERE / "fake"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *words],
            env={**self.cluster.environment, **paths, **self.variables, **variables},
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
            self.cluster.release_refused()
            quiet = wait_until(self.cluster.quiet, patience_s, required=False, every_s=0.5)
        assert quiet, self.cluster.output("squeue", "-r", "-t", "PD,R,CG,S,CF", "-o", "%i %T %r %E %N")

    def go_on(
        self, rounds: int = 4, until: Callable[[], bool] | None = None, patience_s: float = 120, **settings: Any
    ) -> None:
        """Repeat the command until every run is finished, or `until` says so."""
        for _ in range(rounds):
            self.launch(**settings)
            self.wait_until_quiet(patience_s)
            if (until or self.is_finished)():
                return
        raise AssertionError(self.states())

    def check_each_was_done_once(self, *numbers: int) -> None:
        """Every run has one result, its steps follow one another, and no two attempts had it at the same time."""
        for run in [self.runs[number] for number in numbers or range(self.count)]:
            check_record(run)
            lines = metrics(run)
            steps, attempts = [line["step"] for line in lines], [line["attempt"] for line in lines]
            assert steps == list(range(1, len(steps) + 1)), f"run {run.run_id}: {lines}"
            assert attempts == sorted(attempts)
            assert run.result()["attempt"] == (run.status() or {})["attempt"] >= attempts[-1]
            check_one_writer(run)

    def journal(self) -> str:
        """Return what launchers have noted, as it is in the file."""
        return "".join(file.read_text() for file in self.runs_dir.glob(self.JOURNAL))

    def last_event(self) -> str:
        """Return the last event that the journal has a whole line of; nothing where it has none."""
        return next((line["event"] for line in reversed(whole_lines(self.journal()))), "nothing")

    def has_jobs(self) -> bool:
        """Say whether SLURM has a job of this study that is not over, held for ever or not.

        Another test's may be there too: a killed controller goes back to what it saved, some seconds before.
        """
        nonces = {line["nonce"] for line in whole_lines(self.journal())}
        comments = self.cluster.output("squeue", "-h", "-t", "PD,R,CG,S,CF", "-o", "%k").splitlines()
        return any(nonce_of(comment) in nonces for comment in comments)

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted((self.runs_dir / "slurm" / "logs").glob("*.log")))


class CommandStudy(FakeStudy):
    """A study of `count` seeds that the project's own commands plan, launch and steer; only its runs are fake."""

    JOURNAL = "studies/*/*/slurm/journal.jsonl"
    GIVEN = ("launcher=slurm", "launcher.slurm.cpus_per_run=1", "launcher.slurm.memory_gb=4", "study.name=commanded")
    FIXED = ("launcher.slurm.time_limit_min=10", "trainer.device=cpu", "trainer.threads=1")

    def __init__(self, cluster: Cluster, runs_dir: Path, count: int) -> None:
        super().__init__(cluster, runs_dir, count)
        config = tiny(runs_dir, *self.GIVEN, *self.FIXED)
        points = [({"seed": str(seed)}, replace(config, seed=seed)) for seed in range(count)]
        self.plan = make_plan("commanded", points)
        self.runs = [run.folder(runs_dir) for run in self.plan.runs]

    def first(self, *overrides: str) -> subprocess.Popen[str]:
        """Start the command that begins the study, or begins it again."""
        paths = (f"paths.runs_dir={self.runs_dir}", f"paths.cache_dir={self.runs_dir}/cache")
        seeds = f"seed={','.join(str(seed) for seed in range(self.count))}"
        words = (*TINY, *self.GIVEN, *self.FIXED, *paths, seeds, *overrides)
        return self._start("-m", "qlora_lab.sweep", *words, FAKE_RUNS="1")

    def steer(self, action: str, *words: str) -> subprocess.Popen[str]:
        """Start a command about the study."""
        given = (action, "commanded", "--runs-dir", str(self.runs_dir), *words)
        return self._start("-m", "qlora_lab.sweep", *given, FAKE_RUNS="1")


def said(process: subprocess.Popen[str], status: int = 0) -> str:
    """Return what a command printed, once it has ended with this status."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == status, out + err
    return out + err
