"""Whether a benchmark predicts whose answers are preferred: a study's scores beside its systems' ratings.

A run is a system: it is known to judges by the name that its answers were signed with, which each of its evaluations
records (RUN/evaluations/NAME-HASH/result.json), beside the metrics of that evaluation.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import stdtrit

from analysis.statistics.correlation import correlate_with
from analysis.statistics.estimates import LEVEL
from analysis.statistics.seeds import summarize
from analysis.study.findings import correlation_sentence
from analysis.study.tasks import task_scores
from qlora_lab.errors import ConfigError, RunFolderError
from qlora_lab.runs.files import read_json

RATING = "rating"
SAME_SCORE = 1e-6  # relative: measured in training and again, or written with other digits


@dataclass(frozen=True)
class ScoresAndRatings:
    """Benchmarks against ratings.

    Attributes:
        table: one row an arm, the highest rating first: `arm`, `systems` (of its runs that are rated), `rating`, `low`
            and `high`, and the mean of each benchmark's score over the arm's runs by its name. Of one system `low` and
            `high` are the tournament's 95 % interval, over questions; of several, a t interval over their ratings.
        correlations: one row a benchmark; see `correlate_with`. Arms are taken as they are: the intervals are over
            arms, and hold nothing of how sure a rating or a score is.
        notes: which systems and runs are left out.
    """

    table: pd.DataFrame
    correlations: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def words(self) -> str:
        """Say of each benchmark whether it orders the arms as the ratings do, and what is left out."""
        found = [correlation_sentence(row) for row in self.correlations.to_dict("records")]
        return "\n\n".join([*(found or ["No run was scored on a benchmark."]), *self.notes])


def scores_and_ratings(counted: pd.DataFrame, told: Mapping[str, Any]) -> ScoresAndRatings:
    """Put scores and ratings of a study's arms side by side.

    Args:
        counted: the counted runs, as `load_runs` gives them, with their `arm`.
        told: the ratings, as `analysis.report.ratings_section.read_ratings` gives them.

    Raises:
        RunFolderError: the record of an evaluation is damaged.
        ConfigError: a run has two values of a metric, no run was signed as any of the rated systems, or runs of two
            arms as one of them.
    """
    runs, names = _with_evaluations(counted)
    rated = {str(row["system"]): row for row in told["systems"]}
    owners = _owners(names, rated)
    if not owners:
        raise ConfigError(
            f"none of the {len(rated)} rated systems ({', '.join(rated)}) is a run of this study; its runs are called "
            f"{', '.join(dict.fromkeys(name for name, _ in names)) or 'nothing: none was evaluated'}"
        )
    benchmarks = list(task_scores(list(runs.columns)).values())
    means = runs.groupby("arm", sort=False)[benchmarks].mean()
    rows = []
    for arm in dict.fromkeys(runs["arm"]):
        systems = [rated[name] for name, owner in owners.items() if owner == arm]
        rows.append({"arm": arm, **_rating(systems), **means.loc[arm].to_dict()})
    table = pd.DataFrame(rows).sort_values(RATING, ascending=False, na_position="last", ignore_index=True)
    notes = _left_out([name for name in rated if name not in owners], table, benchmarks)
    seeds_of = runs.groupby("arm")["seed"].nunique().to_dict()
    for row in table.to_dict("records"):
        arm, systems, seeds = row["arm"], row["systems"], seeds_of[row["arm"]]
        if 0 < systems < seeds:
            notes.append(f"Of {seeds} seeds of {arm}, {systems} are rated; its scores are means over all of them.")
    return ScoresAndRatings(table, correlate_with(table, RATING, benchmarks), notes)


def _owners(names: Sequence[tuple[str, str]], rated: Collection[str]) -> dict[str, str]:
    """Return the arm of each rated system."""
    owners: dict[str, str] = {}
    for name, arm in names:
        if name in rated and owners.setdefault(name, arm) != arm:
            raise ConfigError(
                f"runs of {owners[name]} and of {arm} are both signed '{name}', so nobody knows whose answers were "
                "judged; evaluate them without system=..., and judge again"
            )
    return owners


def _rating(systems: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean rating of an arm's systems with its 95 % interval."""
    found = summarize([float(row["rating"]) for row in systems])
    low = high = math.nan
    if found.n == 1:
        low, high = float(systems[0]["rating_low"]), float(systems[0]["rating_high"])
    elif found.n > 1:
        half_width = float(stdtrit(found.n - 1, (1 + LEVEL) / 2)) * found.std / math.sqrt(found.n)
        low, high = found.mean - half_width, found.mean + half_width
    return {"systems": found.n, RATING: found.mean, "low": low, "high": high}


def _left_out(others: list[str], table: pd.DataFrame, benchmarks: Sequence[str]) -> list[str]:
    notes = []
    if others:
        notes.append(f"Rated, but no counted run of this study, and left out: {', '.join(others)}.")
    if without := table.loc[table[RATING].isna(), "arm"].tolist():
        notes.append(f"Without a rating, and left out of the correlations: {', '.join(without)}.")
    rated = table[table[RATING].notna()]
    for benchmark in benchmarks:
        if without := rated.loc[rated[benchmark].isna(), "arm"].tolist():
            notes.append(f"Rated, but without {benchmark}, and left out of its correlation: {', '.join(without)}.")
    return notes


def _with_evaluations(counted: pd.DataFrame) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return the runs with the scores of their evaluations, and the name and arm of each run that has one."""
    names: dict[tuple[str, str], None] = {}
    rows = []
    for run in counted.to_dict("records"):
        found: dict[str, Any] = {}
        for file in sorted(Path(str(run["folder"])).glob("evaluations/*/result.json")):
            result = _result(file)
            names[str(result["system"]), str(run["arm"])] = None
            for name in task_scores(list(result["metrics"])).values():
                value = result["metrics"][name]
                if value is None:  # a missing metric stays missing
                    continue
                if (before := found.setdefault(name, run.get(name))) is not None and not _same(before, value):
                    raise ConfigError(
                        f"run {run['run_id']} has two values of {name}, {before} and {value} (in {file.parent}); "
                        "they were asked differently: take the evaluation away that is not meant"
                    )
                found[name] = value
        rows.append(found)
    more = pd.DataFrame(rows, index=counted.index).astype(float)
    whole = {str(name): more[name].fillna(counted[name]) if name in counted else more[name] for name in more}
    return counted.assign(**whole), list(names)


def _same(before: Any, value: Any) -> bool:
    return bool(pd.isna(before) or math.isclose(before, value, rel_tol=SAME_SCORE))


def _result(file: Path) -> Mapping[str, Any]:
    """Read the record of a finished evaluation.

    Raises:
        RunFolderError: it is damaged.
    """
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} is damaged ({error}); remove it, and evaluate the run again") from error
    if not isinstance(found, dict) or "system" not in found or not isinstance(found.get("metrics"), dict):
        raise RunFolderError(f"{file} lacks system or metrics; remove it, and evaluate the run again")
    return found
