"""Everything at once, drawn from a seed: 60 runs, each of which ends with one result.

Most of them only sleep. Some train, and must end with the weights of a run that nobody disturbed, and with its whole
curve, whatever W&B's server does meanwhile; some take longer than a job may; some outgrow the memory that they ask for
at first. One crashes each time, and must be given up by the rule of its cause until it is mended. The site has no room
for a job for each run, so that at first workers take them.
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
from qlora_lab.runs.causes import CODE, TIME_LIMIT
from qlora_lab.runs.folder import FINISHED, RUNNING, RunFolder
from qlora_lab.sweep.prepare import prepare
from tests.helpers import tiny
from tests.slurm.accounting import SUBMIT_LIMIT
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import wait_until
from tests.slurm.study import FakeStudy, check_one_writer, check_record, is_out_of_tries, metrics
from tests.small_disk import fill, small_disk
from tests.wandb_stand_in import KEY, Faults, WandbStandIn, wandb_stand_in

ROOT = Path(__file__).parents[2]
RUNS = 60
TRAINED, OUTGROWING, CRASHING, LONG = (1, 2, 3), (4, 5), 6, (7, 8)
ROOM = RUNS // 2  # for jobs of ours, at first
TRAINING = [
    "data.rows=32",
    "evaluation.max_new_tokens=24",
    "adapter.dropout=0.1",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.max_steps=200",
    "trainer.checkpoint_every_steps=10",
]
TRACKED = ["tracking=wandb_online", "tracking.init_timeout_s=3", "tracking.finish_timeout_s=1"]
OUTAGES = [Faults(silent=True), Faults(delay_s=4), Faults(status=429), Faults(drop=True)]
ALONE = "import sys; from pathlib import Path; from qlora_lab.run import execute; execute(Path(sys.argv[1]))"
FAULTS_S = float(os.environ.get("QLORA_LAB_CHAOS_S", "30"))
PATIENCE_S = 6 * FAULTS_S  # until a run that trains has a checkpoint to damage, and every fault has struck
SEED = int(os.environ.get("QLORA_LAB_SEED", "0"))


class Chaos:
    """What befalls a study; each fault is over, or undone, when `calm` has returned. Each says whether it struck."""

    def __init__(self, study: FakeStudy, disk: Path, tracker: WandbStandIn, draw: random.Random) -> None:
        self.study = study
        self.cluster = study.cluster
        self.disk = disk
        self.tracker = tracker
        self.draw = draw
        self.launchers: list[subprocess.Popen[str]] = []
        self.others: list[str] = []  # jobs of somebody else: some push ours out, some leave no room for ours
        self.gone: str | None = None  # a node that SLURM has given up
        self.done: list[str] = []
        self._kinds: list[tuple[int, Callable[[], bool]]] = [
            (4, self.kill_a_run),
            (2, self.tell_a_run_to_stop),
            (1, self.tell_a_run_to_stop_three_times),
            (4, self.start_launchers),
            (3, self.kill_a_launcher),
            (1, self.kill_the_controller),
            (1, self.kill_the_accounting),
            (1, self.kill_a_node),
            (1, self.lose_a_node),
            (1, self.drain_a_node),
            (1, self.fill_the_disk),
            (1, self.cancel_what_runs),
            (1, self.cancel_what_waits),
            (1, self.push_out),
            (1, self.damage_a_checkpoint),
            (1, self.change_the_outage),
        ]
        self.missing = draw.sample([kind for _, kind in self._kinds], len(self._kinds))

    def one(self) -> None:
        """Do the first of those that have not struck yet and can, else what is drawn."""
        if not any(self.strike(kind) for kind in list(self.missing)):
            weights, kinds = zip(*self._kinds, strict=True)
            self.strike(self.draw.choices(kinds, weights)[0])

    def strike(self, kind: Callable[[], bool]) -> bool:
        struck = kind()
        if struck:
            self.done.append(kind.__name__)
            self.missing = [each for each in self.missing if each != kind]
        return struck

    def calm(self) -> None:
        for launcher in self.launchers:
            launcher.communicate(timeout=200)
        self.tracker.faults = Faults()
        (self.disk / "ballast").unlink(missing_ok=True)
        self.cluster.start()
        for node in self.cluster.node_names:
            self.cluster.resume(node)
        self.cluster.wait_for_nodes()
        if self.others:  # after a node's or the controller's death, SLURM may hold one for ever
            self.cluster.run("scancel", *self.others)

    def crowd(self) -> None:
        """Take all but `ROOM` places of the submit limit, with jobs that never start."""
        last = SUBMIT_LIMIT - ROOM - 1
        self.others.append(self.cluster.submit("true", "--qos=capped", "--hold", f"--array=0-{last}"))

    def kill_a_run(self) -> bool:
        return self._signal(signal.SIGKILL)

    def tell_a_run_to_stop(self) -> bool:
        return self._signal(self.draw.choice([signal.SIGUSR2, signal.SIGTERM]))

    def tell_a_run_to_stop_three_times(self) -> bool:
        return self._signal(signal.SIGUSR2, times=3)

    def start_launchers(self) -> bool:
        given = {"retry_failed": True, "beyond_rules": False}
        self.launchers += [self.study.start(**given) for _ in range(self.draw.choice([1, 1, 2]))]
        return True

    def kill_a_launcher(self) -> bool:
        living = [launcher for launcher in self.launchers if launcher.poll() is None]
        if living:
            self.draw.choice(living).kill()
        return bool(living)

    def kill_the_controller(self) -> bool:
        self.cluster.kill_controller()
        time.sleep(self.draw.uniform(0, 2))
        self.cluster.start_controller()
        return True

    def kill_the_accounting(self) -> bool:
        """A launcher meets a site without limits and books, but for the file of completed jobs."""
        self.cluster.kill_accounting()
        self.start_launchers()
        time.sleep(self.draw.uniform(1, 3))
        self.cluster.start_accounting()
        return True

    def kill_a_node(self) -> bool:
        """Its steps go on, and it is back before anybody notices."""
        node = self.draw.choice(self.cluster.node_names)
        if node != self.gone:
            self.cluster.kill_node(node)
            time.sleep(self.draw.choice([0, 3]))
            self.cluster.start_node(node)
        return node != self.gone

    def lose_a_node(self) -> bool:
        """Its steps go on while SLURM starts them elsewhere, until it comes back, as another goes."""
        node = self._node()
        if not any(run.state() == RUNNING and (run.status() or {})["node"] == node for run in self.study.runs):
            return False
        if self.gone is not None:
            self.cluster.start_node(self.gone)
            self.cluster.resume(self.gone)
        self.gone = node
        self.cluster.kill_node(self.gone)
        self.cluster.give_up_node(self.gone)
        return True

    def drain_a_node(self) -> bool:
        node = self.draw.choice(self.cluster.node_names)
        if node != self.gone:
            self.cluster.drain(node)
            time.sleep(1)
            self.cluster.resume(node)
        return node != self.gone

    def fill_the_disk(self) -> bool:
        ballast = fill(self.disk)
        time.sleep(self.draw.uniform(0.2, 1))
        ballast.unlink()
        return True

    def cancel_what_runs(self) -> bool:
        return self._cancel("RUNNING")

    def cancel_what_waits(self) -> bool:
        return self._cancel("PENDING")

    def _cancel(self, state: str) -> bool:
        jobs = [job for job in self.cluster.job_states(f"--states={state}") if job.split("_")[0] not in self.others]
        if jobs:
            self.cluster.run("scancel", self.draw.choice(sorted(jobs)))
        return bool(jobs)

    def push_out(self) -> bool:
        node = self._node()
        self.others.append(self.cluster.submit("sleep 1", "--partition=gpu", f"--nodelist={node}", "--gpus-per-node=4"))
        return True

    def damage_a_checkpoint(self) -> bool:
        """Cut off the newest checkpoint of a run that trains, or will go on; who has it open is killed first."""
        candidates = [self.study.runs[number] for number in TRAINED]
        there = [run for run in candidates if run.state() != FINISHED and has_checkpoint(run)]
        if there:
            run = self.draw.choice(there)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                if run.state() == RUNNING:
                    os.kill((run.status() or {})["pid"], signal.SIGKILL)
                os.truncate(max(run.checkpoints.glob("step_*")) / "parameters.safetensors", 100)
                return True
        return False

    def change_the_outage(self) -> bool:
        """W&B's server is silent, slow, turns all away, or hangs up."""
        self.tracker.faults = self.draw.choice([each for each in OUTAGES if each is not self.tracker.faults])
        return True

    def _node(self) -> str:
        """Draw a node, of those where a run trains that can go on from a checkpoint, if there are any."""
        training = [self.study.runs[number] for number in TRAINED if has_checkpoint(self.study.runs[number])]
        nodes = {str((run.status() or {})["node"]) for run in training if run.state() == RUNNING}
        return self.draw.choice(sorted(nodes) or self.cluster.node_names)

    def _signal(self, signum: signal.Signals, times: int = 1) -> bool:
        # a training takes long to begin, and at this rate would never come to a checkpoint
        begun = [run for number, run in enumerate(self.study.runs) if number not in TRAINED or has_checkpoint(run)]
        running = [run for run in begun if run.state() == RUNNING]
        if running:
            pid = (self.draw.choice(running).status() or {})["pid"]
            with contextlib.suppress(ProcessLookupError):
                for _ in range(times):
                    os.kill(pid, signum)
                    time.sleep(0.05)
        return bool(running)


