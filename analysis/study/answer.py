"""The answer to a study's question: one row an arm, arms compared, and one sentence that the numbers support."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.estimates import Estimate
from analysis.statistics.rows import DRAWS
from analysis.statistics.seeds import summarize
from analysis.statistics.variance import MOST_AXES, split_variance
from analysis.study.arms import AxisValues, arms_of_runs, axes_without_seed, label_arms
from analysis.study.audit import audit, what_is_missing
from analysis.study.axes import AxisComparison, axes_of_study, axis_notes, compare_values
from analysis.study.comparison import Comparison, compare_pairs, estimate_of_arm
from analysis.study.data_notes import ROWS_SEEN, data_notes
from analysis.study.findings import findings, pair_findings
from analysis.study.metrics import describe
from analysis.study.pair_notes import pair_notes
from analysis.study.published import COLUMNS, beside_arms, published_note
from analysis.study.scores import Scores
from analysis.study.tasks import correlation_table, iqm_table, task_notes
from analysis.study.wording import axis_sentence, sentence
from qlora_lab.errors import ConfigError, unknown_name

SECONDARY = ("eval/bits_per_byte", "eval/exact_match", ROWS_SEEN, "train/tokens", "train/time_s")


@dataclass
class Answer:
    """What the runs say.

    Attributes:
        axes: what varies, without the seed.
        table: one row an arm, the best first: `arm`, its axis values, `METRIC mean/std/low/high` (95 % interval over
            rows and seeds), `n` (runs in the mean), `planned`, `not counted` (what became of the others), and the
            mean of each secondary metric by its name.
        comparisons: every pair of arms that have runs in the mean, in the order of the table; of more than
            MOST_ARMS_PAIRED arms the pairs of the best one.
        by_axis: of a study with several axes, the values of each, compared at equal other settings; that of the
            question first.
        scores: the held-out rows behind the comparisons.
        runs: one row a run, as `load_runs` gives it, with its `arm`.
        not_counted: the rows of `runs` that are in no mean, whatever the reason.
        notes: what a reader must know beside the numbers.
        sentence: the answer in one sentence: that of the axis in question, or else of the arms.
        findings: what else the numbers support, a sentence each: seeds that would be needed, which axis matters,
            whether benchmarks agree.
        variance: of the metric between counted runs, by axis, seed and the rest; see `split_variance`.
        iqm: one row an arm, of all benchmarks together; see `iqm_table`.
        correlations: of the metric and the benchmarks' scores over arms; see `correlate_metrics`.
        published: what the original study printed, one row an arm; see `analysis.study.published`.
        text: the block for a terminal, filled in by `analysis.report.summarize_study`.
        paths: the files written: `report` and `table`.
    """

    metric: str
    goal: str
    axes: list[str]
    table: pd.DataFrame
    comparisons: list[Comparison]
    scores: Scores
    runs: pd.DataFrame
    not_counted: pd.DataFrame
    notes: list[str]
    sentence: str
    by_axis: list[AxisComparison] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    variance: pd.DataFrame = field(default_factory=pd.DataFrame)
    iqm: pd.DataFrame = field(default_factory=pd.DataFrame)
    correlations: pd.DataFrame = field(default_factory=pd.DataFrame)
    published: pd.DataFrame = field(default_factory=pd.DataFrame)
    text: str = ""
    paths: dict[str, Path] = field(default_factory=dict)

    @property
    def answering(self) -> AxisComparison | None:
        """The comparison of values that the sentence is about; None where it is about arms."""
        return next((compared for compared in self.by_axis if compared.answers), None)

    @property
    def arms(self) -> list[str]:
        return list(self.table["arm"])

    def counted_runs(self, arm: str) -> pd.DataFrame:
        """Return the arm's runs that are in its mean, by seed."""
        return self._counted.get(arm, self.runs[:0])

    @functools.cached_property
    def _counted(self) -> dict[str, pd.DataFrame]:
        counted = self.runs[~self.runs["run_id"].isin(self.not_counted["run_id"])].sort_values("seed")
        return {str(arm): runs for arm, runs in counted.groupby("arm")}


