"""What a judge's verdicts depend on besides the answers: the order shown; and who wins how often."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_lab.ratings.judgments import VERDICTS, Judgment
from qlora_lab.ratings.matches import Floats, Matches


@dataclass(frozen=True)
class OrderBias:
    """Shares of all verdicts by what they say of the order shown, and what swapping the order does.

    `swapped_pairs` is the number of questions and pairs that a judge saw in both orders; `consistent` and `flipped` are
    the shares of them with the same winner (or a tie) twice, and with the winner changed. The rest are ties in one
    order only.
    """

    first: float
    second: float
    tie: float
    unread: int
    swapped_pairs: int
    consistent: float
    flipped: float


def order_bias(judgments: Sequence[Judgment]) -> OrderBias:
    """Describe one judge, or several: a pair counts as swapped where one of them saw both orders.

    Without verdicts, or without swapped pairs, the shares of them are NaN.
    """
    read = [judgment for judgment in judgments if judgment.verdict is not None]
    first, second, tie = (
        sum(judgment.verdict == verdict for judgment in read) / (len(read) or float("nan")) for verdict in VERDICTS
    )
    winners: dict[tuple[str, str, str, str], dict[str, str | None]] = {}
    for judgment in read:
        winners.setdefault((judgment.judge, judgment.question, *judgment.pair), {})[judgment.first] = judgment.winner
    both = [tuple(shown.values()) for shown in winners.values() if len(shown) == 2]
    consistent = sum(one == other for one, other in both)
    flipped = sum(one != other and None not in (one, other) for one, other in both)
    pairs = len(both) or float("nan")
    return OrderBias(
        first,
        second,
        tie,
        unread=len(judgments) - len(read),
        swapped_pairs=len(both),
        consistent=consistent / pairs,
        flipped=flipped / pairs,
    )


def win_rates(matches: Matches) -> Floats:
    """Return what share of their matches row systems won against column systems, (S, S); ties are half; NaN: none."""
    counts, scores = (cells.sum(0) for cells in matches.cells())
    played = counts + counts.T
    with np.errstate(invalid="ignore"):
        rates: Floats = np.where(played > 0, (scores + (counts - scores).T) / played, np.nan)
    return rates
