"""How far the annotators are, and how far they agree, for who runs the study."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median

import numpy as np

from qlora_lab.annotation.store import Store, Vote
from qlora_lab.ratings.agreement import cohen_kappa, krippendorff_alpha
from qlora_lab.ratings.judgments import FIRST, TIE, Judgment

Key = tuple[str, tuple[str, str]]  # a question and two systems
CLASSES = ("one", "other", TIE)


def status(store: Store) -> str:
    """Lay out progress, habits and agreement for a terminal."""
    votes, annotators = store.votes(), store.annotators()
    width = max([9, *(len(annotator.name) for annotator in annotators)])
    lines = [f"{'annotator':{width}}  judged        seconds  first   ties  same when repeated"]
    for annotator in annotators:
        progress = store.progress(annotator)
        own = [vote for vote in votes if vote.judgment.judge == annotator.judge]
        seconds = f"{median(vote.milliseconds for vote in own) / 1000:.1f}" if own else "-"
        lines.append(
            f"{annotator.name:{width}}  {progress.judged:5} of {progress.total:<5} {seconds:>6}  "
            f"{share(own, FIRST):>5}  {share(own, TIE):>5}  {self_agreement(own, annotator.judge)}"
        )
    lines += ["", "seconds: median time a pair was in view; first: how often the answer shown first won"]
    once = {annotator.name: classes(votes, annotator.judge, repeat=False) for annotator in annotators}
    lines += ["", *agreement(once)] if len(annotators) > 1 else []
    return "\n".join(lines)


def agreement(once: dict[str, dict[Key, str]]) -> list[str]:
    """Say how far each two annotators agree, and all of them."""
    lines = [
        f"{one} and {other}: {words(*paired(once[one], once[other]))}" for one, other in combinations(sorted(once), 2)
    ]
    items = sorted({key for its in once.values() for key in its})
    table = np.array(
        [[CLASSES.index(its[key]) if key in its else np.nan for key in items] for its in once.values()], dtype=float
    )
    if (np.isfinite(table).sum(0) >= 2).any():
        lines.append(f"all: Krippendorff's alpha {krippendorff_alpha(table):.2f}")
    return lines


def self_agreement(votes: Sequence[Vote], judge: str) -> str:
    """Say how far an annotator agrees with the same annotator, half a sequence later."""
    once, again = (classes(votes, judge, repeat=repeat) for repeat in (False, True))
    return words(*paired(once, again)) if again else "-"


def classes(votes: Sequence[Vote], judge: str, *, repeat: bool) -> dict[Key, str]:
    """Return which system an annotator prefers, by its place in the alphabet, whatever the order shown."""
    return {
        (vote.judgment.question, vote.judgment.pair): preferred(vote.judgment)
        for vote in votes
        if vote.judgment.judge == judge and vote.repeat == repeat
    }


def preferred(judgment: Judgment) -> str:
    return TIE if judgment.winner is None else CLASSES[judgment.pair.index(judgment.winner)]


def paired(one: dict[Key, str], other: dict[Key, str]) -> tuple[list[str], list[str]]:
    both = sorted(one.keys() & other.keys())
    return [one[key] for key in both], [other[key] for key in both]


def words(one: list[str], other: list[str]) -> str:
    if not one:
        return "no pair judged by both yet"
    same = sum(a == b for a, b in zip(one, other, strict=True))
    return f"{same} of {len(one)} the same ({same / len(one):.0%}), Cohen's kappa {cohen_kappa(one, other):.2f}"


def share(votes: Sequence[Vote], verdict: str) -> str:
    return f"{np.mean([vote.judgment.verdict == verdict for vote in votes]):.0%}" if votes else "-"