def compare(
    runs: pd.DataFrame,
    axes: Sequence[str],
    metric: str,
    goal: str,
    *,
    arms: Mapping[str, AxisValues] | None = None,
    planned: bool = True,
    paper: Mapping[str, Any] | None = None,
    question: Sequence[str] = (),
    draws: int = DRAWS,
    bootstrap_seed: int = 0,
) -> Answer:
    """Compare the arms of a study on one metric.

    Args:
        runs: from `load_runs`; runs that did not finish belong in it.
        axes: configuration keys or groups that vary; `seed` may be among them.
        metric: a metric of the runs, such as `eval/loss`.
        goal: `min` or `max`.
        arms: run id -> axis -> value, from the plan; without it the values are read from the configurations.
        planned: the runs are those of a plan, rather than whatever lies in a folder.
        paper: which numbers of the original study stand beside the arms; see `analysis.study.published`.
        question: the axes that the question is about, taken as one; the first that varies where none is named.
        draws: bootstrap resamples of the rows.
        bootstrap_seed: the same seed gives the same intervals.

    Raises:
        ConfigError: an unknown goal or metric, a run that `arms` does not place, or two runs of an arm with one seed.
    """
    if goal not in ("min", "max"):
        raise ConfigError(unknown_name("study.goal", goal, ("min", "max")))
    places = arms if arms is not None else arms_of_runs(runs, axes)
    runs = _with_arms(runs, axes, places)
    _check_metric(runs, metric)
    if metric not in runs:
        runs = runs.assign(**{metric: np.nan})
    counted = runs[(runs["state"] == "finished") & np.isfinite(runs[metric].to_numpy(dtype=float))]
    _check_seeds(counted)
    scores = Scores(counted, metric, bootstrap_seed, draws)
    table = _table(runs, counted, axes, places, metric, lambda arm: estimate_of_arm(scores, arm))
    table = table.sort_values(f"{metric} mean", ascending=goal == "min", na_position="last", ignore_index=True)
    with_runs = [arm for arm, n in zip(table["arm"], table["n"], strict=True) if n]
    comparisons = compare_pairs(scores, with_runs)
    of_study = axes_of_study(runs, places, axes, question)
    by_axis = [compare_values(scores, axis, goal) for axis in of_study if axis.is_compared]
    answering = next((compared for compared in by_axis if compared.answers), None)
    others = [compared for compared in by_axis if compared is not answering and compared.orders]
    described = describe(metric)
    not_counted = runs[~runs["run_id"].isin(counted["run_id"])]
    variance, not_split = _variance(counted, axes_without_seed(axes), places, metric)
    iqm, correlations = iqm_table(counted, with_runs), correlation_table(counted, metric)
    numbers = beside_arms(paper, table) if paper else pd.DataFrame(columns=list(COLUMNS))
    return Answer(
        metric=metric,
        goal=goal,
        axes=axes_without_seed(axes),
        table=table,
        comparisons=comparisons,
        scores=scores,
        runs=runs,
        not_counted=not_counted,
        notes=[
            *audit(runs, metric, planned=planned),
            *scores.notes,
            *pair_notes(metric, with_runs, comparisons),
            *axis_notes(of_study),
            *not_split,
            *task_notes(counted, metric),
            *data_notes(counted, with_runs),
            *([published_note(numbers, paper, table["arm"].tolist())] if paper else []),
        ],
        sentence=(
            axis_sentence(described, goal, answering) if answering else sentence(described, goal, table, comparisons)
        ),
        by_axis=by_axis,
        findings=[
            *pair_findings(described, answering.of_the_best if answering else comparisons),
            *(axis_sentence(described, goal, other) for other in others),
            *findings(described, goal, variance, correlations, iqm),
        ],
        variance=variance,
        iqm=iqm,
        correlations=correlations,
        published=numbers,
    )


