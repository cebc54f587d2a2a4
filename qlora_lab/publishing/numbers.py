"""A run's metrics with their intervals, and those of its arm, from the analysis."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.sources.run_folders import load_run
from analysis.study.answer import Answer
from analysis.study.comparison import estimate_of_arm
from analysis.study.metrics import describe, format_value
from analysis.study.scores import Scores
from qlora_lab.publishing.runs import PublishedRun

NOT_OF_QUALITY = ("rows", "target_tokens", "time_s")  # last names of what is counted beside the metrics


@dataclass(frozen=True)
class Measured:
    """A metric of one run: its value, and the 95 % interval over held-out rows where rows stand behind it."""

    metric: str
    value: float
    low: float = math.nan
    high: float = math.nan
    rows: int = 0

    @property
    def text(self) -> str:
        metric = describe(self.metric)
        value = format_value(metric, self.value)
        if math.isnan(self.low):
            return value
        return f"{value} ({format_value(metric, self.low)} to {format_value(metric, self.high)}, {self.rows} rows)"


def measured(run: PublishedRun) -> list[Measured]:
    """Return every evaluation metric of a run; what is behind no rows comes without an interval."""
    row = load_run(run.folder.path)
    names = [name for name in row if name.startswith("eval/") and name.rpartition("/")[2] not in NOT_OF_QUALITY]
    return [_measured(row | {"arm": run.run_id}, name) for name in names if math.isfinite(row[name])]


def _measured(row: dict[str, Any], name: str) -> Measured:
    value = float(row[name])
    if describe(name).numerator is None:
        return Measured(name, value)
    scores = Scores(pd.DataFrame([row]), name)
    if not scores.has_rows:
        return Measured(name, value)
    estimate = estimate_of_arm(scores, str(row["arm"]))
    if estimate is None:
        return Measured(name, value)
    return Measured(name, value, estimate.low, estimate.high, estimate.n_rows)


def arm_sentence(answer: Answer, run_id: str) -> str:
    """Say what the runs that differ from this one in the seed alone give together."""
    (arm,) = answer.runs.loc[answer.runs["run_id"] == run_id, "arm"]
    row: Any = answer.table.set_index("arm").loc[arm]
    metric = describe(answer.metric)
    mean, low, high = (format_value(metric, float(row[f"{answer.metric} {part}"])) for part in ("mean", "low", "high"))
    seeds = sorted(int(seed) for seed in answer.counted_runs(arm)["seed"])
    if not seeds:
        return f"No run of `{arm}` is in the study's table."
    if len(seeds) == 1:
        return f"In the study, `{arm}` has one finished run (seed {seeds[0]}), so that nothing is known of its seeds."
    return (
        f"Over its seeds {_listed(seeds)}, `{arm}` has a mean {answer.metric} of {mean} "
        f"(95 % interval {low} to {high}, over seeds and rows)."
    )


def _listed(values: Iterable[int]) -> str:
    words: Sequence[str] = [str(value) for value in values]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
