"""What an arm was really trained on and judged by, where it is not what its configuration suggests."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from qlora_lab.sweep.listing import listed

ROWS_SEEN = "train/rows_seen"
FEW = 4  # arms named one by one
HELD_OUT = "data.held_out."


def data_notes(runs: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    """Return one sentence for each thing that happened to the data, naming the arms it happened to.

    Args:
        runs: the counted runs, as `load_runs` gives them, with their `arm`.
        arms: in the order in which they are named.
    """
    arms_of: dict[str, list[str]] = {}
    grouped = dict(iter(runs.groupby("arm")))
    with_runs = [arm for arm in arms if arm in grouped]
    for arm in with_runs:
        for text in _of_arm(grouped[arm]):
            arms_of.setdefault(text, []).append(arm)
    return [f"{_names(named, len(with_runs))}: {text}." for text, named in arms_of.items()]


def _of_arm(runs: pd.DataFrame) -> Iterator[str]:
    seen, rows = _counts(runs, ROWS_SEEN), _counts(runs, "data.train.rows")
    if seen.size and rows.size and seen.max() < rows.max():
        yield f"trained on {_range(seen)} of the {_range(rows)} training rows; the steps end before the others come"
    cut = _counts(runs, "data.train.targets_truncated")
    if cut.any():
        yield f"{_range(cut)} of {_range(rows)} training targets were cut at data.max_target_tokens"
    impossible = _counts(runs, "data.wrong_answers_impossible")
    if impossible.any():
        wrong = _counts(runs, "data.wrong_answers")
        yield (
            f"{_range(impossible)} wrong answers that were asked for could not be put in (no other answer to "
            f"take); {_range(wrong)} were"
        )
    for column in sorted(c for c in runs.columns if c.startswith(HELD_OUT) and c.endswith(".targets_truncated")):
        cut = _counts(runs, column)
        if cut.any():
            name = column.removeprefix(HELD_OUT).removesuffix(".targets_truncated")
            of_set = "held-out targets" + ("" if name == "held_out" else f" of {name}")
            held_out = _counts(runs, f"{HELD_OUT}{name}.rows")
            yield f"{_range(cut)} of {_range(held_out)} {of_set} were cut, so only their beginnings are scored"


def _counts(runs: pd.DataFrame, column: str) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return what each run reports; older runs report less."""
    values = runs[column].to_numpy(dtype=float) if column in runs else np.empty(0)
    return values[np.isfinite(values)]


def _range(counts: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> str:
    if not counts.size:
        return "?"
    low, high = f"{counts.min():,.0f}", f"{counts.max():,.0f}"
    return low if low == high else f"{low} to {high}"


def _names(arms: list[str], of: int) -> str:
    if len(arms) == of and of > 1:
        return "All arms"
    return ", ".join(listed(arms, FEW, "more arms"))
