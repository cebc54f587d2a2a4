"""A study as one self-contained HTML file and as a block of text for the terminal, from its run folders alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.load import load_runs, runs_frame
from analysis.report import interactive, ratings_section, sections, settings_sections
from analysis.report.charts.explore import explore_chart
from analysis.report.charts.training import training_chart
from analysis.report.overview import Overview, TrainingCurves, overview_of, training_curves
from analysis.report.page import page
from analysis.report.samples import choose_samples
from analysis.report.tables import write_tables
from analysis.report.terminal import answer_text
from analysis.sources.run_folders import load_run
from analysis.study.answer import Answer, compare
from analysis.study.arms import IDENTITY_GROUPS, arms_of_runs, varying_axes
from analysis.study.audit import of_study
from analysis.study.plan import StudyPlan, read_plan
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.files import write_atomic

NO_CONCLUSION = "This is a pipeline check and no conclusion: it shows that everything runs, nothing else."


@dataclass(frozen=True)
class Study:
    """A study read from its run folders: what was planned, what the runs say, and the folder for what is written."""

    plan: StudyPlan
    answer: Answer
    folder: Path


def summarize_study(study_folder: Path, runs_dir: Path, plan: StudyPlan | None = None) -> Answer:
    """Answer a planned study from its run folders; write table.csv and report.html into its folder.

    Args:
        plan: what was planned, where the caller knows; without it plan.json says so.

    Returns:
        The answer, with `text` (table, sentence, runs that are not counted, paths) and `paths`.

    Raises:
        RunFolderError: the plan is missing or damaged.
        ConfigError: the study's metric is none of the runs'.
    """
    return summarize(read_study(study_folder, runs_dir, plan))


def read_study(study_folder: Path, runs_dir: Path, plan: StudyPlan | None = None) -> Study:
    """Read a planned study; arguments and errors as of `summarize_study`."""
    plan = plan or read_plan(study_folder)
    runs = runs_frame([load_run(runs_dir / run_id) | {"run_id": run_id} for run_id in plan.places])
    return _study(plan, runs, study_folder)


def read_runs(source: Path | str, out: Path, metric: str, goal: str, study: str | None = None) -> Study:
    """Read all runs of a folder or a W&B project, planned or not: arms differ in what varies in the configurations.

    Args:
        source: as for `load_runs`.
        study: the name of the study whose runs are taken; None: all.

    Raises:
        RunFolderError: there is no run.
        ConfigError: the metric is none of the runs', or they are of other studies.
    """
    runs = load_runs(source)
    if runs.empty:
        raise RunFolderError(
            f"{source} holds no run; give the folder of the runs or of a study (with plan.json), or a project of W&B"
        )
    others: list[str] = []
    if study is not None:
        runs, others = of_study(runs, study)
    readable = runs[runs["seed"].notna()]
    axes = varying_axes(readable)
    plan = StudyPlan(
        name=str(source) if study is None else study,
        metric=metric,
        goal=goal,
        axes=[*axes, "seed"],
        places={run_id: {a: str(v) for a, v in place.items()} for run_id, place in arms_of_runs(runs, axes).items()},
        fixed=_shared_configuration(readable),
    )
    read = _study(plan, runs, out)
    read.answer.notes[:0] = others
    return read


def _shared_configuration(runs: pd.DataFrame) -> dict[str, object]:
    columns = [c for c in runs.columns if c.startswith(tuple(f"config.{group}." for group in IDENTITY_GROUPS))]
    return {c.removeprefix("config."): runs[c].iloc[0] for c in columns if runs[c].map(str).nunique() == 1}


def _study(plan: StudyPlan, runs: pd.DataFrame, folder: Path) -> Study:
    planned = plan.created_at is not None
    answer = compare(
        runs,
        plan.axes,
        plan.metric,
        plan.goal,
        arms=plan.places,
        planned=planned,
        paper=plan.paper,
        question=plan.compares,
    )
    if plan.pipeline_check:
        answer.sentence = f"{NO_CONCLUSION} {answer.sentence}"
    return Study(plan, answer, folder)


def summarize(study: Study, *, scripts: bool = False, ratings: Mapping[str, Any] | None = None) -> Answer:
    """Write the tables and the page of a study into its folder, and put paths and text into its answer.

    Args:
        scripts: make the page interactive, which takes a few seconds more.
        ratings: of a tournament of the study's systems; see `read_ratings`.
    """
    answer, plan = study.answer, study.plan
    page_file = write_report(study.folder, answer, plan, scripts=scripts, ratings=ratings)
    answer.paths = {"report": page_file, "table": write_tables(answer, plan.question, study.folder)}
    answer.text = answer_text(answer, plan)
    return answer


def write_report(
    folder: Path, answer: Answer, plan: StudyPlan, *, scripts: bool = False, ratings: Mapping[str, Any] | None = None
) -> Path:
    """Write report.html into `folder`; it needs no other file and no network.

    Args:
        scripts: give figures and long tables scripts, as far as the packages for it are installed.
        ratings: of a tournament.
    """
    overview, curves = overview_of(answer, plan), training_curves(answer)
    body = [
        sections.header(answer, plan),
        sections.arms(answer),
        ratings_section.ratings(ratings),
        settings_sections.settings(answer, overview),
        sections.comparisons(answer),
        settings_sections.variance(answer),
        settings_sections.benchmarks(answer),
        settings_sections.explore(overview),
        settings_sections.training(answer, curves),
        sections.samples(choose_samples(answer), len(answer.arms)),
        sections.failures(answer),
        sections.runs(answer, folder),
        sections.design(answer, plan),
        sections.method(answer),
        sections.footer(answer, plan),
    ]
    path = folder / "report.html"
    write_atomic(path, page(plan.question or plan.name, "".join(body), _scripts(overview, curves) if scripts else ""))
    return path


def _scripts(overview: Overview, curves: TrainingCurves | None) -> str:
    tables = f"<script>{interactive.own_script('tables.js')}</script>\n"
    if interactive.missing_packages():
        return tables
    charts = {"explore": explore_chart(overview), "curves": training_chart(curves)}
    drawn = {name: chart for name, chart in charts.items() if chart is not None}
    return tables + (interactive.scripts(drawn) if drawn else "")
