"""What a reader must know of pairs of arms: which seeds and rows they share, and which cannot be compared."""

from collections.abc import Sequence

from analysis.statistics.verdicts import Verdict
from analysis.study.comparison import MOST_ARMS_PAIRED, Comparison
from qlora_lab.sweep.listing import listed

MOST_NOTES = 5  # of one kind


def pair_notes(metric: str, arms: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """Return one sentence for each pair of arms that is not compared on everything both have, and why."""
    by_kind = (
        [_note_on_seeds(pair) for pair in comparisons if pair.seeds and pair.seeds_left_out],
        [_note_on_rows(pair) for pair in comparisons if pair.rows_left_out],
        [_note_on_counts(metric, pair) for pair in comparisons if pair.refused not in (None, Verdict.OTHER_ROWS)],
    )
    notes = [note for kind in by_kind for note in listed(kind, MOST_NOTES, "more such pairs.")]
    if len(arms) > MOST_ARMS_PAIRED:
        notes.append(
            f"Of {len(arms)} arms each is compared with the best only, {arms[0]} (all pairs are compared up to "
            f"{MOST_ARMS_PAIRED} arms); the correction for several comparisons counts every pair all the same."
        )
    return notes


def _note_on_seeds(pair: Comparison) -> str:
    both = ", ".join(map(str, pair.seeds))
    finished = " and over ".join(", ".join(map(str, seeds)) for seeds in pair.finished)
    return (
        f"{pair.first} and {pair.second} are compared on {'seed' if len(pair.seeds) == 1 else 'seeds'} {both} only; "
        f"their means in the table are over {finished}."
    )


def _note_on_rows(pair: Comparison) -> str:
    return (
        f"{pair.first} and {pair.second} were not scored on the same rows; they are compared on the "
        f"{pair.difference.n_rows if pair.difference else 0} rows that all their runs have."
    )


def _note_on_counts(metric: str, pair: Comparison) -> str:
    what = f"{pair.first} and {pair.second} cannot be compared in {metric}"
    if pair.refused is Verdict.OTHER_TARGETS:
        return (
            f"{what}: the same held-out rows have targets of other lengths, so they were cut at different lengths; "
            "give both arms the same limits of evaluation and the same tokenizer."
        )
    return (
        f"{what}: the same targets have another number of tokens, as with another tokenizer; "
        "study.metric=eval/bits_per_byte compares them."
    )
