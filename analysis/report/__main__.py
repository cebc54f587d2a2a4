"""The report of a study, or of all the runs in a folder, written again from the run folders alone.

    python -m analysis.report RUNS_OR_STUDY_FOLDER

A study's folder is runs/studies/NAME/PLAN, with plan.json; runs/studies/NAME stands for all its plans.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.report.study_report import summarize_runs, summarize_study
from analysis.study.plan import planned_folders, runs_folder
from qlora_lab.errors import QloraLabError


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report again; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description="Write a report from run folders.")
    parser.add_argument("folder", type=Path, help="a study's folder (with plan.json), or a folder of run folders")
    parser.add_argument("--runs-dir", type=Path, help="where a study's runs are (default: beside `studies`)")
    parser.add_argument("--out", type=Path, help="where to write, for a folder of runs (default: that folder)")
    parser.add_argument("--metric", default="eval/loss", help="for a folder of runs (default: eval/loss)")
    parser.add_argument("--goal", default="min", choices=("min", "max"), help="for a folder of runs (default: min)")
    options = parser.parse_args(arguments)
    try:
        studies = planned_folders(options.folder)
        for study in studies:
            print(summarize_study(study, options.runs_dir or runs_folder(study)).text)
        if not studies:
            out = options.out or options.folder
            print(summarize_runs(options.folder, out, options.metric, options.goal).text)
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
