"""What a report holds whatever it is written as: the page and the W&B report take these lines and tables from here."""

from typing import Any

import pandas as pd

from analysis.report.terminal import seed_text, what_happened
from analysis.study.answer import Answer
from analysis.study.arms import SEED
from analysis.study.plan import StudyPlan


def counted_line(answer: Answer) -> str:
    """Say how many of the planned runs are counted, and what became of the others."""
    planned, missed = len(answer.runs), len(answer.not_counted)
    states = answer.not_counted["state"].value_counts()
    others = ", ".join(f"{count} {str(state).replace('_', ' ')}" for state, count in states.items())
    return f"{planned - missed} of {planned} runs are counted" + (f"; not counted: {others}." if missed else ".")


def varied_table(answer: Answer, plan: StudyPlan) -> pd.DataFrame:
    """Return one row an axis: `varied` and its `values`."""
    rows = []
    for axis in plan.axes:
        values = dict.fromkeys(str(place[axis]) for place in plan.places.values() if axis in place)
        if axis == SEED and not values:
            values = dict.fromkeys(seed_text(seed) for seed in sorted(answer.runs[SEED].dropna()))
        rows.append((axis, ", ".join(values)))
    return pd.DataFrame(rows, columns=["varied", "values"])


def fixed_table(plan: StudyPlan) -> pd.DataFrame:
    """Return one row a setting that all runs share: `held fixed` and its `value`."""
    rows = [(key, _plain(value)) for key, value in plan.fixed.items()]
    return pd.DataFrame(rows, columns=["held fixed", "value"])


def not_counted_table(answer: Answer) -> pd.DataFrame:
    """Return one row a run that is in no mean: `run`, `arm`, `seed`, and `what happened`."""
    rows = [
        (str(run["run_id"]), str(run["arm"]), seed_text(run["seed"]), what_happened(answer, run))
        for run in answer.not_counted.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=["run", "arm", "seed", "what happened"])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
