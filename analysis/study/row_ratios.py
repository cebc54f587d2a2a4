"""What each held-out row of a run adds to a metric."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.study.metrics import describe

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class RowRatios:
    """What each row adds to a metric: set by set this is the sum of `numerator` over that of `denominator`, and then
    the plain mean over sets.

    Attributes:
        index: the (set, key) of each row, sorted; each once. Runs of the same rows share it, which makes them fast.
        set_of: (rows,) the number of each row's set.
        numerator, denominator: (rows,)
        counts: (rows, columns) what was asked for beside them.
    """

    index: pd.MultiIndex
    set_of: Numbers
    numerator: Array
    denominator: Array
    counts: Array

    @property
    def value(self) -> float:
        """The metric."""
        return float(np.mean(np.bincount(self.set_of, self.numerator) / np.bincount(self.set_of, self.denominator)))

    def at(self, rows: pd.MultiIndex) -> "RowRatios":
        """Return these rows alone, in their order; all of them must be here."""
        if rows is self.index or self.index.equals(rows):
            return self
        places = self.index.get_indexer(rows)
        set_of, _ = pd.factorize(self.set_of[places])
        return RowRatios(rows, set_of, self.numerator[places], self.denominator[places], self.counts[places])


def row_ratios(rows: Mapping[str, npt.NDArray[Any]], name: str, counts: Sequence[str] = ()) -> RowRatios | None:
    """Return what each held-out row adds to a metric; None where no row does.

    Args:
        rows: from `read_row_columns`.
        name: `eval/METRIC` for all rows, `eval/SET/METRIC` for the rows of one set.
        counts: further columns of `rows`, which the result keeps.

    Returns:
        Rows with the same set and content count together, and rows without a finite number are left out.
    """
    metric = describe(name)
    if metric.numerator is None or metric.denominator is None:
        return None
    numerator = rows[metric.numerator] * metric.row_scale
    denominator = rows[metric.denominator] if metric.denominator in rows else np.ones(len(numerator))
    chosen = np.isfinite(numerator + denominator)
    parts = name.split("/")
    if len(parts) > 2:  # of no row where it is of a benchmark, and not of a held-out set
        chosen &= rows["set"] == "/".join(parts[1:-1])
    if not chosen.any():
        return None
    index, place, set_of = _places(*(tuple(map(str, rows[name][chosen])) for name in ("set", "key")))

    def summed(values: Array) -> Array:
        return np.bincount(place, values[chosen], minlength=len(index)).astype(float)

    together = [summed(rows[count]) for count in counts]
    return RowRatios(
        index,
        set_of,
        summed(numerator),
        summed(denominator),
        np.stack(together, axis=1) if together else np.empty((len(index), 0)),
    )


@functools.lru_cache(maxsize=32)
def _places(sets: tuple[str, ...], keys: tuple[str, ...]) -> tuple[pd.MultiIndex, Numbers, Numbers]:
    """Return the index of rows, the place of each row in it, and the number of the set of each place."""
    pairs = sorted(set(zip(sets, keys, strict=True)))
    number = {pair: place for place, pair in enumerate(pairs)}
    place = np.array([number[pair] for pair in zip(sets, keys, strict=True)])
    index = pd.MultiIndex.from_tuples(pairs, names=["set", "key"])
    set_of, _ = pd.factorize(np.array([name for name, _ in pairs], dtype=object))
    return index, place, set_of
