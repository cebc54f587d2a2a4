"""What a study of 10,000 runs costs to plan, submit, see and start, beside stock Hydra + hydra-submitit-launcher.

    pip install --target FOLDER --no-deps hydra-submitit-launcher==1.2.0
    python tests/benchmarks/sweep_costs.py --stock FOLDER [--runs 10080] [--only plan,submit,again,worker,import,dead]

CPU seconds of whole processes, imports included; both columns of the table that it ends with are of this one run,
which takes three to five minutes. No run trains: sbatch, squeue and scontrol are scripts that take everything and start
nothing, and what a worker executes leaves the files of a finished run and no more. The study has 160 combinations of
four groups and 7 learning rates; `--runs` is rounded up to whole seeds of it. Stock Hydra composes every run in the
launcher, and again in its job; it grows with the runs alone, so that it is measured on a quarter of `--sample` runs and
on all of them, and what the further ones cost is multiplied.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AXES = {
    "adapter": "all_linear,attention,feed_forward,query_value,qlora_paper",
    "quant": "none,nf4,fp4_e2m1,fp4_e3m0,int4,int8,nf3,nf2",
    "data": "procedural_clean_128,procedural_half_wrong_2048",
    "optim": "adamw,qlora_paper",
    "optim.learning_rate": "1e-4,2e-4,3e-4,5e-4,1e-3,2e-3,3e-3",
}
COMBINATIONS, LEARNING_RATES = 160, 7
FIXED = ["model=tiny_random", "tracking=none", "trainer.device=cpu", "trainer.compute_dtype=float32"]
COMMANDS = {
    "sbatch": """script=$(mktemp -p $FAKE_SLURM script.XXXXXX); number=$(ls $FAKE_SLURM | wc -l)
if [ "$1" = --parsable ]; then cat > $script; echo $number; exit; fi
cp "$1" $script; echo Submitted batch job $number""",
    "squeue": "cat $FAKE_SLURM/queue 2> /dev/null || true",
    "scontrol": "echo 'MaxArraySize            = 20001'",
    "sacct": ":",
}
# What a stock application is: a no-op task on the same configuration. Nothing ever runs, so nothing is waited for.
STOCK_APP = """
import sys, time
import hydra, submitit
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from qlora_lab.config.command import PLUGINS
from qlora_lab.config.schema import RunConfig
sys.path.append(str(PLUGINS))
ConfigStore.instance().store(name="run_schema", node=RunConfig)
submitit.Job.results = lambda job: [JobReturn(status=JobStatus.COMPLETED)]

def timed(self, batch, plain=Sweeper.validate_batch_is_legal):
    began = time.process_time()
    plain(self, batch)
    print("COMPOSED", time.process_time() - began)

Sweeper.validate_batch_is_legal = timed

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="train")
def task(node):
    pass

task()
"""
# Stands in for qlora_lab.run in the workers of this benchmark: what a run records, and no work.
NO_OP_RUN = """
import sys, types
from pathlib import Path

def execute(path, attempts_before=None, *, lease, stop_cause, bases=None, config=None):
    from qlora_lab.config import hardware
    from qlora_lab.runs.environment import environment
    from qlora_lab.runs.folder import FINISHED, RunFolder
    from qlora_lab.runs.metrics_file import MetricsFile
    folder = RunFolder(Path(path))
    with folder.holding(lease):
        folder.begin()
        config or folder.config()
        folder.write_environment({"cpu": "none"})
        MetricsFile(folder, lambda: 1.0).append(1, {"train/loss": 1.0})
        folder.write_result({"metrics": METRICS})
        folder.end(FINISHED, 1.0)
    return FINISHED

METRICS = {"eval/loss": 1.0, "eval/bits_per_byte": 1.0, "eval/target_tokens": 10, "eval/rows": 8, "train/steps": 30}
CONTENTS = {"qlora_lab.run": {"execute": execute}, "qlora_lab.models.warm": {"WarmBase": lambda: None}}
for name, content in CONTENTS.items():
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
"""

EXECUTES = """
import sys, time
from pathlib import Path
from qlora_lab.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
with run.lock():
    run.begin()
    print("begun", flush=True)
    time.sleep(600)
