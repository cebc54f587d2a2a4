import random

import numpy as np
import pytest

from qlora_lab.config.schema import OWN_PART
from qlora_lab.data.held_out import check_disjoint, choose_evaluation_rows, content_order, draw, overlap
from qlora_lab.data.row_file import keys_of
from qlora_lab.data.rows import Row
from qlora_lab.errors import DataError

POOL = [Row(f"question {index}", f"answer {index}") for index in range(100)]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, len(rows))


def test_choice_follows_content_not_order() -> None:
    chosen = choose_evaluation_rows(POOL, 20, 7, "held_out")
    assert chosen == choose_evaluation_rows(shuffled(POOL, 1), 20, 7, "held_out")
    assert chosen != choose_evaluation_rows(POOL, 20, 8, "held_out")
    assert chosen[:5] == choose_evaluation_rows(POOL, 5, 7, "held_out")


def test_sets_with_other_answers_hold_out_the_same_questions() -> None:
    other = [Row(f"Q: {row.source}", "same", asked=row.source) for row in POOL]
    first, second = (choose_evaluation_rows(pool, 20, 7, "held_out") for pool in (POOL, other))
    assert [row.source_key for row in first] == [row.source_key for row in second]


def test_no_question_is_held_out_twice() -> None:
    twice = POOL[:10] + [Row(row.source.upper(), "another answer") for row in POOL[:10]]
    chosen = choose_evaluation_rows(twice, 10, 7, "held_out")
    assert len({row.source_key for row in chosen}) == 10
    with pytest.raises(DataError, match=r"asks for 11 rows but .* 'chat' has 10 different questions \(20 rows\)"):
        choose_evaluation_rows(twice, 11, 7, "chat")


def test_overlap_is_found_by_question() -> None:
    held_out = {
        "chat": [Row("Question  3", "x")],
        "tasks": [POOL[3], Row("", "a dialogue", asked="question 5")],
    }
    source_keys = keys_of([*POOL, Row("QUESTION 3", "again")])[1]
    found = overlap(source_keys, held_out)
    assert {name: numbers.tolist() for name, numbers in found.items()} == {"chat": [3, 100], "tasks": [5]}
    left = np.delete(source_keys, [3, 5, 100])
    check_disjoint(left, held_out)
    with pytest.raises(DataError, match="1 training rows ask what evaluation rows of set 'tasks' ask"):
        check_disjoint(np.append(left, source_keys[5]), held_out)


def ordered(rows: list[Row]) -> list[Row]:
    return [rows[number] for number in content_order(rows, range(len(rows)), keys_of(rows)[0])]


def test_rows_are_ordered_by_content_alone() -> None:
    alike = [Row("A b", "c"), Row("a  B", "c"), Row("a b", "C")]  # one key, three texts
    rows = [*POOL, *alike]
    assert ordered(rows) == ordered(shuffled(rows, 1)) == ordered(shuffled(rows, 2))
    assert ordered(rows) == sorted(rows, key=lambda row: (row.key, row.source, row.target))


def test_small_draw_is_the_beginning_of_a_large_one() -> None:
    large = draw(range(100), 50, seed=3, part=OWN_PART)
    assert len(set(large)) == 50
    assert draw(range(100), 10, seed=3, part=OWN_PART) == large[:10]
    assert draw(range(100), 50, seed=4, part=OWN_PART) != large
    assert draw(range(100), 50, seed=3, part="another") != large
