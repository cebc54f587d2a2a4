"""What tracking offline costs a run: the time that its session takes, of a whole run and of a log call, and its files.

    python tests/benchmarks/tracking_overhead.py [--runs 20] [--steps 200]

Beside it the same calls with tracking=none. The first run, which starts W&B's service process, stands apart. Ends with
status 1 where something of wandb_offline is over its limit (LIMITS).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qlora_lab.tracking.session import open_session  # noqa: E402
from tests.helpers import tiny  # noqa: E402

LIMITS = {"open and finish, ms": 30.0, "a log call, ms": 1.0, "files": 5.0}


def one_run(folder: Path, mode: str, number: int, steps: int) -> tuple[float, list[float]]:
    """Return the seconds of opening and ending a session, and those of each log call."""
    run_id = f"{number:012x}"
    folder = folder / mode / run_id
    folder.mkdir(parents=True)
    config = tiny(folder, f"tracking={mode}")
    begun = time.perf_counter()
    session = open_session(config, run_id, "overhead", folder)
    session.begin({"environment": {"threads": 2}})
    around_s, calls = time.perf_counter() - begun, []
    for step in range(steps):
        begun = time.perf_counter()
        session.log(step, {"train/loss": 1.0, "train/learning_rate": 2e-4, "train/tokens": float(step)})
        calls.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    session.finish("finished", {"eval/loss": 1.0})
    return around_s + time.perf_counter() - begun, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    begun = time.perf_counter()
    import wandb  # noqa: F401

    print(f"importing wandb: {1e3 * (time.perf_counter() - begun):.0f} ms")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HOME"] = temporary
        found = {mode: of_mode(Path(temporary), mode, options) for mode in ("none", "wandb_offline")}["wandb_offline"]
    over = [f"{key}: {value:.2f}, over {LIMITS[key]:g}" for key, value in found.items() if value > LIMITS[key]]
    print("\n".join(over) or "all within their limits")
    return 1 if over else 0


def of_mode(folder: Path, mode: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure and print one kind of tracking; returns what LIMITS are for."""
    runs = [one_run(folder, mode, number, options.steps) for number in range(1 + options.runs)]
    (first_s, _), others = runs[0], runs[1:]
    around = [around_s for around_s, _ in others]
    calls = sorted(call for _, of_run in others for call in of_run)
    files = sum(path.is_file() for path in (folder / mode / f"{1:012x}").rglob("*"))
    print(
        f"{mode}: open and finish {1e3 * statistics.median(around):.1f} ms (slowest {1e3 * max(around):.1f}, "
        f"first run {1e3 * first_s:.0f}); a log call {1e3 * statistics.median(calls):.3f} ms (99 of 100 under "
        f"{1e3 * calls[int(0.99 * len(calls))]:.3f}); {files} files a run"
    )
    return dict(zip(LIMITS, (1e3 * statistics.median(around), 1e3 * statistics.median(calls), files), strict=True))


if __name__ == "__main__":
    sys.exit(main())
