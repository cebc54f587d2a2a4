"""A study opened for a notebook: its plan, its runs, its answer, and what the original study printed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.report.figures.answers import arm_figure
from analysis.report.figures.curves import curve_figure
from analysis.report.overview import training_curves
from analysis.report.study_report import read_study
from analysis.report.tables import arm_table
from analysis.report.terminal import remarks
from analysis.study.answer import Answer
from analysis.study.plan import STUDIES, StudyPlan, planned_folders
from qlora_lab.errors import RunFolderError

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
        return "\n\n".join([self.answer.sentence, *remarks(self.plan)])

    def arms_figure(self) -> "Figure":
        return arm_figure(self.answer)

    def curves_figure(self, metric: str = "train/loss") -> "Figure | None":
        """Draw a metric over the steps; None where no run has logged it."""
        curves = training_curves(self.answer, metric)
        if curves is None:
            return None
        return curve_figure(curves.history, curves.groups, metric, stopped=curves.stopped)

    def over_arms(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return the means of further columns over the runs that count, one row an arm, in the order of the table."""
        counted = self.runs[~self.runs["run_id"].isin(self.answer.not_counted["run_id"])]
        return counted.groupby("arm")[list(columns)].mean().reindex(self.answer.arms)


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
    study = read_study(plans[-1], runs_dir)
    runs = study.answer.runs
    study.answer.runs = runs.assign(**{count: math.nan for count in PARAMETERS if count not in runs})
    return OpenedStudy(study.plan, study.answer)


def printed(name: str) -> pd.DataFrame:
    """Return one of the tables of sweeps/paper/, such as `elo`: what the original study reported."""
    from qlora_lab.config.command import shipped  # imports Hydra

    return pd.read_csv(shipped("sweeps") / "paper" / f"{name}.csv")
