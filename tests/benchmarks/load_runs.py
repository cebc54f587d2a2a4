"""Seconds to read the runs of a study into data frames: run folders, W&B's files, and what is kept in Parquet.

    python tests/benchmarks/load_runs.py [--runs 1000] [--steps 100] [--written 50] [--many 10000]

Runs have ten metrics. Times are of both frames, runs and histories, after imports. W&B's own reader (`wandb leet
inspect`) is timed on one of the same files, start included: it reads one run a call.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

os.environ["WANDB_SILENT"] = "true"
REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from analysis.load import load_history, load_runs  # noqa: E402
from tests.analysis.study_folders import FakeRun, write_run  # noqa: E402

METRICS = 10
TEMPLATE, SEED = "template_id", 987654321


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--written", type=int, default=50, help="W&B files that W&B writes; the others are copies")
    parser.add_argument("--many", type=int, default=10_000, help="run folders that are read only when they are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(json.dumps(of_folders(folder / "few", options.runs, options.steps), indent=1), flush=True)
        print(
            json.dumps(of_wandb(folder / "wandb", options.runs, options.steps, options.written), indent=1), flush=True
        )
        print(json.dumps(of_many(folder / "many", options.many, options.steps), indent=1), flush=True)


def of_folders(folder: Path, runs: int, steps: int) -> dict[str, float]:
    runs_dir, cache = folder / "runs", folder / "cache"
    template = written(folder / "template", steps)
    copy(template, runs_dir, range(runs))
    seconds = {
        "runs": runs,
        "folders, cold": timed(lambda: load_both(runs_dir, cache)),
        "folders, kept": timed(lambda: load_both(runs_dir, cache)),
    }
    copy(template, runs_dir, range(runs, runs + 10))
    return seconds | {"10 new runs": timed(lambda: load_both(runs_dir, cache))}


def of_many(folder: Path, runs: int, steps: int) -> dict[str, float]:
    runs_dir, cache = folder / "runs", folder / "cache"
    copy(written(folder / "template", steps), runs_dir, range(runs))
    load_both(runs_dir, cache)
    command = [sys.executable, __file__, "--kept", str(runs_dir), str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"runs": runs, **json.loads(done.stdout)}


def of_kept(runs_dir: Path, cache: Path) -> None:
    """Print the seconds and the memory of a process that loads what is kept."""
    before = peak_gb()
    seconds = timed(lambda: load_both(runs_dir, cache))
    print(json.dumps({"kept": seconds, "peak GB": peak_gb(), "of which imports GB": before}))


def peak_gb() -> float:
    """Return the largest memory that this process had, which the one that started it has no part in."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)


def written(folder: Path, steps: int) -> dict[str, str]:
    """Return the files of a run as text, by name, in which TEMPLATE is the run's id and SEED its seed."""
    run = write_run(folder, FakeRun(TEMPLATE, seed=SEED, steps=steps, rows=1))
    lines = (
        {"step": step, "time_s": step / 7, **{f"train/m{k}": k + step / 13 for k in range(METRICS)}}
        for step in range(steps)
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # as long as a real one
    settings = {f"group{g}": {f"key{k}": None if k % 3 else k / 7 for k in range(15)} for g in range(6)}
    with (run / "config.yaml").open("a") as file:
        file.write(yaml.safe_dump(settings))
    names = ("config.yaml", "environment.json", "status.json", "result.json", "metrics.jsonl")
    return {name: (run / name).read_text() for name in names}


def copy(template: dict[str, str], runs_dir: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        folder = runs_dir / f"{number:012x}"
        folder.mkdir(parents=True)
        for name, text in template.items():
            (folder / name).write_text(text.replace(TEMPLATE, folder.name).replace(str(SEED), str(number)))


def of_wandb(folder: Path, runs: int, steps: int, written: int) -> dict[str, float]:
    import wandb

    folder.mkdir(parents=True)
    quiet = {"console": "off", "silent": True, "disable_git": True, "x_save_requirements": False}
    quiet |= {"x_disable_stats": True, "x_disable_machine_info": True}
    for number in range(written):
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
    few = sorted(mirror.glob("offline-run-*"))
    for number in range(written, runs):
        data = next(few[number % written].glob("run-*.wandb")).read_bytes()
        copied = mirror / f"offline-run-20260101_000000-{number:012x}" / f"run-{number:012x}.wandb"
        copied.parent.mkdir()
        copied.write_bytes(data)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    return {
        "runs": runs,
        "W&B's files, cold": timed(lambda: load_both(mirror, cache)),
        "W&B's files, kept": timed(lambda: load_both(mirror, cache)),
        "wandb leet inspect, a run": timed(
            lambda: subprocess.run([*inspect, few[0]], check=True, stdout=subprocess.DEVNULL)
        ),
    }


def load_both(source: Path, cache: Path) -> None:
    load_runs(source, cache=cache)
    load_history(source, cache=cache)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kept"]:
        of_kept(*map(Path, sys.argv[2:]))
    else:
        main()
