"""The held-out rows of several runs, lined up so that arms can be compared on the same rows and seeds."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.load import load_rows
from analysis.metrics import describe, row_ratios
from analysis.statistics import DRAWS, Ratios, Scored, score
from qlora_lab.errors import RunFolderError

ROUNDING = 1e-4  # how far, relatively, a reported metric may be from what its rows give
Array = npt.NDArray[np.float64]


class Scores:
    """What the counted runs scored on one metric, by arm and seed.

    Every arm is scored once on the rows that all runs share, so that comparing all pairs costs next to nothing.

    Attributes:
        values: the reported metric, by (arm, seed).
        has_rows: whether held-out rows stand behind the metric; if not, arms are compared by seed alone.
        notes: one sentence for each run whose rows cannot be used or do not give what it reported.
    """

    def __init__(self, counted: pd.DataFrame, metric: str, bootstrap_seed: int = 0, draws: int = DRAWS) -> None:
        self._bootstrap_seed, self._draws = bootstrap_seed, draws
        keys = [(str(arm), int(seed)) for arm, seed in zip(counted["arm"], counted["seed"], strict=True)]
        self.values = dict(zip(keys, counted[metric].astype(float) if keys else [], strict=True))
        self.notes: list[str] = []
        self._rows: dict[tuple[str, int], pd.DataFrame] = {}
        if describe(metric).numerator is not None:
            for key, run_id, folder in zip(keys, counted["run_id"], counted["folder"], strict=True):
                self._read(key, run_id, Path(folder), metric)
        self.has_rows = bool(self._rows)
        self._indexes = {key: rows.index for key, rows in self._rows.items()}
        first = next(iter(self._indexes.values()), pd.Index([]))
        self._rows_of_all = first if all(index.equals(first) for index in self._indexes.values()) else None
        self._scored: dict[tuple[str, tuple[int, ...]], Scored] = {}

    def _read(self, key: tuple[str, int], run_id: str, folder: Path, metric: str) -> None:
        try:
            ratios = row_ratios(load_rows(folder), metric)
        except RunFolderError as error:
            self.notes.append(f"Run {run_id} is left out of the comparisons, which go row by row: {error}.")
            return
        if ratios is None or ratios.empty:
            self.notes.append(f"Run {run_id} is left out of the comparisons: none of its rows defines {metric}.")
            return
        self._rows[key] = ratios
        sums = ratios.groupby("set").sum()
        from_rows = float((sums["numerator"] / sums["denominator"]).mean())
        if abs(from_rows - self.values[key]) > ROUNDING * abs(self.values[key]) + 1e-9:
            self.notes.append(
                f"Run {run_id} reports {metric} {self.values[key]:.6g}, but its rows give {from_rows:.6g}: "
                "the table shows the first, the comparisons use the rows."
            )

    def seeds(self, arm: str) -> list[int]:
        """Return the seeds that the arm can be compared on."""
        return sorted(seed for name, seed in (self._rows if self.has_rows else self.values) if name == arm)

    def scored(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Scored]:
        """Score the arms on the rows that each of their runs has; an empty list where there is no such row."""
        rows = self.shared_rows(arms, seeds)
        return [self._score(arm, tuple(seeds), rows) for arm in arms] if len(rows) else []

    def shared_rows(self, arms: Sequence[str], seeds: Sequence[int]) -> pd.Index:
        """Return the (set, key) of the rows that each of the arms' runs has."""
        if self._rows_of_all is not None:
            return self._rows_of_all
        indexes = [self._indexes[arm, seed] for arm in arms for seed in seeds]
        return functools.reduce(lambda rows, index: rows.intersection(index), indexes).sort_values()

    def leaves_rows_out(self, arms: Sequence[str], seeds: Sequence[int]) -> bool:
        """Say whether some of the arms' runs have rows that others have not."""
        shared = len(self.shared_rows(arms, seeds))
        return any(len(self._indexes[arm, seed]) != shared for arm in arms for seed in seeds)

    def row_differences(self, first: str, second: str) -> Array:
        """Return (rows,): first minus second on each shared row alone, mean over shared seeds; empty without rows."""
        seeds = self.shared_seeds(first, second)
        scored = self.scored([first, second], seeds) if self.has_rows and seeds else []
        return (scored[0].per_row - scored[1].per_row).mean(axis=0) if scored else np.empty(0)

    def shared_seeds(self, first: str, second: str) -> list[int]:
        return [seed for seed in self.seeds(first) if seed in self.seeds(second)]

    def _score(self, arm: str, seeds: tuple[int, ...], rows: pd.Index) -> Scored:
        if (arm, seeds) in self._scored:  # filled only where all runs share their rows
            return self._scored[arm, seeds]
        runs = [self._rows[arm, seed] for seed in seeds]
        sets = rows.get_level_values("set")
        blocks = [rows[sets == name] for name in sets.unique()]
        ratios = [Ratios(_stack(runs, block, "numerator"), _stack(runs, block, "denominator")) for block in blocks]
        scored = score(ratios, self._bootstrap_seed, self._draws)
        if rows is self._rows_of_all:
            self._scored[arm, seeds] = scored
        return scored


def _stack(runs: Sequence[pd.DataFrame], rows: pd.Index, column: str) -> Array:
    return np.stack([run.loc[rows, column].to_numpy(dtype=float) for run in runs])
