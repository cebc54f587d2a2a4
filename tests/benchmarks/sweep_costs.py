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
from pathlib import Path

from sweep_bench import COMBINATIONS, LEARNING_RATES, ROOT, Bench, Cost, disk
from sweep_stock import in_words, stock

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
