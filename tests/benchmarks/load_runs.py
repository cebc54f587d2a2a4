"""Seconds to read the runs of a study into data frames: run folders, W&B's files, and what is kept in Parquet.

    python tests/benchmarks/load_runs.py [--runs 1000] [--steps 100] [--wandb 200]

Runs have ten metrics. W&B's own reader (`wandb leet inspect`) is timed on a few of the same files, start included: it
reads one run a call. All times are of one process start to finish unless said otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["WANDB_SILENT"] = "true"
REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from analysis.load import load_history, load_runs  # noqa: E402
from tests.analysis.study_folders import FakeRun, write_run  # noqa: E402

METRICS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--wandb", type=int, default=200, help="W&B runs, which take 0.1 s each to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps(of_folders(folder, options.runs, options.steps), indent=1))
        print(json.dumps(of_wandb(folder, options.wandb, options.steps), indent=1))


def of_folders(folder: Path, runs: int, steps: int) -> dict[str, float]:
    runs_dir, cache = folder / "runs", folder / "cache"
    for number in range(runs):
        write(runs_dir, number, steps)
    seconds = {
        "runs": runs,
        "folders, cold": timed(lambda: load_both(runs_dir, cache)),
        "folders, kept": timed(lambda: load_both(runs_dir, cache)),
    }
    for number in range(runs, runs + 10):
        write(runs_dir, number, steps)
    return seconds | {"10 new runs": timed(lambda: load_both(runs_dir, cache))}


def write(runs_dir: Path, number: int, steps: int) -> None:
    folder = write_run(runs_dir, FakeRun(f"{number:012x}", seed=number, steps=steps, rows=1))
    lines = (
        {"step": step, "time_s": step / 7, **{f"train/m{k}": k + step / 13 for k in range(METRICS)}}
        for step in range(steps)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def of_wandb(folder: Path, runs: int, steps: int) -> dict[str, float]:
    import wandb

    quiet = {"console": "off", "silent": True, "disable_git": True, "x_save_requirements": False}
    quiet |= {"x_disable_stats": True, "x_disable_machine_info": True}
    for number in range(runs):
        run = wandb.init(
            mode="offline",
            id=f"{number:012x}",
            project="p",
            dir=str(folder),
            config={"seed": number},
            settings=wandb.Settings(**quiet),
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", summary="none")
        for step in range(steps):
            run.log({"trainer/global_step": step, **{f"train/m{k}": k + step / 13 for k in range(METRICS)}})
        run.finish()
    mirror, cache = folder / "wandb", folder / "cache"
    few = sorted(mirror.glob("offline-run-*"))[:3]
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    return {
        "runs": runs,
        "W&B's files, cold": timed(lambda: load_both(mirror, cache)),
        "W&B's files, kept": timed(lambda: load_both(mirror, cache)),
        "wandb leet inspect, a run": timed(
            lambda: [subprocess.run([*inspect, one], check=True, stdout=subprocess.DEVNULL) for one in few]
        )
        / len(few),
    }


def load_both(source: Path, cache: Path) -> None:
    load_runs(source, cache=cache)
    load_history(source, cache=cache)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    main()
