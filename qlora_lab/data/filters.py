"""Which rows of a pool are trained on: language, lengths, duplicates, words of the evaluation sets."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from qlora_lab.config.schema import HELD_OUT, FilterConfig
from qlora_lab.data.decontamination import EvaluationText, Texts
from qlora_lab.data.near_duplicates import duplicates_of, signatures
from qlora_lab.data.removed import SHOWN_CHARACTERS, Removed
from qlora_lab.data.rows import Row
from qlora_lab.errors import DataError

ROWS_AT_ONCE = 2000
OVERLAP, LANGUAGE, LENGTH, TRUNCATED, DUPLICATE, NEAR_DUPLICATE, QUOTES = (
    "asks what an evaluation row asks",
    "other language",
    "length",
    "over a token limit",
    "duplicate",
    "near-duplicate",
    "words of an evaluation row",
)


def list_overlap(
    rows: Sequence[Row], overlapping: Mapping[str, np.ndarray], held_out: Mapping[str, Sequence[Row]], removed: Removed
) -> None:
    """List the rows that ask what an evaluation row asks, less the evaluation rows themselves."""
    for name, numbers in overlapping.items():
        themselves = {row.key for row in held_out[name]} if name == HELD_OUT else set()
        for number in numbers.tolist():
            row = rows[number]
            if row.key in themselves:
                themselves.remove(row.key)
            else:
                removed.add(row, OVERLAP, f"set '{name}'")


def filter_rows(
    rows: Sequence[Row],
    candidates: Iterable[int],
    config: FilterConfig,
    held_out: Mapping[str, Sequence[Row]],
    removed: Removed,
    others: Texts | None = None,
) -> list[int]:
    """Return the numbers of the rows that stay, in the order of `candidates`; of duplicates the first stays.

    Token limits come later, with the tokens (`pool.write_tokens`).

    Args:
        rows: the pool.
        candidates: numbers of the rows to choose from.
        config: what to leave out.
        held_out: evaluation rows by the name of their set.
        removed: gets every row that does not stay.
        others: texts of benchmarks and further sets, which no row may quote either.

    Raises:
        DataError: a row does not say its language and none may be guessed, or nothing can guess it.
    """
    checks = row_checks(config, held_out, others)
    if not checks and config.duplicates == "keep":
        return list(candidates)  # no need to read them
    seen: dict[str, None] = {}
    kept: list[int] = []
    signed: list[np.ndarray] = []
    waiting: list[str] = []  # texts that have no signature yet
    for number in candidates:
        row = rows[number]
        found = next((found for check in checks if (found := check(row)) is not None), None)
        if found is None and config.duplicates != "keep" and row.key in seen:
            found = DUPLICATE, "an equal row stays"
        if found is not None:
            removed.add(row, *found)
            continue
        kept.append(number)
        if config.duplicates != "keep":
            seen[row.key] = None
        if config.duplicates == "near":
            waiting.append(f"{row.source} {row.target}")
            if len(waiting) == ROWS_AT_ONCE:
                signed.append(signatures(waiting))
                waiting = []
    if config.duplicates != "near" or not kept:
        return kept
    signed += [signatures(waiting)] if waiting else []
    return without_near_duplicates(rows, kept, np.concatenate(signed), config.near_duplicate_similarity, removed)


def without_near_duplicates(
    rows: Sequence[Row], kept: Sequence[int], signed: np.ndarray, similarity: float, removed: Removed
) -> list[int]:
    first = duplicates_of(signed, similarity).tolist()
    for number, other in zip(kept, first, strict=True):
        if other >= 0:
            removed.add(rows[number], NEAR_DUPLICATE, f"row {rows[kept[other]].key} stays")
    return [number for number, other in zip(kept, first, strict=True) if other < 0]


Check = Callable[[Row], tuple[str, str] | None]


def row_checks(config: FilterConfig, held_out: Mapping[str, Sequence[Row]], others: Texts | None) -> list[Check]:
    """Return what is asked of each row by itself: its reason to go and what makes it one, None if it may stay."""
    checks: list[Check] = []
    if config.languages:
        language_of = detector() if config.detect_language else declared_language
        allowed = set(config.languages)

        def other_language(row: Row) -> tuple[str, str] | None:
            language = row.language or language_of(row)
            return None if language in allowed else (LANGUAGE, language)

        checks.append(other_language)
    limits = {
        "source": (config.min_source_characters, config.max_source_characters),
        "target": (config.min_target_characters, config.max_target_characters),
    }
    if any(least or most is not None for least, most in limits.values()):

        def other_length(row: Row) -> tuple[str, str] | None:
            for name, (least, most) in limits.items():
                length = len(getattr(row, name))
                if length < least or (most is not None and length > most):
                    return LENGTH, f"{name} of {length} characters"
            return None

        checks.append(other_length)
    if config.contamination_words is not None:
        evaluation = EvaluationText(held_out, config.contamination_words, others)

        def quotes(row: Row) -> tuple[str, str] | None:
            name = evaluation.set_quoted_by(row)
            return None if name is None else (QUOTES, f"set '{name}'")

        checks.append(quotes)
    return checks


def declared_language(row: Row) -> str:
    raise DataError(
        f"data.filter.languages needs rows that say their language in a column 'lang' or 'language'; the row "
        f"{(row.source or row.target)[:SHOWN_CHARACTERS]!r} does not; set data.filter.detect_language=true to guess it"
    )


def detector() -> Callable[[Row], str]:
    """Return what guesses a row's language, as an ISO 639-1 code, from its text.

    Raises:
        DataError: py3langid is not installed.
    """
    if importlib.util.find_spec("py3langid") is None:
        raise DataError(
            "data.filter.detect_language=true needs the package py3langid, which holds its model itself; install it "
            "with `pip install py3langid`, or keep to sets whose rows say their language"
        )
    import py3langid  # 100 MB of memory that only this pays

    return lambda row: str(py3langid.classify(f"{row.source} {row.target}")[0])
