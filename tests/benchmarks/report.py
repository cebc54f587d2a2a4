"""The HTML report of a large study: seconds to build it, its bytes, and seconds until it is ready in Chromium.

    python tests/benchmarks/report.py [--runs 1000] [--steps 100] [--rows 32]

The runs are made up: five models, five data sets, three formats, two ranks, and seeds. `build_s` is one call of the
command, start included, with Vega's script in the cache; `ready_s` is from opening the file until every chart is drawn.
Ends with status 1 where the median of one of these is over its limit (LIMITS), which holds for 1,000 runs.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from analysis.report.interactive import javascript  # noqa: E402
from analysis.report.study_report import summarize_study  # noqa: E402
from tests.analysis.study_folders import FakeRun, write_study  # noqa: E402
from tests.chromium import headless_chromium  # noqa: E402

MODELS = ("smollm2_135m", "llama_7b", "llama_13b", "llama_33b", "llama_65b")
DATA = ("alpaca", "oasst1", "flan_v2", "hh_rlhf", "self_instruct")
OPENED = 5
READY = "ready_s, each of five"
LIMITS = {"build_s": 10.0, "bytes": 2e6, READY: 2.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = write_study(folder, runs_of(options.runs, options.steps, options.rows))
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            summarize_study(study, folder)
        found = {"runs": options.runs, "without scripts, after imports, s": round(time.perf_counter() - started, 2)}
        javascript()
        started = time.perf_counter()
        command = [sys.executable, "-m", "analysis.report", str(study)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        found["build_s"] = round(time.perf_counter() - started, 2)
        page = study / "report.html"
        found["bytes"] = page.stat().st_size
        with headless_chromium() as browser:
            found[READY] = [ready(browser, page) for _ in range(OPENED)]
    print(json.dumps(found, indent=1))
    over = [f"{key}: {found[key]}, over {limit:g}" for key, limit in LIMITS.items() if np.median(found[key]) > limit]
    print("\n".join(over) or "all within their limits")
    return 1 if over else 0


def runs_of(count: int, steps: int, rows: int) -> list[FakeRun]:
    seeds = -(-count // (len(MODELS) * len(DATA) * 6))
    settings = product(MODELS, DATA, ("nf4", "fp4", "none"), ("8", "64"), range(seeds))
    return [
        FakeRun(
            f"{number:012x}",
            seed=seed,
            state="failed" if number % 97 == 5 else "finished",
            steps=steps,
            rows=rows,
            noise=0.05,
            mean_loss=1.5 - 0.12 * MODELS.index(model) + 0.05 * DATA.index(data) + 0.04 * (quant == "fp4"),
            metrics={"train/time_s": 30 * (1 + MODELS.index(model)) ** 1.6 + seed},
            axes={"model": model, "data": data, "quant": quant, "adapter.rank": rank, "seed": str(seed)},
        )
        for number, (model, data, quant, rank, seed) in enumerate(islice(settings, count))
    ]


def ready(browser: object, page: Path) -> float:
    """Return the seconds until the charts are drawn, by the page's own clock."""
    browser.get(page.as_uri())
    drawn = "return document.documentElement.dataset.charts === 'drawn' && performance.now() / 1000"
    while not (seconds := browser.execute_script(drawn)):
        time.sleep(0.01)
    return round(seconds, 2)


if __name__ == "__main__":
    sys.exit(main())
