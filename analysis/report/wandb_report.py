"""A study's comparison as a W&B report, made as code with wandb-workspaces (the extra `wandb_report`).

W&B shows at most 1,000 runs of a run set, compares ten runs, and its reports are slow with more than dozens of run
sets. So the report has one run set an arm for the best arms, grouped so that each is one line with a band, one of all
runs, and one of a run of each of the best arms for their configurations; the whole picture is the HTML report.
"""

import json
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.report.contents import counted_line, fixed_table, not_counted_table, varied_table
from analysis.report.overview import overview_of
from analysis.report.sections import environment_lines
from analysis.report.study_report import Study
from analysis.report.tables import arm_table, axis_table, to_markdown
from analysis.report.terminal import block_line, metric_line, remarks
from analysis.study.answer import Answer
from analysis.study.arms import SEED
from analysis.study.wording import equal_settings
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.files import write_atomic
from qlora_lab.runs.mirror import STEP

if TYPE_CHECKING:
    from wandb_workspaces.reports import v2 as wr

INSTALL = "pip install 'qlora_lab[wandb_report]'"
MOST_ARMS = 12  # with a run set each
MOST_COMPARED = 10  # by W&B's Run Comparer
MOST_SHOWN = 1000  # by W&B, of a run set
MOST_PAIRS = 20  # of an axis
MOST_NAMED = 100  # runs of a run set that are named one by one; of more, the study's group stands for them
MOST_CHARACTERS = 120  # of a title
PROJECT = "qlora_lab"
GRID_WIDTH = 24


def build_report(
    study: Study, *, entity: str | None = None, project: str | None = None, offline: bool = False
) -> "wr.Report":
    """Build the report; unless `offline`, run sets name their project, which W&B looks up when the report is saved.

    Args:
        entity: the user or team; None: that of the runs' configuration, or W&B's default.
        project: None: that of the runs' configuration.
        offline: ask no server; run sets are then of the project that the report is put into.

    Raises:
        ConfigError: wandb-workspaces is not installed, or no run has finished.
    """
    if find_spec("wandb_workspaces") is None:
        raise ConfigError(f"a W&B report needs wandb-workspaces; install it with {INSTALL}")
    from wandb_workspaces.reports import v2 as wr

    answer, plan = study.answer, study.plan
    if len(answer.not_counted) == len(answer.runs):
        raise ConfigError(f"{plan.name}: {answer.sentence}")
    entity = entity or _recorded(answer, "config.tracking.entity") or ("" if offline else _default_entity())
    project = project or _recorded(answer, "config.tracking.project") or PROJECT
    place: dict[str, Any] = {} if offline else {"entity": entity, "project": project}
    blocks = [
        wr.CalloutBlock(text=answer.sentence),
        *([wr.UnorderedList(items=list(answer.findings))] if answer.findings else []),
        *(wr.P(remark) for remark in remarks(plan)),
        wr.P(counted_line(answer)),
        *([wr.UnorderedList(items=list(answer.notes))] if answer.notes else []),
        wr.TableOfContents(),
        wr.H2("Finals"),
        wr.MarkdownBlock(_markdown(arm_table(answer))),
        wr.P(metric_line(answer)),
        *_axis_blocks(answer),
        wr.H2("Arms"),
        wr.P(_arms_note(answer)),
        _arms_grid(study, place),
        wr.H2("All runs"),
        wr.P(f"W&B shows at most {MOST_SHOWN:,} runs of a run set; the HTML report of this study has all of them."),
        _runs_grid(study, place),
        wr.H2("Configurations side by side"),
        _configurations_grid(study, place),
        *_not_counted_blocks(answer),
        wr.H2("Varied and held fixed"),
        wr.MarkdownBlock(_markdown(varied_table(answer, plan))),
        *([wr.MarkdownBlock(_markdown(fixed_table(plan)))] if plan.fixed else []),
        wr.H2("Environment"),
        *(wr.P(line) for line in environment_lines(answer.runs)),
    ]
    return wr.Report(
        project=project,
        entity=entity,
        title=shorten(plan.question or plan.name, MOST_CHARACTERS),
        description=shorten(answer.sentence, 4 * MOST_CHARACTERS),
        blocks=blocks,
        width="fluid",
    )


def save_report(report: "wr.Report", *, publish: bool = False) -> str:
    """Save a report on W&B, as a draft unless `publish`; returns its address.

    Raises:
        RunFolderError: W&B cannot be reached, does not know the key, or has no such project.
    """
    import requests
    import wandb

    try:
        return str(report.save(draft=not publish).url)
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        raise RunFolderError(
            f"the report could not be saved in {report.entity}/{report.project} ({' '.join(str(error).split())}); "
            "sync the runs first, give --entity and --project, or write it with --save FILE"
        ) from error


def write_specification(report: "wr.Report", file: Path) -> Path:
    """Write what would be saved as JSON; the report must be one that was built offline."""
    model = report._to_model()  # what Report.save sends; there is no public name for it
    told = {
        "title": report.title,
        "description": report.description,
        "entity": report.entity,
        "project": report.project,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }
    write_atomic(file, json.dumps(told, indent=1))
    return file


def _recorded(answer: Answer, column: str) -> str | None:
    found = answer.runs[column].dropna() if column in answer.runs else pd.Series(dtype=object)
    return str(found.iloc[0]) if len(found) else None


