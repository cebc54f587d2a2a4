"""Evaluation rows, chosen and kept out of training by content, never by position."""

import hashlib
import random
from collections.abc import Mapping, Sequence

import numpy as np

from qlora_lab.config.schema import OWN_PART
from qlora_lab.data.row_file import Keys, hex_key, keys_of
from qlora_lab.data.rows import Row
from qlora_lab.errors import DataError

HASH_BYTES = 16


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
    keys, source_keys = keys_of(pool)
    # the second decides between answers to one question
    chosen: dict[int, int] = {}
    for index in np.lexsort((_places(keys, seed), _places(source_keys, seed))):
        if len(chosen) == count:
            break
        chosen.setdefault(int(source_keys[index]), int(index))
    if len(chosen) < count:
        raise DataError(
            f"evaluation.rows asks for {count} rows but the source of set '{set_name}' has {len(chosen)} "
            f"different questions ({len(pool)} rows); try a smaller evaluation.rows"
        )
    return [pool[index] for index in chosen.values()]


def _places(keys: Keys, seed: int) -> np.ndarray:
    """Return a keyed hash of each key, by which they are put in order: its bytes alone, for sets of any size."""
    hashes = (keyed_hash(hex_key(int(key)), seed) for key in keys)
    return np.fromiter(hashes, dtype=f"S{HASH_BYTES}", count=len(keys))


def keyed_hash(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), key=str(seed).encode(), digest_size=HASH_BYTES).digest()


def overlap(source_keys: Keys, held_out: Mapping[str, Sequence[Row]]) -> dict[str, np.ndarray]:
    """Find the rows that ask what an evaluation row asks.

    Args:
        source_keys: `Row.source_key` of each row, as numbers.

    Returns:
        Their numbers, by the first set that asks the same.
    """
    set_of_question = question_sets(held_out)
    questions = np.array([int(key, 16) for key in set_of_question], dtype=np.uint64)
    found: dict[str, list[int]] = {name: [] for name in held_out}
    for index in np.flatnonzero(np.isin(source_keys, questions)).tolist():
        found[set_of_question[hex_key(int(source_keys[index]))]].append(index)
    return {name: np.array(indices, dtype=np.int64) for name, indices in found.items()}


def question_sets(held_out: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Map every question of the evaluation sets to the first set that asks it."""
    sets: dict[str, str] = {}
    for name, rows in held_out.items():
        for row in rows:
            sets.setdefault(row.source_key, name)
    return sets


def check_disjoint(source_keys: Keys, held_out: Mapping[str, Sequence[Row]]) -> None:
    """Refuse training rows that ask what an evaluation row asks, whatever way they came here.

    Raises:
        DataError: at least one does.
    """
    shared = {name: len(indices) for name, indices in overlap(source_keys, held_out).items() if len(indices)}
    if shared:
        name, count = next(iter(shared.items()))
        raise DataError(
            f"{count} training rows ask what evaluation rows of set '{name}' ask; this is an error of qlora_lab, "
            "please report it"
        )


def content_order(rows: Sequence[Row], numbers: Sequence[int] | np.ndarray, keys: Keys) -> list[int]:
    """Sort rows by their content, whatever order they came in.

    Args:
        numbers: of the rows to sort.
        keys: `Row.key` of every row, as numbers.
    """
    chosen = np.asarray(numbers, dtype=np.int64)
    ordered: list[int] = chosen[np.argsort(keys[chosen], kind="stable")].tolist()
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or keys[ordered[end]] != keys[ordered[start]]:
            if end - start > 1:  # equal once normalised: the texts themselves decide
                ordered[start:end] = sorted(ordered[start:end], key=lambda at: (rows[at].source, rows[at].target))
            start = end
    return ordered


def draw(available: Sequence[int], count: int, seed: int, part: str) -> list[int]:
    """Draw rows at random, given in the order of their content.

    For one seed and pool a smaller draw is the beginning of a larger one: arms that differ in size share rows.

    Args:
        part: of the mix; each draws for itself.
    """
    numbers = list(available)
    random.Random(f"training rows {seed}{'' if part == OWN_PART else f' {part}'}").shuffle(numbers)
    return numbers[:count]
