"""Wrong answers that look right: a row gets the answer of another row of its family."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora_lab.data.rows import Row, normalise
from qlora_lab.errors import DataError


@dataclass(frozen=True)
class NoisyRows:
    rows: list[Row]
    wrong: int  # rows that now have a wrong answer
    impossible: int  # rows that should have one, but their family knows no other answer


class AnswersOfFamily:
    """The answers of one family's rows, sorted so that equal answers stand together."""

    def __init__(self, targets: Sequence[str]) -> None:
        self.pairs = sorted((normalise(target), target) for target in targets)
        self.first: dict[str, int] = {}
        self.count: dict[str, int] = defaultdict(int)
        for index, (name, _) in enumerate(self.pairs):
            self.first.setdefault(name, index)
            self.count[name] += 1

    def has_other_than(self, target: str) -> bool:
        return self.count[normalise(target)] < len(self.pairs)

    def draw_other_than(self, target: str, rng: random.Random) -> str:
        """Draw the answer of a row, among those rows whose answer differs, each as likely."""
        name = normalise(target)
        index = rng.randrange(len(self.pairs) - self.count[name])
        # step over the block of answers equal to the right one
        return self.pairs[index if index < self.first[name] else index + self.count[name]][1]


def put_in_wrong_answers(rows: Sequence[Row], share: float, seed: int) -> NoisyRows:
    """Give exactly `round(share * len(rows))` rows the answer of another row of the same family.

    Every answer put in differs from the right one (as normalised text). Rows whose family has one answer
    only, and texts without a source, which no answer is wrong for, cannot take part; where that leaves too
    few rows, the shortfall is counted as impossible.

    Args:
        rows: training rows; evaluation rows must not be among them.
        share: from 0 to 1.
        seed: draws the rows and their answers.

    Raises:
        DataError: wrong answers are asked for and not one row can take one.
    """
    by_family: dict[str | None, list[str]] = defaultdict(list)
    for row in rows:
        by_family[row.family].append(row.target)
    answers = {family: AnswersOfFamily(targets) for family, targets in by_family.items()}
    wanted = round(share * len(rows))
    able = [
        index for index, row in enumerate(rows) if row.source.strip() and answers[row.family].has_other_than(row.target)
    ]
    if wanted and not able:
        raise DataError(
            f"data.wrong_answer_share is {share}, but no row can take a wrong answer: they have no source, or "
            "each family has one answer only; try data.wrong_answer_share=0, or another data.source.template"
        )
    rng = random.Random(f"wrong answers {seed}")
    chosen = sorted(rng.sample(able, min(wanted, len(able))))
    noisy = list(rows)
    for index in chosen:
        row = rows[index]
        noisy[index] = replace(row, target=answers[row.family].draw_other_than(row.target, rng))
    return NoisyRows(noisy, wrong=len(chosen), impossible=wanted - len(chosen))
