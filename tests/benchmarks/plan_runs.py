"""Planning 10,000 runs, beside stock Hydra: CPU seconds in one process each, in the same run.

    python tests/benchmarks/plan_runs.py [--finished]

The study has 160 combinations of four groups. Stock Hydra's sweeper composes every run in the launcher to check it, and
once more in each job; the first is measured, on a sample of runs, and its total extrapolated from that. `--finished`
then lets each run do nothing but leave the files of a finished run, and measures the same command again, and its
status.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AXES = {
    "adapter": "all_linear,attention,feed_forward,query_value,qlora_paper",
    "quant": "none,nf4,fp4_e2m1,fp4_e3m0,int4,int8,nf3,nf2",
    "data": "procedural_clean_128,procedural_half_wrong_2048",
    "optim": "adamw,qlora_paper",
    "optim.learning_rate": "1e-4,2e-4,3e-4,5e-4,1e-3,2e-3,3e-3",
}
COMBINATIONS, LEARNING_RATES = 160, 7
FIXED = ["model=tiny_random", "tracking=none", "launcher=in_process"]
STOCK = """
import sys, time
from hydra.core.global_hydra import GlobalHydra
from hydra import compose
from tests.helpers import hydra_on_conf
axes, sample = {axes!r}, {sample}
with hydra_on_conf():
    loader = GlobalHydra.instance().config_loader()
    master = compose("sweep", {fixed!r}, return_hydra_config=True)
    started = time.process_time()
    for n in range(sample):
        chosen = [f"{{key}}={{values[n % len(values)]}}" for key, values in axes.items()]
        loader.load_sweep_config(master, [*{fixed!r}, *chosen, f"seed={{n}}"])
    print((time.process_time() - started) / sample)
"""


def cpu_s(command: list[str]) -> tuple[float, float, str]:
    """Return the CPU seconds, wall seconds and output of a command that must succeed."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.monotonic() - started, done.stdout


# The study's command with runs that do nothing: each leaves what a finished run does, as far as a sweep reads it.
NO_OP_RUNS = """
import json
from qlora_lab.sweep import study
from qlora_lab.sweep.__main__ import main

METRICS = {"eval/loss": 1.0, "eval/bits_per_byte": 1.0, "eval/target_tokens": 10, "eval/rows": 8, "train/steps": 30}
STATUS = {"state": "finished", "started_at": "2026-01-01T00:00:00+00:00", "ended_at": "2026-01-01T00:01:00+00:00",
          "attempt": 1, "elapsed_s": 60.0, "error": None}

def launch(plan, launcher):
    for run in plan.runs:
        folder = plan.runs_dir / run.run_id
        folder.mkdir(exist_ok=True)
        (folder / "status.json").write_text(json.dumps(STATUS))
        (folder / "result.json").write_text(json.dumps({"metrics": METRICS}))

study.launch = launch
study.Plan.create_folders = lambda plan, runs: None
study._answer_text = lambda plan, record: "no answer"
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--finished", action="store_true", help="go on with all runs finished")
    parser.add_argument("--folder", type=Path, help="keep the plan in this folder")
    options = parser.parse_args()
    seeds = -(-options.runs // (COMBINATIONS * LEARNING_RATES))
    runs = seeds * COMBINATIONS * LEARNING_RATES
    axes = {key: values.split(",") for key, values in AXES.items()}
    stock = STOCK.format(axes=axes, sample=options.sample, fixed=FIXED)
    _, _, printed = cpu_s([sys.executable, "-c", stock])
    stock_s = float(printed)
    typed = [*(f"{key}={values}" for key, values in AXES.items()), f"seed=range({seeds})"]
    with tempfile.TemporaryDirectory() as temporary:
        runs_dir = options.folder or Path(temporary)
        command = [sys.executable, "-m", "qlora_lab.sweep", *FIXED, f"paths.runs_dir={runs_dir}", *typed]
        ours_s, wall_s, printed = cpu_s([*command, "sweep.action=plan"])
        print(printed.strip().splitlines()[-1])
        print(
            f"stock Hydra: {stock_s * 1e3:.0f} ms of CPU a run ({options.sample} runs composed), so about "
            f"{stock_s * runs:,.0f} s for {runs:,} (extrapolated)"
        )
        print(
            f"ours: {ours_s:.1f} s of CPU for {runs:,} runs, the process with its imports ({wall_s:.1f} s by the "
            f"clock): {stock_s * runs / ours_s:.0f} times less"
        )
        if options.finished:
            cpu_s([sys.executable, "-c", NO_OP_RUNS, *command[3:]])
            for name, more in (
                ("the same command, all finished, its answer not yet told", []),
                ("the same command again", []),
                ("its status", ["sweep.action=status"]),
            ):
                again_s, again_wall_s, printed = cpu_s([*command, *more])
                print(f"{name}: {again_s:.1f} s of CPU, {again_wall_s:.1f} s by the clock")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    main()
