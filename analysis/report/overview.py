"""What figures and charts draw: the counted runs as one frame of settings, metric and costs, and their curves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.load import load_history
from analysis.sources.run_folders import read_history
from analysis.sources.wandb_project import SCHEME
from analysis.sources.wandb_runs import wandb_files
from analysis.study.answer import Answer
from analysis.study.arms import SEED
from analysis.study.plan import StudyPlan

MOST_ARMS = 12  # with curves that can be told apart
MOST_COLOURS = 10  # of one figure
MODEL, SIZE = "model", "total_parameters"  # an axis, and what its values have
FEWEST_SIZES = 3  # of two there is always a line
COSTS = ("train/time_s", "memory/peak_cuda_bytes", "memory/peak_rss_bytes", "train/tokens", "trainable_parameters")


@dataclass(frozen=True)
class Overview:
    """One row a run that is in the mean of its arm.

    Attributes:
        runs: columns `run_id`, `arm`, `seed`, each of `axes`, the metric, and each of `costs`.
        axes: what varies among these runs, without the seed.
        costs: those of COSTS that all the runs have, and in which they differ.
    """

    metric: str
    goal: str
    runs: pd.DataFrame
    axes: list[str]
    costs: list[str]

    def arms(self) -> pd.DataFrame:
        """Return one row an arm: its settings and the mean of the metric and of the costs over its runs."""
        means = dict.fromkeys((self.metric, *self.costs), "mean")
        return self.runs.groupby("arm", sort=False, as_index=False).agg(dict.fromkeys(self.axes, "first") | means)

    def told_apart_by(self) -> str | None:
        """Return the column whose values get colours: the arms if they are few, else the first setting with few."""
        few = (name for name in ("arm", *self.axes) if self.runs[name].nunique() <= MOST_COLOURS)
        return next(few, None)


@dataclass(frozen=True)
class TrainingCurves:
    """What the best arms logged over their steps.

    Attributes:
        history: as `load_history` gives it.
        groups: run id -> arm, the best first.
        stopped: the runs among them that are not counted.
    """

    metric: str
    history: pd.DataFrame
    groups: dict[str, str]
    stopped: frozenset[str]
    damaged_lines: int


def training_curves(answer: Answer, metric: str = "train/loss") -> TrainingCurves | None:
    """Read the curves of the best MOST_ARMS arms; None where no run has any."""
    places = {arm: number for number, arm in enumerate(answer.arms[:MOST_ARMS])}
    runs = answer.runs[answer.runs["arm"].isin(places)]
    runs = runs.assign(place=runs["arm"].map(places)).sort_values(["place", "seed"])
    folders = {str(run["run_id"]): Path(str(run["folder"])) for run in runs.to_dict("records")}
    histories = {
        run_id: read_history(folder) for run_id, folder in folders.items() if (folder / "metrics.jsonl").exists()
    }
    histories |= _mirrored({str(run["run_id"]): str(run["folder"]) for run in runs.to_dict("records")}, metric)
    if not histories:
        return None
    return TrainingCurves(
        metric=metric,
        history=pd.concat([frame.assign(run_id=run_id) for run_id, frame in histories.items()], ignore_index=True),
        groups={str(run["run_id"]): str(run["arm"]) for run in runs.to_dict("records")},
        stopped=frozenset(answer.not_counted["run_id"]),
        damaged_lines=sum(history.attrs["damaged_lines"] for history in histories.values()),
    )


def _attempts(place: Path) -> Path:
    """Return where the W&B files of a run's attempts lie: beside each other, or each in a folder of its own."""
    return place.parent if "run-" in place.name else place


def _mirrored(places: Mapping[str, str], metric: str) -> dict[str, pd.DataFrame]:
    """Read the curves of runs that were read from W&B, by id."""
    sources = dict.fromkeys(
        place if place.startswith(SCHEME) else _attempts(Path(place))
        for place in places.values()
        if place.startswith(SCHEME) or wandb_files(Path(place))
    )
    if not sources:
        return {}
    history = load_history(sources, [metric])
    damaged = history.attrs["damaged_lines"]
    curves = {str(run_id): curve for run_id, curve in history.groupby("run_id") if run_id in places}
    for run_id, curve in curves.items():
        curve.attrs["damaged_lines"] = damaged.get(run_id, 0)
    return curves


def with_sizes(overview: Overview, answer: Answer) -> pd.DataFrame | None:
    """Return the overview's runs with the parameters of each one's model; None of fewer than FEWEST_SIZES sizes."""
    if MODEL not in overview.axes or SIZE not in answer.runs:
        return None
    parameters = overview.runs["run_id"].map(answer.runs.set_index("run_id")[SIZE]).astype(float)
    smallest = parameters.groupby(overview.runs[MODEL]).transform("min")  # adapters of other ranks are no other model
    return overview.runs.assign(**{SIZE: smallest}) if smallest.nunique() >= FEWEST_SIZES else None


def overview_of(answer: Answer, plan: StudyPlan) -> Overview:
    """Return the overview of a study; its frame may be empty."""
    counted = answer.runs[~answer.runs["run_id"].isin(answer.not_counted["run_id"])]
    order = counted["arm"].map({arm: number for number, arm in enumerate(answer.arms)})
    counted = counted.assign(order=order).sort_values(["order", "seed"])
    found = counted[["run_id", "arm", "seed", answer.metric]].reset_index(drop=True)
    places = [plan.places[run_id] for run_id in found["run_id"]]
    axes = []
    for axis in plan.axes:
        values = [place.get(axis, "none") for place in places]
        if axis != SEED and len(set(values)) > 1:
            axes.append(axis)
            found[axis] = values
    costs = []
    for cost in COSTS:
        spent = pd.to_numeric(counted[cost], errors="coerce").to_numpy(dtype=float) if cost in counted else np.empty(0)
        if cost != answer.metric and len(spent) and np.isfinite(spent).all() and np.ptp(spent) > 0:
            costs.append(cost)
            found[cost] = spent
    return Overview(answer.metric, answer.goal, found, axes, costs)
