"""Everything at once, drawn from a seed: 60 runs, each of which ends with one result.

Most of them only sleep. Some train, and must end with the weights of a run that nobody disturbed; some outgrow the
memory that they ask for at first.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qlora_lab.config import hardware
from qlora_lab.runs.folder import FINISHED, RUNNING, RunFolder
from qlora_lab.sweep.prepare import prepare
from tests.helpers import tiny
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import FakeStudy
from tests.small_disk import fill, small_disk

ROOT = Path(__file__).parents[2]
RUNS = 60
TRAINED, OUTGROWING = (1, 2, 3), (4, 5)
TRAINING = [
    "data.rows=32",
    "evaluation.max_new_tokens=24",
    "adapter.dropout=0.1",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.max_steps=400",
    "trainer.checkpoint_every_steps=20",
]
ALONE = "import sys; from pathlib import Path; from qlora_lab.run import execute; execute(Path(sys.argv[1]))"
FAULTS_S = float(os.environ.get("QLORA_LAB_CHAOS_S", "30"))
PATIENCE_S = 6 * FAULTS_S  # until a run that trains has a checkpoint to damage
SEED = int(os.environ.get("QLORA_LAB_SEED", "0"))


class Faults:
    """What befalls a study; each is over, or undone, when `calm` has returned."""

    def __init__(self, study: FakeStudy, disk: Path, draw: random.Random) -> None:
        self.study = study
        self.cluster = study.cluster
        self.disk = disk
        self.draw = draw
        self.launchers: list[subprocess.Popen[str]] = []
        self.others: list[str] = []  # jobs that push ours out
        self.done: list[str] = []
        self.damaged = 0
        self._kinds: list[tuple[int, Callable[[], None]]] = [
            (4, self.kill_a_run),
            (3, self.tell_a_run_to_stop),
            (4, self.start_launchers),
            (3, self.kill_a_launcher),
            (1, self.kill_the_controller),
            (1, self.kill_a_node),
            (1, self.drain_a_node),
            (1, self.fill_the_disk),
            (1, self.cancel_a_job),
            (1, self.push_out),
            (1, self.damage_a_checkpoint),
        ]

    def one(self) -> None:
        """Do what is drawn; a checkpoint to damage is rare, so that the first one is not left to chance."""
        weights, kinds = zip(*self._kinds, strict=True)
        (kind,) = self.draw.choices(kinds, weights)
        if not self.damaged:
            self.damage_a_checkpoint()
        self.done.append(kind.__name__)
        kind()

    def calm(self) -> None:
        for launcher in self.launchers:
            launcher.communicate(timeout=200)
        (self.disk / "ballast").unlink(missing_ok=True)
        self.cluster.start()
        for node in self.cluster.node_names:
            self.cluster.resume(node)
        self.cluster.wait_for_nodes()
        if self.others:  # after a node's or the controller's death, SLURM may hold one for ever
            self.cluster.run("scancel", *self.others)

    def kill_a_run(self) -> None:
        self._signal(signal.SIGKILL)

    def tell_a_run_to_stop(self) -> None:
        self._signal(self.draw.choice([signal.SIGUSR2, signal.SIGTERM]))

    def start_launchers(self) -> None:
        self.launchers += [self.study.start(retry_failed=True) for _ in range(self.draw.choice([1, 1, 2]))]

    def kill_a_launcher(self) -> None:
        living = [launcher for launcher in self.launchers if launcher.poll() is None]
        if living:
            self.draw.choice(living).kill()

    def kill_the_controller(self) -> None:
        self.cluster.kill_controller()
        time.sleep(self.draw.uniform(0, 2))
        self.cluster.start_controller()

    def kill_a_node(self) -> None:
        """Its steps go on; sometimes it is back before anybody notices."""
        node = self.draw.choice(self.cluster.node_names)
        self.cluster.kill_node(node)
        time.sleep(self.draw.choice([0, 3]))
        self.cluster.start_node(node)

    def drain_a_node(self) -> None:
        node = self.draw.choice(self.cluster.node_names)
        self.cluster.drain(node)
        time.sleep(1)
        self.cluster.resume(node)

    def fill_the_disk(self) -> None:
        ballast = fill(self.disk)
        time.sleep(self.draw.uniform(0.2, 1))
        ballast.unlink()

    def cancel_a_job(self) -> None:
        jobs = sorted(self.cluster.job_states("--states=PENDING,RUNNING"))
        if jobs:
            self.cluster.run("scancel", self.draw.choice(jobs))

    def push_out(self) -> None:
        node = self.draw.choice(self.cluster.node_names)
        self.others.append(self.cluster.submit("sleep 1", "--partition=gpu", f"--nodelist={node}", "--gpus-per-node=4"))

    def damage_a_checkpoint(self) -> None:
        """Cut off the newest checkpoint of a run that trains, or will go on; who has it open is killed first."""
        candidates = [self.study.runs[number] for number in TRAINED]
        there = [run for run in candidates if run.state() != FINISHED and has_checkpoint(run)]
        if there:
            run = self.draw.choice(there)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                if run.state() == RUNNING:
                    os.kill((run.status() or {})["pid"], signal.SIGKILL)
                os.truncate(max(run.checkpoints.glob("step_*")) / "parameters.safetensors", 100)
                self.damaged += 1

    def _signal(self, signum: signal.Signals) -> None:
        # a training takes long to begin, and at this rate would never come to a checkpoint
        begun = [run for number, run in enumerate(self.study.runs) if number not in TRAINED or has_checkpoint(run)]
        running = [run for run in begun if run.state() == RUNNING]
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill((self.draw.choice(running).status() or {})["pid"], signum)


def has_checkpoint(run: RunFolder) -> bool:
    return any(run.checkpoints.glob("step_*"))


def train_alone(folder: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Start the training that nobody disturbs, in `folder`."""
    RunFolder.create(folder, run_id, prepare(tiny(folder, *TRAINING), hardware.detect()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", ALONE, str(folder / run_id)], env=environment)


def weights(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def prepare_runs(study: FakeStudy, draw: random.Random) -> None:
    config = prepare(tiny(study.runs_dir, *TRAINING), hardware.detect())
    for number, run in enumerate(study.runs):
        if number in TRAINED:
            RunFolder.create(study.runs_dir, run.run_id, config)
        elif number in OUTGROWING:  # the second attempt gets half as much again
            study.tell(number, steps=50, step_s=0.2, memory_mb=2300)
        else:
            study.tell(number, steps=draw.randint(10, 20), step_s=0.2)


def test_everything_at_once(cluster: Cluster, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    with small_disk(tmp_path / "disk", 128 << 10) as disk:
        study = FakeStudy(cluster, disk, RUNS, partition="scavenge", max_failures=RUNS, memory_gb=2)
        prepare_runs(study, draw)
        study.launch()
        faults = Faults(study, disk, draw)
        began = time.monotonic()
        while time.monotonic() - began < (FAULTS_S if faults.damaged else PATIENCE_S) and not study.is_finished():
            faults.one()
            time.sleep(draw.uniform(0.2, 1))
        faults.calm()
        alone = train_alone(tmp_path / "alone", "f" * 12)
        print(f"seed {SEED}: {len(faults.done)} faults: {' '.join(faults.done)}; {faults.damaged} checkpoints damaged")
        study.go_on(rounds=8, retry_failed=True)
        study.check_each_was_done_once(*(number for number in range(RUNS) if number not in TRAINED))
        assert alone.wait(200) == 0 and faults.damaged > 0
        straight = weights(RunFolder(tmp_path / "alone" / ("f" * 12)))
        assert [weights(study.runs[number]) == straight for number in TRAINED] == [True] * len(TRAINED)
        study.launch()
        study.wait_until_quiet()
        study.launch()
        empty = wait_until(cluster.empty, 30, required=False)
        assert empty, cluster.output("squeue", "-r", "-o", "%i %j %T %r %N")
        attempts = sum(run.attempts() for run in study.runs)
        print(f"{RUNS} runs took {attempts} attempts")
