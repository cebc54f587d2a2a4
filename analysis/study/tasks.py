"""Several benchmarks of one study: the score of each, all together, and whether they agree on the arms."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.statistics.correlation import correlate_metrics
from analysis.statistics.holm import holm
from analysis.statistics.iqm import Interval, estimate_iqm, estimate_iqm_difference
from qlora_lab.sweep.listing import listed

# The metric that a benchmark is known by, the first that it has; all are between 0 (or -1) and 1, more is better.
SCORES = ("hendrycks_micro", "matthews", "pearson", "acc_norm", "acc", "rouge_l")
FEWEST_TASKS = 3
MOST_CORRELATED = 8  # 28 pairs: each one more makes Holm's correction stricter for all
FEW = 5  # named one by one


def task_scores(columns: Sequence[str]) -> dict[str, str]:
    """Return the columns of the benchmarks' scores by benchmark: `{"mmlu": "eval/mmlu/test/5shot/hendrycks_micro"}`."""
    scores: dict[str, str] = {}
    for name in sorted((c for c in columns if c.startswith("eval/") and c.count("/") >= 3), key=_preference):
        parts = name.split("/")
        if parts[-1] in SCORES:
            scores.setdefault(parts[1], name)
    return dict(sorted(scores.items()))


def _preference(name: str) -> tuple[int, str]:
    last = name.rsplit("/", 1)[-1]
    return SCORES.index(last) if last in SCORES else len(SCORES), name


def iqm_table(counted: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """Return one row an arm, the best first: `arm`, `iqm`, `low`, `high` (95 % interval over seeds), `n` runs, `tasks`.

    And how far it is behind the first, on the seeds that both have: `behind` with `behind_low`, `behind_high`, and `p`,
    corrected by Holm for every two arms, since the first was found by looking at all of them.

    Empty where there are fewer than FEWEST_TASKS benchmarks. A task that a counted run lacks is left out for all arms,
    so that all are judged by the same.
    """
    columns = list(_shared_tasks(counted).values())
    scores = {
        arm: counted[counted["arm"] == arm].set_index("seed")[columns].astype(float)
        for arm in (arms if len(columns) >= FEWEST_TASKS else ())
    }
    rows = []
    for arm, of_arm in scores.items():
        if len(of_arm):
            found = estimate_iqm(of_arm.to_numpy())
            rows.append((arm, found.value, found.low, found.high, len(of_arm), len(columns)))
    table = pd.DataFrame(rows, columns=["arm", "iqm", "low", "high", "n", "tasks"])
    table = table.sort_values("iqm", ascending=False, kind="stable", ignore_index=True)
    behind = [_behind(scores[table["arm"][0]], scores[arm]) for arm in table["arm"]]
    return table.assign(
        behind=[found.value for found in behind],
        behind_low=[found.low for found in behind],
        behind_high=[found.high for found in behind],
        p=holm([found.p_value for found in behind], math.comb(len(table), 2)),
    )


def _shared_tasks(counted: pd.DataFrame) -> dict[str, str]:
    """Return the columns of the benchmarks that every counted run was scored on, by benchmark."""
    return {task: name for task, name in task_scores(list(counted.columns)).items() if counted[name].notna().all()}


def _behind(best: pd.DataFrame, other: pd.DataFrame) -> Interval:
    """Estimate the first arm minus another on their shared seeds; NaN for the first itself and without one."""
    seeds = best.index.intersection(other.index)
    if other is best or seeds.empty:
        return Interval(math.nan, math.nan, math.nan)
    return estimate_iqm_difference(np.asarray(best.loc[seeds]), np.asarray(other.loc[seeds]))


def correlation_table(counted: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Correlate the study's metric and the first benchmarks' scores over arms, every two; see `correlate_metrics`."""
    metrics = _correlated(counted, metric)[:MOST_CORRELATED]
    means = counted.groupby("arm")[metrics].mean() if metrics else pd.DataFrame()
    return correlate_metrics(means, metrics)


def _correlated(counted: pd.DataFrame, metric: str) -> list[str]:
    """Return the study's metric and the benchmarks' scores, by name; nothing where there is no benchmark."""
    scores = list(task_scores(list(counted.columns)).values())
    return list(dict.fromkeys([metric, *scores])) if scores else []


def task_notes(counted: pd.DataFrame, metric: str) -> list[str]:
    """Say which benchmarks are in no interquartile mean and in no correlation, and why."""
    scores, shared = task_scores(list(counted.columns)), _shared_tasks(counted)
    notes = []
    if len(scores) >= FEWEST_TASKS and len(shared) < len(scores):
        lacking = [
            f"{task} (of {len(counted):,} counted runs {counted[name].isna().sum():,} have none)"
            for task, name in scores.items()
            if task not in shared
        ]
        what = f"is over {len(shared)} of {len(scores)}" if len(shared) >= FEWEST_TASKS else "is not given"
        notes.append(
            f"The interquartile mean of the benchmarks {what}, since it takes those alone that every counted run was "
            f"scored on, and {FEWEST_TASKS} at least. Left out: {', '.join(listed(lacking, FEW, 'more'))}."
        )
    if len(metrics := _correlated(counted, metric)) > MOST_CORRELATED:
        others = listed(metrics[MOST_CORRELATED:], FEW, "more")
        notes.append(
            f"Rank correlations are of {MOST_CORRELATED} metrics, {metric} and the first benchmarks by name, since one "
            f"more makes the correction stricter for all pairs. Left out of {len(metrics)}: {', '.join(others)}."
        )
    return notes
