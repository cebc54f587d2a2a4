"""The report of a study, or of all the runs in a folder or a W&B project.

    python -m analysis.report STUDY

STUDY is the name of a study below `--runs-dir`, a study's folder (runs/studies/NAME/PLAN, with plan.json;
runs/studies/NAME stands for all its plans), a folder of run folders, or a W&B project (wandb://TEAM/PROJECT). Where
runs of several studies lie together, the report says so, and `--study NAME` is about those of one.

`--target html` writes one HTML file that needs no network. `--target wandb` saves a W&B report about the study's runs,
as a draft unless `--publish` is given; `--save FILE` writes what would be saved as JSON and asks no server.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.report.interactive import INSTALL, missing_packages
from analysis.report.ratings_section import COMMAND, read_ratings
from analysis.report.study_report import Study, read_runs, read_study, summarize
from analysis.sources.wandb_project import SCHEME, project_of
from analysis.study.plan import STUDIES, planned_folders, runs_folder
from qlora_lab.errors import ConfigError, QloraLabError

RUNS = Path("runs")
REPORTS = "reports"  # runs/reports/TEAM/PROJECT/


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a report; returns the exit status."""
    options = _options(arguments)
    try:
        ratings = read_ratings(options.ratings) if options.ratings else None
        for study in _studies(options):
            if options.target == "wandb":
                _to_wandb(study, options)
            else:
                print(summarize(study, scripts=True, ratings=ratings).text)
                if missing := missing_packages():
                    print(f"The report's figures are pictures; {INSTALL} ({', '.join(missing)}) lets readers ask them.")
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description="Write a report from run folders.")
    parser.add_argument("study", help="a study's name, its folder (with plan.json), a folder of runs, or wandb://…")
    parser.add_argument("--runs-dir", type=Path, help="where the runs are (default: beside `studies`; runs)")
    parser.add_argument("--study", dest="only", metavar="NAME", help="of runs of several studies, those of this one")
    parser.add_argument(
        "--out", type=Path, help="where to write, for a folder of runs (default: it) or W&B (reports/ below it)"
    )
    parser.add_argument("--metric", default="eval/loss", help="for a folder of runs (default: eval/loss)")
    parser.add_argument("--goal", default="min", choices=("min", "max"), help="for a folder of runs (default: min)")
    parser.add_argument("--ratings", type=Path, metavar="FILE", help=f"for the page: of a tournament ({COMMAND})")
    parser.add_argument("--target", default="html", choices=("html", "wandb"))
    parser.add_argument("--entity", help="W&B's user or team; default: the runs', or your own")
    parser.add_argument("--project", help="W&B's project; default: the runs'")
    parser.add_argument("--publish", action="store_true", help="for W&B: no draft, but a report that others see")
    parser.add_argument("--save", type=Path, metavar="FILE", help="for W&B: write the report as JSON, ask no server")
    return parser.parse_args(arguments)


def _studies(options: argparse.Namespace) -> list[Study]:
    decided_by = (options.metric, options.goal, options.only)
    if options.study.startswith(SCHEME):
        place = (*project_of(options.study), *([options.only] if options.only else []))
        out = options.out or (options.runs_dir or RUNS).joinpath(REPORTS, *place)
        return [read_runs(options.study, out, *decided_by)]
    folder = Path(options.study)
    named = (options.runs_dir or RUNS) / STUDIES / options.study
    if not folder.exists() and named.is_dir():
        folder = named
    planned = planned_folders(folder)
    if planned and options.only:
        raise ConfigError(
            f"--study chooses among the runs of a folder or project; {options.study} is one study already"
        )
    if planned:
        return [read_study(study, options.runs_dir or runs_folder(study)) for study in planned]
    out = options.out or (folder.joinpath(REPORTS, options.only) if options.only else folder)
    return [read_runs(folder, out, *decided_by)]


def _to_wandb(study: Study, options: argparse.Namespace) -> None:
    from analysis.report.wandb_report import build_report, save_report, write_specification  # an extra

    entity, project = project_of(options.study) if options.study.startswith(SCHEME) else (None, None)
    report = build_report(
        study,
        entity=options.entity or entity,
        project=options.project or project,
        offline=options.save is not None,
    )
    if options.save is not None:
        print(f"W&B report: {write_specification(report, options.save)}")
    else:
        print(f"W&B report: {save_report(report, publish=options.publish)}")


if __name__ == "__main__":
    sys.exit(main())
