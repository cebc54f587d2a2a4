"""The held-out rows of several runs, lined up so that arms can be compared on the same rows and seeds."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.load import read_row_columns
from analysis.statistics.rows import DRAWS, Ratios, Scored, score
from analysis.study.metrics import counted_in, describe
from analysis.study.row_ratios import RowRatios, row_ratios
from qlora_lab.errors import RunFolderError

STEPS = "train/steps"
ROUNDING = 1e-4  # how far, relatively, a reported metric may be from what its rows give
Array = npt.NDArray[np.float64]


class Scores:
    """What the counted runs scored on one metric, by arm and seed.

    Every arm is scored once on the rows that all runs share, so that comparing all pairs costs next to nothing.

    Attributes:
        values: the reported metric, by (arm, seed).
        compared: the same as the rows give it, for the runs that can be compared.
        seeded: whether a seed can change any of the runs: one that trained, or began with random weights.
        has_rows: whether held-out rows stand behind the metric; if not, arms are compared by seed alone.
        notes: one sentence for each run whose rows cannot be used or do not give what it reported.
    """

    def __init__(self, counted: pd.DataFrame, metric: str, bootstrap_seed: int = 0, draws: int = DRAWS) -> None:
        self._bootstrap_seed, self._draws = bootstrap_seed, draws
        keys = [(str(arm), int(seed)) for arm, seed in zip(counted["arm"], counted["seed"], strict=True)]
        self.values = dict(zip(keys, counted[metric].astype(float) if keys else [], strict=True))
        self.notes: list[str] = []
        self.compared: dict[tuple[str, int], float] = {}
        self._rows: dict[tuple[str, int], RowRatios] = {}
        self.seeded = STEPS not in counted or bool(((counted[STEPS] != 0) | _drawn(counted)).any())
        self._counted_in = counted_in(metric)
        if describe(metric).numerator is not None:
            for key, run_id, folder in zip(keys, counted["run_id"], counted["folder"], strict=True):
                self._read(key, run_id, Path(folder), metric)
        self.has_rows = bool(self._rows)
        if not self.has_rows:
            self.compared = dict(self.values)
            if self.notes:  # of every run, such as those that W&B keeps
                self.notes = [f"No run has held-out rows behind {metric} here, so arms are compared by seed alone."]
        self._finished, self._seeds = _by_arm(self.values), _by_arm(self.compared)
        self._indexes = {key: rows.index for key, rows in self._rows.items()}
        first = next(iter(self._indexes.values()), None)
        same = all(index is first or index.equals(first) for index in self._indexes.values())
        self._rows_of_all = first if same else None
        self._scored: dict[tuple[str, tuple[int, ...]], Scored] = {}

    def _read(self, key: tuple[str, int], run_id: str, folder: Path, metric: str) -> None:
        try:
            ratios = row_ratios(read_row_columns(folder), metric, self._counted_in)
        except RunFolderError as error:
            self.notes.append(f"Run {run_id} is left out of the comparisons, which go row by row: {error}.")
            return
        if ratios is None:
            self.notes.append(f"Run {run_id} is left out of the comparisons: none of its rows defines {metric}.")
            return
        self._rows[key] = ratios
        self.compared[key] = from_rows = ratios.value
        if abs(from_rows - self.values[key]) > ROUNDING * abs(self.values[key]) + 1e-9:
            self.notes.append(
                f"Run {run_id} reports {metric} {self.values[key]:.6g}, but its rows give {from_rows:.6g}: "
                "the table shows the first, the comparisons use the rows."
            )

    def seeds(self, arm: str) -> tuple[int, ...]:
        """Return the seeds that the arm can be compared on."""
        return self._seeds.get(arm, ())

    def finished_seeds(self, arm: str) -> tuple[int, ...]:
        """Return the seeds of the arm's runs, also of those whose rows cannot be used."""
        return self._finished.get(arm, ())

    def scored(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Scored]:
        """Score the arms on the rows that each of their runs has; an empty list where there is no such row."""
        rows = self.shared_rows(arms, seeds)
        return [self._score(arm, tuple(seeds), rows) for arm in arms] if len(rows) else []

    def shared_rows(self, arms: Sequence[str], seeds: Sequence[int]) -> pd.MultiIndex:
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
        return sorted(set(self.seeds(first)) & set(self.seeds(second)))

    def other_counts(self, first: str, second: str) -> frozenset[str]:
        """Return which counts of the same rows' targets differ between two arms, though their metric is per count.

        Tokens differ with the tokenizer; tokens and bytes differ where targets were cut at another length.
        """
        if not (self._rows and self.seeds(first) and self.seeds(second)):
            return frozenset()
        one, other = (self._rows[arm, self.seeds(arm)[0]] for arm in (first, second))
        rows = one.index if one.index is other.index else one.index.intersection(other.index)
        differ = (one.at(rows).counts != other.at(rows).counts).any(axis=0)
        return frozenset(name for name, others in zip(self._counted_in, differ, strict=True) if others)

    def _score(self, arm: str, seeds: tuple[int, ...], rows: pd.MultiIndex) -> Scored:
        if (arm, seeds) in self._scored:  # filled only where all runs share their rows
            return self._scored[arm, seeds]
        runs = [self._rows[arm, seed].at(rows) for seed in seeds]
        numerator, denominator = np.stack([(run.numerator, run.denominator) for run in runs], axis=1)
        set_of = runs[0].set_of
        blocks = [set_of == number for number in range(set_of.max() + 1)]
        ratios = [Ratios(numerator[:, block], denominator[:, block]) for block in blocks]
        scored = score(ratios, self._bootstrap_seed, self._draws)
        if rows is self._rows_of_all:
            self._scored[arm, seeds] = scored
        return scored


def _by_arm(values: Mapping[tuple[str, int], float]) -> dict[str, tuple[int, ...]]:
    seeds: dict[str, list[int]] = {}
    for arm, seed in sorted(values):
        seeds.setdefault(arm, []).append(seed)
    return {arm: tuple(of_arm) for arm, of_arm in seeds.items()}


def _drawn(counted: pd.DataFrame) -> "pd.Series[bool]":
    """Say of each run whether its seed drew weights: all of them, or those of a classifier's new head."""
    drawn = pd.Series(False, index=counted.index)
    for column, value in (("config.model.source", "random"), ("config.model.task", "classification")):
        if column in counted:
            drawn |= counted[column] == value
    return drawn