def has_checkpoint(run: RunFolder) -> bool:
    return any(run.checkpoints.glob("step_*"))


def train_alone(folder: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Start the training that nobody disturbs, in `folder`."""
    RunFolder.create(folder, run_id, prepare(tiny(folder, *TRAINING), hardware.detect()))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", ALONE, str(folder / run_id)], env=environment)


def weights(run: RunFolder) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def losses(run: RunFolder) -> dict[int, float]:
    """Return the curve of a run's training; steps that were repeated from a checkpoint have the same loss again."""
    found: dict[int, float] = {}
    for line in metrics(run):
        if "train/loss" in line:
            assert found.setdefault(line["step"], line["train/loss"]) == line["train/loss"], f"{run.run_id}: {line}"
    return found


def prepare_runs(study: FakeStudy, draw: random.Random) -> None:
    config = prepare(tiny(study.runs_dir, *TRAINING, *TRACKED), hardware.detect())
    for number, run in enumerate(study.runs):
        if number in TRAINED:
            RunFolder.create(study.runs_dir, run.run_id, config)
        elif number in OUTGROWING:  # the second attempt gets half as much again
            study.tell(number, steps=50, step_s=0.2, memory_mb=2300)
        elif number == CRASHING:
            study.tell(number, fail="a bug")
        elif number in LONG:  # than a job may take
            study.tell(number, steps=70, step_s=2.0)
        else:
            study.tell(number, steps=draw.randint(10, 20), step_s=0.2)


def test_everything_at_once(cluster: Cluster, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    site = {"partition": "scavenge", "qos": "capped", "time_limit_min": 2, "memory_gb": 2}
    with (
        small_disk(tmp_path / "disk", 128 << 10) as disk,
        wandb_stand_in() as tracker,
        contextlib.ExitStack() as at_the_end,
    ):
        study = FakeStudy(cluster, disk, RUNS, max_failures=RUNS, **site)
        study.variables = {"WANDB_BASE_URL": tracker.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path)}
        prepare_runs(study, draw)
        chaos = Chaos(study, disk, tracker, draw)
        chaos.crowd()
        chaos.change_the_outage()
        first = study.launch()
        assert len(first["submitted"]) == RUNS and len(cluster.job_states(f"--jobs={','.join(first['jobs'])}")) <= ROOM
        # all the others, from the first moment on, would keep trainings from ever coming to one
        wait_until(lambda: chaos.strike(chaos.damage_a_checkpoint), PATIENCE_S)
        began = time.monotonic()
        while not study.is_finished() and time.monotonic() - began < (PATIENCE_S if chaos.missing else FAULTS_S):
            chaos.one()
            time.sleep(draw.uniform(0.2, 1))
        chaos.calm()
        alone = train_alone(tmp_path / "alone", "f" * 12)
        at_the_end.callback(alone.wait)  # the last that was given is called first
        at_the_end.callback(alone.kill)
        print(f"seed {SEED}: {len(chaos.done)} faults: {' '.join(chaos.done)}; {tracker.struck} requests to W&B struck")
        assert not chaos.missing and tracker.struck > 0
        crashing = study.runs[CRASHING]
        given_up = {"until": lambda: is_out_of_tries(crashing), "retry_failed": True, "beyond_rules": False}
        study.go_on(rounds=8, patience_s=240, **given_up)
        study.tell(CRASHING)
        study.go_on(rounds=8, patience_s=240, retry_failed=True, beyond_rules=True)
        study.check_each_was_done_once(*(number for number in range(RUNS) if number not in TRAINED))
        assert alone.wait(900) == 0
        straight, curve = RunFolder(tmp_path / "alone" / ("f" * 12)), losses(RunFolder(tmp_path / "alone" / ("f" * 12)))
        assert [weights(study.runs[number]) == weights(straight) for number in TRAINED] == [True] * len(TRAINED)
        for number in TRAINED:
            check_record(study.runs[number])
            check_one_writer(study.runs[number])
            assert losses(study.runs[number]) == curve, "without gaps, and what was repeated is the same"
            assert CODE not in study.causes(number), "no run minds what W&B's server does"
        assert any(TIME_LIMIT in study.causes(number) for number in LONG)
        study.launch()
        study.wait_until_quiet()
        study.launch()
        empty = wait_until(cluster.empty, 30, required=False)
        assert empty, cluster.output("squeue", "-r", "-o", "%i %j %T %r %N")
        attempts = sum(run.attempts() for run in study.runs)
        print(f"{RUNS} runs took {attempts} attempts; {[study.causes(number) for number in (*TRAINED, *LONG)]}")
