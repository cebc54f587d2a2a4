import re
from collections import Counter
from collections.abc import Callable

import pytest

from qlora_lab.data.procedural import FAMILIES, WORDS, procedural_rows
from qlora_lab.data.rows import content_key
from qlora_lab.errors import ConfigError, DataError

ORDINAL = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4}


def solve_sum(prompt: str) -> str:
    return str(sum(map(int, re.findall(r"\d+", prompt))))


def solve_sort(prompt: str) -> str:
    remaining, ordered = prompt.split(": ")[1].split(), []
    while remaining:
        ordered.append(min(remaining))
        remaining.remove(ordered[-1])
    return " ".join(ordered)


def solve_largest(prompt: str) -> str:
    return max(re.findall(r"\d+", prompt), key=int)


def solve_reverse(prompt: str) -> str:
    return " ".join(prompt.split(": ")[1].split()[::-1])


def solve_nth(prompt: str) -> str:
    asked, words = re.fullmatch(r"What is the (\w+) word of this list: (.*)", prompt).groups()  # type: ignore[union-attr]
    return words.split()[ORDINAL[asked]]


def solve_count(prompt: str) -> str:
    return str(prompt.split(": ")[1].count(" ") + 1)


SOLVERS: dict[str, Callable[[str], str]] = {
    "add_numbers": solve_sum,
    "sort_words": solve_sort,
    "largest_number": solve_largest,
    "reverse_list": solve_reverse,
    "nth_word": solve_nth,
    "count_words": solve_count,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_right(family: str) -> None:
    rows = procedural_rows(500, seed=3, role="training", families=[family])
    wrong = [row for row in rows if SOLVERS[family](row.source) != row.target]
    assert wrong == []
    assert all("\n" not in row.source and len(row.target.split()) <= 4 for row in rows)


def test_words_are_our_plain_list() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 150
    assert all(re.fullmatch("[a-z]{3,6}", word) for word in WORDS)


def test_families_are_mixed_evenly() -> None:
    counts = Counter(row.family for row in procedural_rows(128, seed=0, role="training"))
    assert set(counts) == set(FAMILIES)
    assert set(counts.values()) == {21, 22}  # 128 = 6 * 21 + 2


def test_rows_depend_on_seed_and_role_alone() -> None:
    rows = procedural_rows(60, seed=5, role="training")
    assert rows == procedural_rows(60, seed=5, role="training")
    assert rows == procedural_rows(120, seed=5, role="training")[:60]
    assert rows != procedural_rows(60, seed=6, role="training")
    assert rows != procedural_rows(60, seed=5, role="evaluation")


def test_rows_are_those_of_earlier_versions() -> None:
    """A change here silently changes every procedural run of the same id; give the change a new name instead."""
    rows = procedural_rows(600, seed=1, role="training")
    assert content_key(*(f"{row.source} {row.target}" for row in rows)) == "c8916e7f57d96d2a"


def test_excluded_tasks_are_not_made() -> None:
    evaluation = procedural_rows(3000, seed=0, role="evaluation", families=["add_numbers"], distinct=True)
    questions = {row.source_key for row in evaluation}
    assert len(questions) == 3000
    training = procedural_rows(3000, seed=0, role="training", families=["add_numbers"], exclude=questions)
    assert not questions & {row.source_key for row in training}


def test_family_that_is_used_up_is_said() -> None:
    with pytest.raises(DataError, match="'add_numbers' has no more different tasks after"):
        procedural_rows(8101, seed=0, role="evaluation", families=["add_numbers"], distinct=True)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.source\.families must be one of .* did you mean 'sort_words'"):
        procedural_rows(1, seed=0, role="training", families=["sort_word"])