def _variance(
    counted: pd.DataFrame, axes: Sequence[str], places: Mapping[str, AxisValues], metric: str
) -> tuple[pd.DataFrame, list[str]]:
    """Split the metric's variance by the axes that vary; where these are too many, an empty frame and a note."""
    values = {axis: [str(places[run_id].get(axis)) for run_id in counted["run_id"]] for axis in axes}
    varying = [axis for axis in axes if len(set(values[axis])) > 1]
    too_many = len(varying) > MOST_AXES
    runs = pd.DataFrame({**values, metric: counted[metric].to_numpy(dtype=float)})
    note = (
        f"What matters most is not worked out: {len(varying)} axes vary ({', '.join(varying)}), and the variance is "
        f"split by at most {MOST_AXES}. Hold some of them at one value to see what the others do."
    )
    return split_variance(runs, [] if too_many else varying, metric), [note] if too_many else []


def _with_arms(runs: pd.DataFrame, axes: Sequence[str], places: Mapping[str, AxisValues]) -> pd.DataFrame:
    """Add each run's arm, and the planned seed of a run whose configuration cannot be read."""
    for run_id in runs["run_id"]:
        if run_id not in places:
            raise ConfigError(f"run {run_id} has no place on the axes {', '.join(axes)}; is it part of the plan?")
    labels = label_arms({run_id: places[run_id] for run_id in runs["run_id"]})
    planned_seeds = [places[run_id].get("seed") for run_id in runs["run_id"]]
    seeds = [p if pd.isna(s) else s for s, p in zip(runs["seed"], planned_seeds, strict=True)]
    return runs.assign(
        arm=[labels[run_id] for run_id in runs["run_id"]],
        seed=pd.Series(pd.to_numeric(pd.Series(seeds, index=runs.index, dtype=object)), dtype="Int64"),
    )


def _check_metric(runs: pd.DataFrame, metric: str) -> None:
    finished = runs[runs["state"] == "finished"]
    known = [name for name in runs.columns if "/" in name and finished[name].notna().any()]
    if known and metric not in runs.columns:
        raise ConfigError(unknown_name("study.metric", metric, known))


def _check_seeds(counted: pd.DataFrame) -> None:
    twice = counted[counted.duplicated(["arm", "seed"], keep=False)]
    if len(twice):
        arm, seed = twice.iloc[0][["arm", "seed"]]
        ids = ", ".join(twice[(twice["arm"] == arm) & (twice["seed"] == seed)]["run_id"])
        raise ConfigError(
            f"arm '{arm}' has several runs with seed {seed} ({ids}); "
            "add the configuration key that tells them apart to the axes"
        )


def secondary_metrics(runs: pd.DataFrame, metric: str) -> list[str]:
    """Return the other metrics worth a column, where the runs have them: losses by set, then SECONDARY."""
    losses = sorted(name for name in runs.columns if name.startswith("eval/") and name.endswith("/loss"))
    candidates = dict.fromkeys([*losses, *SECONDARY])
    return [name for name in candidates if name != metric and name in runs.columns and runs[name].notna().any()]


def _table(
    runs: pd.DataFrame,
    counted: pd.DataFrame,
    axes: Sequence[str],
    places: Mapping[str, AxisValues],
    metric: str,
    estimate: Callable[[str], Estimate | None],
) -> pd.DataFrame:
    secondary = secondary_metrics(counted, metric)
    values = {name: counted[name].to_numpy(dtype=float) for name in (metric, *secondary)}
    counted_of = counted.groupby("arm").indices
    missing = runs[~runs["run_id"].isin(counted["run_id"])]
    states = missing.groupby("arm")["state"].agg(list)
    rows = []
    for arm, planned in runs.groupby("arm", sort=False)["run_id"].agg(list).items():
        of_arm = counted_of.get(arm, [])
        place = places[planned[0]]
        summary = summarize(values[metric][of_arm])
        interval = estimate(str(arm))
        rows.append(
            {
                "arm": arm,
                **{axis: place.get(axis) for axis in axes_without_seed(axes)},
                f"{metric} mean": summary.mean,
                f"{metric} std": summary.std,
                f"{metric} low": interval.low if interval else math.nan,
                f"{metric} high": interval.high if interval else math.nan,
                "n": summary.n,
                "planned": len(planned),
                "not counted": what_is_missing(states.get(arm, [])),
                **{name: summarize(values[name][of_arm]).mean for name in secondary},
            }
        )
    return pd.DataFrame(rows)
