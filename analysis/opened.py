"""A study opened for a notebook: its plan, its runs, its answer and its figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from analysis.report.figures.answers import arm_figure
from analysis.report.figures.curves import curve_figure
from analysis.report.figures.scaling import scaling_figure
from analysis.report.overview import training_curves
from analysis.report.ratings_section import read_ratings
from analysis.report.study_report import read_study
from analysis.report.tables import arm_table
from analysis.report.terminal import remarks
from analysis.study.answer import Answer
from analysis.study.arms import label_arms
from analysis.study.plan import STUDIES, StudyPlan, planned_folders
from analysis.study.systems import ScoresAndRatings, scores_and_ratings
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
    def counted(self) -> pd.DataFrame:
        """The rows of `runs` that are in the means."""
        return self.runs[~self.runs["run_id"].isin(self.answer.not_counted["run_id"])]

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

    def scaling_figure(self) -> "Figure":
        """Draw the metric against the number of parameters: a line for each setting that varies at one size."""
        places = self.plan.places
        sizes = [axis for axis in self.answer.axes if axis.partition(".")[0] == "model"]
        told_apart = list(sizes)
        for axis in self.answer.axes:
            if axis not in told_apart and _distinct(places, [*told_apart, axis]) > _distinct(places, told_apart):
                told_apart.append(axis)
        others = told_apart[len(sizes) :]
        lines = label_arms({run: {axis: place[axis] for axis in others} for run, place in places.items()})
        runs = self.counted.assign(line=self.counted["run_id"].map(lines))
        return scaling_figure(runs, self.answer.metric, by="line" if others else None)

    def against_ratings(self, ratings: Path) -> ScoresAndRatings:
        """Put the runs' benchmarks beside the ratings of a tournament of the same runs.

        Args:
            ratings: what `python -m qlora_lab.tournament RATINGS.jsonl --json` printed.

        Raises:
            DataError: it holds no ratings.
            RunFolderError, ConfigError: as of `scores_and_ratings`.
        """
        return scores_and_ratings(self.counted, read_ratings(ratings))

    def over_arms(self, columns: Sequence[str]) -> pd.DataFrame:
        """Return the means of further columns over the runs that count, one row an arm, in the order of the table."""
        return self.counted.groupby("arm")[list(columns)].mean().reindex(self.answer.arms)


def _distinct(places: Mapping[str, Mapping[str, str]], axes: Sequence[str]) -> int:
    return len({tuple(place[axis] for axis in axes) for place in places.values()})


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
