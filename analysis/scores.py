"""The held-out rows of several runs, lined up so that arms can be compared on the same rows and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.load import load_rows
from analysis.metrics import describe, row_ratios
from analysis.statistics import Ratios
from qlora_lab.errors import RunFolderError

ROUNDING = 1e-4  # how far, relatively, a reported metric may be from what its rows give
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LinedUp:
    """Arms on the rows that all their runs have: for each arm its sets, each (seeds, rows)."""

    arms: list[list[Ratios]]
    rows_left_out: bool  # some run has rows that another has not

    @property
    def n_rows(self) -> int:
        return sum(ratios.numerator.shape[1] for ratios in self.arms[0])

    def row_differences(self) -> Array:
        """Return (rows,): first arm minus second on each row alone, mean over seeds."""
        first, second = self.arms
        return np.concatenate([(a.per_row() - b.per_row()).mean(axis=0) for a, b in zip(first, second, strict=True)])


class Scores:
    """What the counted runs scored on one metric, by arm and seed.

    Attributes:
        values: the reported metric, by (arm, seed).
        has_rows: whether held-out rows stand behind the metric; if not, arms are compared by seed alone.
        notes: one sentence for each run whose rows cannot be used or do not give what it reported.
    """

    def __init__(self, counted: pd.DataFrame, metric: str) -> None:
        keys = [(str(arm), int(seed)) for arm, seed in zip(counted["arm"], counted["seed"], strict=True)]
        self.values = dict(zip(keys, counted[metric].astype(float) if keys else [], strict=True))
        self.notes: list[str] = []
        self._rows: dict[tuple[str, int], pd.DataFrame] = {}
        if describe(metric).numerator is not None:
            for key, run_id, folder in zip(keys, counted["run_id"], counted["folder"], strict=True):
                self._read(key, run_id, Path(folder), metric)
        self.has_rows = bool(self._rows)

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

    def line_up(self, arms: Sequence[str], seeds: Sequence[int]) -> LinedUp:
        """Return the arms on the rows that each of their runs has, in one order of seeds, sets and rows."""
        frames = [[self._rows[arm, seed] for seed in seeds] for arm in arms]
        indexes = [frame.index for arm in frames for frame in arm]
        common = indexes[0]
        for index in indexes[1:]:
            common = common.intersection(index)
        common = common.sort_values()
        sets = common.get_level_values("set")
        blocks = [common[sets == name] for name in sets.unique()]
        lined_up = [
            [Ratios(_stack(runs, rows, "numerator"), _stack(runs, rows, "denominator")) for rows in blocks]
            for runs in frames
        ]
        return LinedUp(lined_up, rows_left_out=any(len(index) != len(common) for index in indexes))


def _stack(runs: Sequence[pd.DataFrame], rows: pd.Index, column: str) -> Array:
    return np.stack([run.loc[rows, column].to_numpy(dtype=float) for run in runs])
