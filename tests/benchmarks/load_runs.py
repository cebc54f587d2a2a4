"""Seconds to read the runs of a study into data frames: run folders, W&B's files, and what is kept in Parquet.

    python tests/benchmarks/load_runs.py [--runs 1000] [--steps 100] [--written 1000] [--many 10000] [--rounds 3]

Runs have ten metrics, and each its own configuration and values. Times are medians over rounds, of both frames, runs
and histories, after imports. W&B's own reader (`wandb leet inspect`) is timed on one of the same files, start included:
it reads one run a call. The W&B project is the tests' stand-in on this machine: no time of a network. Ends with status
1 where a time or the memory is over its limit (LIMITS), which holds for 1,000 runs of 100 steps and 10,000 kept ones.
"""

import argparse
import json
import os
import statistics
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
from tests.mirrored_runs import QUIET, standing  # noqa: E402
from tests.wandb_stand_in import wandb_stand_in  # noqa: E402

METRICS = 10
TEMPLATE, SEED, RATE, VALUE = "template_id", 987654321, 0.123456789, 0.987654321
LIMITS = {
    "folders, cold": 3.0,
    "folders, kept": 0.25,
    "10 new runs": 0.4,
    "W&B's files, cold": 5.0,
    "10,000 kept": 2.0,
    "10,000 kept, peak GB": 1.0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--written", type=int, help="W&B files that W&B writes, the others being copies; default: all")
    parser.add_argument("--many", type=int, default=10_000, help="run folders that are read only when they are kept")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    over = []
    with tempfile.TemporaryDirectory() as name:
        folder, runs, steps, rounds = Path(name), options.runs, options.steps, options.rounds
        for measured in (
            lambda: of_folders(folder / "few", runs, steps, rounds),
            lambda: of_wandb(folder / "wandb", runs, steps, options.written or runs, rounds),
            lambda: of_project(folder / "project", runs, steps),
            lambda: of_many(folder / "many", options.many, steps, rounds),
        ):
            found = measured()
            print(json.dumps(found, indent=1), flush=True)
            over += [
                f"{key}: {value}, over {LIMITS[key]}" for key, value in found.items() if value > LIMITS.get(key, value)
            ]
    print("\n".join(over) or "all within their limits")
    return 1 if over else 0


def of_folders(folder: Path, runs: int, steps: int, rounds: int) -> dict[str, float]:
    runs_dir = folder / "runs"
    template = written(folder / "template", steps)
    copy(template, runs_dir, range(runs))
    cold = median(lambda n: load_both(runs_dir, folder / f"cache{n}"), rounds)
    kept = median(lambda n: load_both(runs_dir, folder / f"cache{n}"), rounds)
    copy(template, runs_dir, range(runs, runs + 10))
    new = median(lambda n: load_both(runs_dir, folder / f"cache{n}"), rounds)
    return {"runs": runs, "folders, cold": cold, "folders, kept": kept, "10 new runs": new}


def of_project(folder: Path, runs: int, steps: int) -> dict[str, float]:
    with wandb_stand_in() as server:
        os.environ |= {key: value for key, value in server.environment(folder).items() if key.startswith("WANDB_")}

        def add(numbers: Iterable[int]) -> None:
            for number in numbers:
                run = server.run("team", "p", f"{number:012x}")
                run.state, run.summary = (
                    "finished",
                    standing("finished", **{f"train/m{k}": number + k for k in range(METRICS)}),
                )
                run.config = json.dumps(
                    {"seed": {"value": number}, "optim": {"value": {"learning_rate": 1e-4 * number}}}
                )
                run.history = [{"_step": step, **line(number, step)} for step in range(steps)]

        def timed_and_asked(load: Callable[..., object]) -> tuple[float, int]:
            before = len(server.operations)
            return timed(lambda: load("wandb://team/p", cache=folder)), len(server.operations) - before

        add(range(runs))
        rows = [timed_and_asked(load_runs), timed_and_asked(load_runs)]
        curves = [timed_and_asked(load_history), timed_and_asked(load_history)]
        add(range(runs, runs + 10))
        new = [timed_and_asked(load_runs), timed_and_asked(load_history)]
    names = ("rows, cold", "rows, kept", "curves, cold", "curves, kept", "rows of 10 new", "curves of 10 new")
    found = dict(zip(names, [*rows, *curves, *new], strict=True))
    seconds = {f"project, {name}": seconds for name, (seconds, _) in found.items()}
    return {"runs": runs, **seconds, **{f"project, {name}, requests": asked for name, (_, asked) in found.items()}}


def of_many(folder: Path, runs: int, steps: int, rounds: int) -> dict[str, float]:
    runs_dir, cache = folder / "runs", folder / "cache"
    copy(written(folder / "template", steps), runs_dir, range(runs))
    load_both(runs_dir, cache)
    command = [sys.executable, __file__, "--kept", str(runs_dir), str(cache)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(rounds)
    ]
    return {"runs": runs, **{f"{runs:,} {key}": statistics.median(one[key] for one in found) for key in found[0]}}


def of_kept(runs_dir: Path, cache: Path) -> None:
    """Print the seconds and the memory of a process that loads what is kept."""
    before = peak_gb()
    seconds = timed(lambda: load_both(runs_dir, cache))
    print(json.dumps({"kept": seconds, "kept, peak GB": peak_gb(), "kept, of which imports GB": before}))


def peak_gb() -> float:
    """Return the largest memory that this process had, which the one that started it has no part in."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)


def written(folder: Path, steps: int) -> dict[str, str]:
    """Return the files of a run as text, by name, with TEMPLATE for its id and SEED, RATE and VALUE for its numbers."""
    config = {"optim": {"learning_rate": RATE}}
    run = write_run(folder, FakeRun(TEMPLATE, seed=SEED, steps=steps, rows=1, config=config))
    lines = (line(VALUE, step) | {"step": step} for step in range(steps))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # as long as a real one
    settings = {f"group{g}": {f"key{k}": None if k % 3 else k / 7 for k in range(15)} for g in range(6)}
    with (run / "config.yaml").open("a") as file:
        file.write(yaml.safe_dump(settings))
    names = ("config.yaml", "environment.json", "status.json", "result.json", "metrics.jsonl")
    return {name: (run / name).read_text() for name in names}


def line(number: float, step: int) -> dict[str, float]:
    """Return what a run logs of a step."""
    first = {"trainer/global_step": step, "time_s": step / 7, "train/m0": number}
    return first | {f"train/m{k}": k + (step + number) / 13 for k in range(1, METRICS)}


def copy(template: dict[str, str], runs_dir: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        folder = runs_dir / f"{number:012x}"
        folder.mkdir(parents=True)
        own = {
            TEMPLATE: folder.name,
            str(SEED): str(number),
            str(RATE): str(1e-4 + 1e-7 * number),
            str(VALUE): str(number / 7),
        }
        for name, text in template.items():
            for mark, value in own.items():
                text = text.replace(mark, value)
            (folder / name).write_text(text)


def of_wandb(folder: Path, runs: int, steps: int, written: int, rounds: int) -> dict[str, float]:
    import wandb

    folder.mkdir(parents=True)
    for number in range(written):
        run = wandb.init(
            mode="offline",
            id=f"{number:012x}",
            project="p",
            dir=str(folder),
            config={"seed": number, "optim": {"learning_rate": 1e-4 + 1e-7 * number}},
            settings=wandb.Settings(**QUIET),
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", summary="none")
        for step in range(steps):
            run.log(line(number / 7, step))
        run.finish()
    mirror = folder / "wandb"
    few = sorted(mirror.glob("offline-run-*"))
    for number in range(written, runs):
        data = next(few[number % written].glob("run-*.wandb")).read_bytes()
        copied = mirror / f"offline-run-20260101_000000-{number:012x}" / f"run-{number:012x}.wandb"
        copied.parent.mkdir()
        copied.write_bytes(data)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    return {
        "runs": runs,
        "W&B's files, cold": median(lambda n: load_both(mirror, folder / f"cache{n}"), rounds),
        "W&B's files, kept": median(lambda n: load_both(mirror, folder / f"cache{n}"), rounds),
        "wandb leet inspect, a run": median(
            lambda _: subprocess.run([*inspect, few[0]], check=True, stdout=subprocess.DEVNULL), rounds
        ),
    }


def load_both(source: Path, cache: Path) -> None:
    load_runs(source, cache=cache)
    load_history(source, cache=cache)


def median(call: Callable[[int], object], rounds: int) -> float:
    """Return the median of the seconds that the rounds take, each given its number."""
    return statistics.median(timed(lambda n=n: call(n)) for n in range(rounds))


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kept"]:
        of_kept(*map(Path, sys.argv[2:]))
    else:
        sys.exit(main())