"""
LOOKS = """
import sys
from pathlib import Path
from qlora_lab.sweep.states import read_states
run = Path(sys.argv[1])
print(read_states(run.parent, [run.name])[run.name].state)
"""
# Where locks stay on their node, as on Lustre with localflock, those of other nodes seem to be free.
ON_ANOTHER_MACHINE = """
from qlora_lab.runs import heartbeat
heartbeat._kernel = lambda: "another"
heartbeat.fcntl.flock = lambda file, operation: None
"""

# The folders of planned runs, as workers make them when runs begin.
MAKES_FOLDERS = """
import sys
from pathlib import Path
from qlora_lab.sweep.plan_file import read_plan_file
from qlora_lab.sweep.run_folders import create_run_folders
runs_dir, rows = Path(sys.argv[1]), read_plan_file(Path(sys.argv[2])).rows
create_run_folders(runs_dir, ((run_id, config) for run_id, _, config in rows if not (runs_dir / run_id).exists()))
"""


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    peak_bytes: int
    printed: str


@dataclass(frozen=True)
class Stock:
    """What a run costs Hydra's basic sweeper and hydra-submitit-launcher."""

    plan_s: float  # composing it in the launcher
    submit_s: float  # the rest: its place in the list of jobs, its pickle, its part of sbatch
    memory_bytes: float
    disk_bytes: float
    inodes: float
    job_s: float  # of a no-op run
    finished_inodes: int


@dataclass(frozen=True)
class Bench:
    """Where everything happens."""

    folder: Path
    runs: int
    sample: int
    stock: Path | None

    def command(self, command: list[str], log: Path | None = None, **variables: str) -> Cost:
        """Return what a command took that must succeed, and what it printed, unless that goes into a log."""
        paths = [
            str(ROOT),
            *([str(self.stock)] if self.stock else []),
            *filter(None, [variables.pop("PYTHONPATH", "")]),
        ]
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder / "slurm"),
            "PYTHONPATH": os.pathsep.join(reversed(paths)),
            **variables,
        }
        (self.folder / "printed").touch()
        with (log or self.folder / "printed").open("wb") as printed:
            process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
            )
            _, status, used = os.wait4(process.pid, 0)
        text = (self.folder / "printed").read_text(errors="replace")
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{' '.join(command)[:300]} failed:\n{text[-3000:]}")
        return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss << 10, text)

    def ours(self, *overrides: str) -> Cost:
        """Run the study's command, for SLURM."""
        seeds = self.runs // (COMBINATIONS * LEARNING_RATES)
        axes = [*(f"{key}={values}" for key, values in AXES.items()), f"seed=range({seeds})"]
        where = [f"paths.runs_dir={self.folder / 'runs'}", "launcher=slurm", "launcher.slurm.gpus_per_run=0"]
        return self.command([sys.executable, "-m", "qlora_lab.sweep", *FIXED, *where, *axes, *overrides])

    def steer(self, action: str) -> Cost:
        """Run a command about the study."""
        runs_dir = str(self.folder / "runs")
        return self.command([sys.executable, "-m", "qlora_lab.sweep", action, "study", "--runs-dir", runs_dir])

    def prepare(self) -> None:
        for name in ("bin", "slurm", "no_op"):
            (self.folder / name).mkdir()
        for name, script in COMMANDS.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
            (self.folder / "bin" / name).chmod(0o755)
        (self.folder / "no_op" / "sitecustomize.py").write_text(NO_OP_RUN)


def disk(*folders: Path) -> tuple[int, int, int]:
    """Return the bytes, the bytes in whole blocks, and the inodes below folders."""
    found = [path.lstat() for folder in folders for path in folder.rglob("*")]
    files = sum(each.st_size for each in found if each.st_nlink == 1)
    return files, sum(each.st_blocks * 512 for each in found), len(found)


