"""Several benchmarks of one study: the score of each, all together, and whether they agree on the arms."""

from collections.abc import Sequence

import pandas as pd

from analysis.statistics.correlation import correlate_metrics
from analysis.statistics.iqm import estimate_iqm

# The metric that a benchmark is known by, the first that it has; all are between 0 (or -1) and 1, more is better.
SCORES = ("hendrycks_micro", "matthews", "pearson", "acc_norm", "acc", "rouge_l")
FEWEST_TASKS = 3
MOST_CORRELATED = 8


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
    """Return one row an arm: `arm`, `iqm`, `low`, `high` (95 % interval over seeds), `n` runs, `tasks`.

    Empty where there are fewer than FEWEST_TASKS benchmarks. A task that a counted run lacks is left out for all arms,
    so that all are judged by the same.
    """
    columns = [name for name in task_scores(list(counted.columns)).values() if counted[name].notna().all()]
    rows = []
    for arm in arms if len(columns) >= FEWEST_TASKS else ():
        scores = counted.loc[counted["arm"] == arm, columns].to_numpy(dtype=float)
        if len(scores):
            found = estimate_iqm(scores)
            rows.append((arm, found.value, found.low, found.high, len(scores), len(columns)))
    table = pd.DataFrame(rows, columns=["arm", "iqm", "low", "high", "n", "tasks"])
    return table.sort_values("iqm", ascending=False, kind="stable", ignore_index=True)


def correlation_table(counted: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Correlate the study's metric and the benchmarks' scores over arms, every two; see `correlate_metrics`."""
    scores = list(task_scores(list(counted.columns)).values())
    metrics = list(dict.fromkeys([metric, *scores]))[:MOST_CORRELATED] if scores else []
    means = counted.groupby("arm")[metrics].mean() if metrics else pd.DataFrame()
    return correlate_metrics(means, metrics)