def _default_entity() -> str:
    import wandb

    try:
        return str(wandb.Api().default_entity or "")
    except (wandb.errors.Error, ValueError) as error:
        raise RunFolderError(
            f"W&B does not say who you are ({' '.join(str(error).split())}); "
            "log in with `wandb login`, give --entity, or write the report with --save FILE"
        ) from error


def _axis_blocks(answer: Answer) -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    blocks: list[Any] = []
    for compared in answer.by_axis:
        if compared.comparable:
            pairs = compared.of_the_best
            blocks += [wr.H2(equal_settings(compared.axis)), wr.P(block_line(answer, compared))]
            blocks.append(wr.MarkdownBlock(_markdown(axis_table(answer, pairs[:MOST_PAIRS]))))
            if len(pairs) > MOST_PAIRS:
                blocks.append(wr.P(f"And {len(pairs) - MOST_PAIRS:,} pairs more, in the HTML report of this study."))
    return blocks


def _arms_note(answer: Answer) -> str:
    many = len(answer.arms) > MOST_ARMS
    which = f"The best {MOST_ARMS} of {len(answer.arms)} arms" if many else "Every arm"
    return f"{which}: one run set each, one line the mean over its seeds, a band from the lowest to the highest."


def _run_set(name: str, run_ids: Sequence[str], place: dict[str, Any], groupby: Sequence[str] = ()) -> "wr.Runset":
    from wandb_workspaces import expr
    from wandb_workspaces.reports import v2 as wr

    chosen = [expr.Metric("ID").isin(list(run_ids))]
    return wr.Runset(name=shorten(name, MOST_CHARACTERS), filters=chosen, groupby=list(groupby), **place)


def _arms_grid(study: Study, place: dict[str, Any]) -> "wr.PanelGrid":
    from wandb_workspaces.reports import v2 as wr

    answer = study.answer
    arms = [arm for arm in answer.arms if len(answer.counted_runs(arm))][:MOST_ARMS]
    curves = wr.LinePlot(
        title="Training loss",
        x=STEP,
        y=["train/loss"],
        smoothing_type="average",
        smoothing_factor=0.5,
        smoothing_show_original=False,
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        layout=wr.Layout(0, 0, GRID_WIDTH // 2, 10),
    )
    finals = wr.BarPlot(
        title=answer.metric,
        metrics=[wr.SummaryMetric(answer.metric)],
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        layout=wr.Layout(GRID_WIDTH // 2, 0, GRID_WIDTH // 2, 10),
    )
    run_sets = [_run_set(arm, list(answer.counted_runs(arm)["run_id"]), place, ["group"]) for arm in arms]
    return wr.PanelGrid(runsets=run_sets, panels=[curves, finals])


def _runs_grid(study: Study, place: dict[str, Any]) -> "wr.PanelGrid":
    from wandb_workspaces import expr
    from wandb_workspaces.reports import v2 as wr

    answer = study.answer
    run_ids = list(answer.runs["run_id"])
    if len(run_ids) <= MOST_NAMED:
        run_set = _run_set("All runs", run_ids, place)
    else:
        run_set = wr.Runset(name="All runs", filters=[expr.Metric("Group") == study.plan.name], **place)
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in _varied_keys(study)]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(answer.metric)))
    costs = overview_of(answer, study.plan).costs or ["train/time_s"]
    half = GRID_WIDTH // 2
    return wr.PanelGrid(
        runsets=[run_set],
        panels=[
            wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(0, 0, GRID_WIDTH, 10)),
            wr.ScatterPlot(
                x=wr.SummaryMetric(costs[0]), y=wr.SummaryMetric(answer.metric), layout=wr.Layout(0, 10, half, 10)
            ),
            wr.ParameterImportancePlot(with_respect_to=answer.metric, layout=wr.Layout(half, 10, half, 10)),
        ],
    )


def _configurations_grid(study: Study, place: dict[str, Any]) -> "wr.PanelGrid":
    from wandb_workspaces.reports import v2 as wr

    firsts = [found["run_id"].iloc[0] for arm in study.answer.arms if len(found := study.answer.counted_runs(arm))]
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(0, 0, GRID_WIDTH, 12))
    name = "The first run of each of the best arms"
    return wr.PanelGrid(runsets=[_run_set(name, firsts[:MOST_COMPARED], place)], panels=[comparer])


def _varied_keys(study: Study) -> list[str]:
    """Return the keys of the runs' configurations that the study's axes set, as W&B names them."""
    runs, keys = study.answer.runs, []
    columns = [str(column) for column in runs.columns]
    for axis in study.plan.axes:
        own = [column for column in (f"config.{axis}", f"config.{axis}.name") if column in columns]
        inside = [column for column in columns if column.startswith(f"config.{axis}.") and runs[column].nunique() > 1]
        keys += [column.removeprefix("config.") for column in own[:1] or inside]
    return [key for key in keys if key != SEED]


def _not_counted_blocks(answer: Answer) -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    if answer.not_counted.empty:
        return []
    return [wr.H2("Runs that are not counted"), wr.MarkdownBlock(_markdown(not_counted_table(answer)))]


def _markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown in which text that others wrote does not become HTML."""
    return to_markdown(table.map(lambda cell: escape(str(cell), quote=False)))
