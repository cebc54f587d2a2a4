"""Evaluation rows, chosen and kept out of training by content, never by position."""

import hashlib
import random
from collections.abc import Mapping, Sequence

from qlora_lab.data.rows import Row
from qlora_lab.errors import DataError


def choose_evaluation_rows(pool: Sequence[Row], count: int, seed: int, set_name: str) -> list[Row]:
    """Choose rows with different questions, by the order of a keyed hash of the questions.

    The choice depends on the rows and `seed` alone: not on their order, and not on the run's seed, its
    number of training rows or its share of wrong answers. Every arm of a study holds out the same rows,
    and sets with the same questions but other answers or another template hold out the same questions.

    Args:
        pool: rows of the evaluation source.
        count: rows to choose.
        seed: of the evaluation, not of the run.
        set_name: for the error.

    Raises:
        DataError: the pool has fewer than `count` different questions.
    """

    def place(row: Row) -> tuple[str, str]:  # the second decides between answers to one question
        return keyed_hash(row.source_key, seed), keyed_hash(row.key, seed)

    chosen: dict[str, Row] = {}
    for row in sorted(pool, key=place):
        if len(chosen) == count:
            break
        chosen.setdefault(row.source_key, row)
    if len(chosen) < count:
        raise DataError(
            f"evaluation.rows asks for {count} rows but the source of set '{set_name}' has {len(chosen)} "
            f"different questions ({len(pool)} rows); try a smaller evaluation.rows"
        )
    return list(chosen.values())


def keyed_hash(text: str, seed: int) -> str:
    return hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=16).hexdigest()


def remove_overlap(rows: Sequence[Row], held_out: Mapping[str, Sequence[Row]]) -> tuple[list[Row], dict[str, int]]:
    """Leave out training rows that ask what an evaluation row asks.

    Returns:
        The rows that stay, and the number removed by the first set each was found in.
    """
    set_of_question = question_sets(held_out)
    removed = dict.fromkeys(held_out, 0)
    kept: list[Row] = []
    for row in rows:
        found_in = set_of_question.get(row.source_key)
        if found_in is None:
            kept.append(row)
        else:
            removed[found_in] += 1
    return kept, removed


def question_sets(held_out: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Map every question of the evaluation sets to the first set that asks it."""
    sets: dict[str, str] = {}
    for name, rows in held_out.items():
        for row in rows:
            sets.setdefault(row.source_key, name)
    return sets


def check_disjoint(rows: Sequence[Row], held_out: Mapping[str, Sequence[Row]]) -> None:
    """Refuse training rows that ask what an evaluation row asks, whatever way they came here.

    Raises:
        DataError: at least one does.
    """
    set_of_question = question_sets(held_out)
    shared = [row for row in rows if row.source_key in set_of_question]
    if shared:
        raise DataError(
            f"{len(shared)} training rows ask what evaluation rows ask, the first {shared[0].source!r}, also in "
            f"set '{set_of_question[shared[0].source_key]}'; this is an error of qlora_lab, please report it"
        )


def draw_training_rows(pool: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """Draw training rows at random; None takes all.

    For one seed and pool a smaller draw is the beginning of a larger one, whatever the order of the pool:
    arms that differ in size share rows.

    Raises:
        DataError: the pool has fewer rows than asked for.
    """
    if count is not None and count > len(pool):
        raise DataError(
            f"data.rows asks for {count} rows but {len(pool)} are left to train on after holding out the "
            f"evaluation rows; try data.rows={len(pool)}, or data.rows=null for all"
        )
    rows = sorted(pool, key=lambda row: (row.key, row.source, row.target))
    random.Random(f"training rows {seed}").shuffle(rows)
    return rows[:count]