def stock_submit(bench: Bench, count: int) -> tuple[Cost, float]:
    """Submit runs with Hydra's basic sweeper and hydra-submitit-launcher; return the seconds of composing, too."""
    code = STOCK_APP.format(conf=str(ROOT / "conf"))
    axes = {key: values.split(",")[0] for key, values in AXES.items()}
    fixed = [*FIXED, *(f"{key}={value}" for key, value in axes.items())]
    folder = bench.folder / f"stock{count}"
    hydra = ["--multirun", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={folder}", f"seed=range({count})"]
    cost = bench.command([sys.executable, "-c", code, *hydra, *fixed], HYDRA_FULL_ERROR="1")
    (composed_s,) = (float(line.split()[1]) for line in cost.printed.splitlines() if line.startswith("COMPOSED "))
    return cost, composed_s


def stock(bench: Bench) -> Stock:
    sizes = bench.sample // 4, bench.sample
    (few, few_composed_s), (many, many_composed_s) = (stock_submit(bench, count) for count in sizes)
    more = sizes[1] - sizes[0]
    _, blocks, inodes = disk(bench.folder / f"stock{bench.sample}")
    done, left = stock_worker(bench, bench.sample)
    return Stock(
        plan_s=(many_composed_s - few_composed_s) / more,
        submit_s=(many.cpu_s - many_composed_s - few.cpu_s + few_composed_s) / more,
        memory_bytes=(many.peak_bytes - few.peak_bytes) / more,
        disk_bytes=blocks / bench.sample,
        inodes=inodes / bench.sample,
        job_s=done.cpu_s,
        finished_inodes=left,
    )


def stock_worker(bench: Bench, count: int) -> tuple[Cost, int]:
    """Execute one job of `stock_submit`, and count what a finished run leaves."""
    folder = bench.folder / f"stock{count}"
    pickles = sorted((folder / ".submitit").glob("*/*_submitted.pkl"))
    job = pickles[0].name.removesuffix("_submitted.pkl")
    array, _, task = job.partition("_")
    before = disk(folder)[2]
    cost = bench.command(
        [sys.executable, "-u", "-m", "submitit.core._submit", str(pickles[0].parent)],
        PYTHONPATH=str(ROOT / "qlora_lab" / "plugins"),
        SLURM_JOB_ID=job,
        SLURM_ARRAY_JOB_ID=array,
        SLURM_ARRAY_TASK_ID=task,
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
        **dict.fromkeys(("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"), "1"),
        SLURM_JOB_NODELIST="node",
        SUBMITIT_EXECUTOR="slurm",
    )
    logs = 2  # stdout and stderr, which SLURM opens
    return cost, disk(folder)[2] - before + 2 + logs  # its job's folder and its pickle were there before


def worker(bench: Bench, pool_runs: int) -> tuple[list[float], float, int]:
    """Execute submitted runs: one a process, then many in one; return CPU seconds a run, and inodes of a run."""
    chunks = (bench.folder / "runs").glob("studies/*/*/slurm/chunks/*.json")
    file = max(chunks, key=lambda chunk: len(json.loads(chunk.read_text())["run_ids"]))
    chunk = json.loads(file.read_text())
    path, logs = str(bench.folder / "no_op"), file.parents[1] / "logs"
    work = [sys.executable, "-m", "qlora_lab.sweep.slurm.worker"]
    task = {"PYTHONPATH": path, "SLURM_ARRAY_JOB_ID": "1"}
    alone = [
        bench.command([*work, str(file)], logs / f"{number}.log", SLURM_ARRAY_TASK_ID=str(number), **task).cpu_s
        for number in range(5)
    ]
    left = {}
    for count in (1, pool_runs):
        some = chunk["run_ids"][5 + count : 5 + 2 * count]
        left[count] = dict(chunk, mode="pool", run_ids=some, attempts=[0] * count, tasks=1, nonce=f"pool{count}")
    costs = {}
    for count, values in left.items():
        pool = file.with_name(f"pool{count}.json")
        pool.write_text(json.dumps(values))
        costs[count] = bench.command([*work, str(pool)], PYTHONPATH=path, SLURM_ARRAY_TASK_ID="0").cpu_s
    inodes = 1 + disk(bench.folder / "runs" / chunk["run_ids"][0])[2] + (logs / "0.log").exists()  # 1: the folder
    return alone, (costs[pool_runs] - costs[1]) / (pool_runs - 1), inodes


def dead(bench: Bench, observer: str) -> float:
    """Kill a process that executes a run, and return the seconds until somebody who looks says so.

    Args:
        observer: what that process does first.
    """
    run = bench.folder / "dead" / uuid.uuid4().hex[:12]
    words = [sys.executable, "-c", EXECUTES, str(run)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    killed = time.monotonic()
    process.wait()
    assert bench.command([sys.executable, "-c", f"{observer}\n{LOOKS}", str(run)]).printed.endswith("interrupted\n")
    return time.monotonic() - killed


def finish_all(bench: Bench, *, mixed: bool = False) -> None:
    """Let every planned run be finished, as far as a sweep reads it.

    Args:
        mixed: rather let one of two be finished, one of eight failed, one of eight killed and the others interrupted.
    """
    (file,) = (bench.folder / "runs").glob("studies/*/*/plan.json")
    plan = json.loads(file.read_text())
    configs = str(file.with_name(plan["configs"]))
    bench.command([sys.executable, "-c", MAKES_FOLDERS, str(bench.folder / "runs"), configs])
    ended = {"state": "finished", "started_at": "2026-01-01T00:00:00+00:00", "ended_at": "2026-01-01T00:01:00+00:00"}
    status = json.dumps({**ended, "attempt": 1, "elapsed_s": 60.0, "error": None})
    trace = "\n".join(f'  File "module.py", line {line}, in function' for line in range(40))
    error = {"type": "TrainingError", "message": "the loss is not finite at step 17", "traceback": trace}
    others = {
        3: {"state": "failed", "cause": "nan", "error": error},
        5: {"state": "running", "ended_at": None},
        1: {"state": "interrupted", "cause": "preemption", "history": [{"cause": "preemption"}] * 5},
    }
    draw = random.Random(0)
    for number, run in enumerate(plan["runs"]):
        folder = bench.folder / "runs" / run["run_id"]
        if mixed and number % 2:
            changed = {**json.loads(status), **others.get(number % 8, others[1])}
            (folder / "status.json").write_text(json.dumps(changed))
            continue
        (folder / "status.json").write_text(status)
        (folder / "environment.json").write_text(json.dumps({"cpu": "none"}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0}) + "\n")
        metrics = {"eval/loss": draw.gauss(1.0, 0.1), "eval/rows": 8, "eval/target_tokens": 10, "train/steps": 30}
        (folder / "result.json").write_text(json.dumps({"metrics": metrics}))


def fill_queue(bench: Bench, most: int = 1000) -> int:
    """Let squeue print a line for each of the first tasks of the largest array, as it does of those that run."""
    chunks = (bench.folder / "runs").glob("studies/*/*/slurm/chunks/*.json")
    runs, nonce = max((len(json.loads(file.read_text())["run_ids"]), file.stem) for file in chunks)
    lines = [f"9|{task}|RUNNING|gpu01|normal|None|qlora_lab {nonce}" for task in range(min(most, runs))]
    (bench.folder / "slurm" / "queue").write_text("\n".join(lines) + "\n")
    return len(lines)


def again(bench: Bench) -> dict[str, str]:
    """Give the same command when all runs are finished: once to compute the answer, and once more."""
    finish_all(bench)
    took: dict[str, Cost] = {}
    for which in ("first", "again"):
        before = set((bench.folder / "slurm").iterdir())
        took[which] = bench.ours()
        assert set((bench.folder / "slurm").iterdir()) == before, "a finished run was submitted again"
    first, cost = took["first"], took["again"]
    assert "report: " in cost.printed and cost.printed.count("\n") >= first.printed.count("\n")
    return {
        "the same command, all finished": f"{cost.cpu_s:.1f} s, starts none, shows the answer",
        "the first time after they finished": f"{first.cpu_s:.0f} s, computes the answer and its report",
    }


def ours(bench: Bench, only: list[str]) -> dict[str, str]:
    """Return what is to be said of our part, by the rows of the table."""
    found = {}
    if "plan" in only:
        cost = bench.ours("sweep.action=plan")
        print(_last_count(cost.printed))
        found["plan"] = f"{cost.cpu_s:.1f} s"
    if "submit" in only:
        cost = bench.ours()
        _, blocks, inodes = disk(bench.folder / "runs")
        found["plan and submit"] = f"{cost.cpu_s:.1f} s"
        found["memory of that"] = f"{cost.peak_bytes / 1e6:.0f} MB"
        found["disk of that"] = f"{blocks / 1e6:.1f} MB and {inodes:,} inodes, with the plan"
        cost = bench.steer("resume")  # of the jobs, nothing is left in the queue
        found["submit"] = f"{cost.cpu_s:.1f} s and {cost.peak_bytes / 1e6:.0f} MB, by `resume` of the plan"
    elif {"worker", "again"} & set(only):
        bench.ours()
    if "worker" in only:
        alone, warm, inodes = worker(bench, pool_runs=100)
        found["a run that does nothing"] = f"{statistics.median(alone):.2f} s"
        found["the same in a warm pool"] = f"{warm:.3f} s"
        found["inodes of it"] = f"{inodes}"
    if "again" in only:
        found |= again(bench)
        cost = bench.ours("sweep.action=status")
        found["status"] = f"{cost.cpu_s:.1f} s"
        finish_all(bench, mixed=True)
        cost = bench.steer("status")
        found["status without Hydra, of runs in every state"] = f"{cost.cpu_s:.1f} s"
        tasks = fill_queue(bench)
        cost = bench.steer("status")
        assert f"jobs: {tasks:,} running" in cost.printed
        found[f"the same while {tasks:,} of its tasks run"] = f"{cost.cpu_s:.1f} s"
    if "import" in only:
        for module in ("qlora_lab.sweep.steer", "qlora_lab.sweep.slurm.worker", "qlora_lab.sweep.command"):
            command = [sys.executable, "-c", f"import sys, {module}; assert 'torch' not in sys.modules"]
            least_s = min(bench.command(command).cpu_s for _ in range(5))
            found[f"import of {module}"] = f"{least_s:.2f} s, Python's own start in it"
    if "dead" in only:
        here, elsewhere = dead(bench, "pass"), dead(bench, ON_ANOTHER_MACHINE)
        found["a killed run is noticed after"] = f"{here:.1f} s, {elsewhere:.1f} s where locks do not cross nodes"
    return found


def in_words(measured: Stock, runs: int, sample: int) -> dict[str, str]:
    """Return what is to be said of the stock launcher, by the rows of the table."""
    plan_s, submit_s = runs * measured.plan_s, runs * measured.submit_s
    return {
        "plan": f"{plan_s:,.0f} s ({1e3 * measured.plan_s:.0f} ms a run, of {sample})",
        "plan and submit": f"{plan_s + submit_s:,.0f} s",
        "submit": f"{submit_s:,.0f} s ({1e3 * measured.submit_s:.1f} ms a run)",
        "memory of that": f"{runs * measured.memory_bytes / 1e6:,.0f} MB ({measured.memory_bytes / 1e3:.0f} kB a run)",
        "disk of that": f"{runs * measured.disk_bytes / 1e6:,.0f} MB and {runs * measured.inodes:,.0f} inodes",
        "the same command, all finished": "starts every run again",
        "status": "none",
        "a killed run is noticed after": "up to 600 s (from its code)",
        "a run that does nothing": f"{measured.job_s:.2f} s",
        "the same in a warm pool": "none",
        "inodes of it": f"{measured.finished_inodes}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_080)
    parser.add_argument("--sample", type=int, default=200, help="runs that the stock launcher submits")
    parser.add_argument("--stock", type=Path, help="folder with hydra-submitit-launcher; without it ours alone")
    parser.add_argument("--only", default="plan,submit,again,worker,import,dead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        seeds = -(-options.runs // (COMBINATIONS * LEARNING_RATES))
        bench = Bench(Path(temporary), seeds * COMBINATIONS * LEARNING_RATES, options.sample, options.stock)
        bench.prepare()
        started = time.monotonic()
        theirs = in_words(stock(bench), bench.runs, options.sample) if options.stock is not None else {}
        rows = ours(bench, options.only.split(","))
        print(f"{bench.runs:,} runs; all of it took {time.monotonic() - started:.0f} s by the clock\n")
        print("| CPU seconds | stock, for as many | ours |\n|---|---|---|")
        print("\n".join(f"| {name} | {theirs.get(name, '')} | {said} |" for name, said in rows.items()))


def _last_count(printed: str) -> str:
    return next((line for line in printed.splitlines() if " runs: " in line), "")


if __name__ == "__main__":
    main()
