"""Every figure that reading runs, reports and tracking are held to, in one command on a quiet machine.

    python tests/benchmarks/reading_and_reports.py [--quick]

Runs load_runs.py, report.py and tracking_overhead.py one after the other and says how long each took. Ends with status
1 where one of them has a figure over its limit. `--quick` takes a tenth of the runs: it shows that everything runs, and
its figures are none of those that the limits are for.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
QUICK = {
    "load_runs.py": ("--runs", "100", "--many", "1000", "--rounds", "1"),
    "report.py": ("--runs", "100"),
    "tracking_overhead.py": ("--runs", "5"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    options = parser.parse_args()
    over = []
    for script, few in QUICK.items():
        print(f"== {script}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, str(FOLDER / script), *(few if options.quick else ())]
        if subprocess.run(command, check=False).returncode:
            over.append(script)
        print(f"{script} took {time.perf_counter() - started:.0f} s\n", flush=True)
    print(f"over a limit, or failed: {', '.join(over)}" if over else "all within their limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
