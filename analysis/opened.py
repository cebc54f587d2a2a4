"""A study opened for a notebook: its plan, its runs, its answer, and what the original study printed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.load import load_history, runs_frame
from analysis.report.figures import arm_figure, curve_figure
from analysis.report.study_report import NO_CONCLUSION
from analysis.report.tables import arm_table
from analysis.report.terminal import remarks
from analysis.sources.run_folders import load_run
from analysis.study.answer import Answer, compare
from analysis.study.plan import STUDIES, StudyPlan, planned_folders, read_plan
from qlora_lab.errors import RunFolderError
from qlora_lab.runs.files import read_json

PARAMETERS = ("trainable_parameters", "total_parameters")

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class OpenedStudy:
    """What a notebook shows of a study.

    Attributes:
        runs: one row a planned run, as `load_runs` gives it, with its `arm`, `trainable_parameters` and
            `total_parameters` (NaN where it has not finished).
    """

    plan: StudyPlan
    answer: Answer

    @property
    def runs(self) -> pd.DataFrame:
        return self.answer.runs

    @property
    def table(self) -> pd.DataFrame:
        """One row an arm, the best first, as the terminal shows it."""
        return arm_table(self.answer)

    @property
    def words(self) -> str:
        """The answer in one sentence, and what it must be read with."""
        no_conclusion = [NO_CONCLUSION] if self.plan.pipeline_check else []
        return "\n\n".join([*no_conclusion, self.answer.sentence, *remarks(self.plan)])

    def arms_figure(self) -> "Figure":
        return arm_figure(self.answer)

    def curves_figure(self, metric: str = "train/loss") -> "Figure | None":
        """Draw a metric over the steps; None where no run has logged it."""
        folders = [Path(folder) for folder in self.runs["folder"].dropna() if Path(folder).is_dir()]
        curves = load_history(folders, [metric], cache=False)
        return curve_figure(self.answer, {str(run): of_run for run, of_run in curves.groupby("run_id")}, metric)

    def over_arms(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return the means of further columns of the runs, one row an arm, in the order of the table."""
        return self.runs.groupby("arm")[list(columns)].mean().reindex(self.answer.arms)


def nearest(name: str) -> Path:
    """Return the file or folder of this name here, or in the first folder above that has it.

    Raises:
        RunFolderError: none has.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / name).exists():
            return folder / name
    raise RunFolderError(f"there is no {name} in {here} nor above it; start the notebook where yours is, or name it")


def open_study(name: str, runs_dir: Path | None = None) -> OpenedStudy:
    """Open the newest plan of a study and answer its question from its run folders.

    Args:
        name: of the study.
        runs_dir: the folder of all runs; None: the nearest that is called `runs`.

    Raises:
        RunFolderError: the study was never started.
        ConfigError: its metric is none of the runs'.
    """
    runs_dir = runs_dir or nearest("runs")
    plans = planned_folders(runs_dir / STUDIES / name)
    if not plans:
        raise RunFolderError(
            f"{runs_dir} holds no study {name}; start it with `python -m qlora_lab.sweep +experiment={name}`"
        )
    plan = read_plan(plans[-1])
    runs = runs_frame([load_run(runs_dir / run_id) | {"run_id": run_id} for run_id in plan.places])
    results = [
        read_json(file) if (file := runs_dir / run_id / "result.json").exists() else {} for run_id in plan.places
    ]
    runs = runs.assign(**{count: [result.get(count, math.nan) for result in results] for count in PARAMETERS})
    return OpenedStudy(plan, compare(runs, plan.axes, plan.metric, plan.goal, arms=plan.places))


def printed(name: str) -> pd.DataFrame:
    """Return one of the tables of sweeps/paper/, such as `elo`: what the original study reported."""
    from qlora_lab.config.command import shipped  # imports Hydra

    return pd.read_csv(shipped("sweeps") / "paper" / f"{name}.csv")
