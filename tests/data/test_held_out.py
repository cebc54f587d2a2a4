import random

import pytest

from qlora_lab.data.held_out import (
    check_disjoint,
    choose_evaluation_rows,
    draw_training_rows,
    remove_overlap,
)
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
    kept, removed = remove_overlap([*POOL, Row("QUESTION 3", "again")], held_out)
    assert removed == {"chat": 2, "tasks": 1}
    assert kept == [row for row in POOL if row.source not in ("question 3", "question 5")]
    check_disjoint(kept, held_out)
    with pytest.raises(DataError, match="1 training rows ask what evaluation rows ask"):
        check_disjoint([*kept, POOL[5]], held_out)


def test_small_draw_is_the_beginning_of_a_large_one() -> None:
    large = draw_training_rows(POOL, 50, seed=3)
    assert draw_training_rows(shuffled(POOL, 1), 10, seed=3) == large[:10]
    assert draw_training_rows(POOL, 50, seed=4) != large
    assert sorted(row.key for row in draw_training_rows(POOL, None, seed=3)) == sorted(row.key for row in POOL)
    with pytest.raises(DataError, match=r"data\.rows asks for 101 rows but 100 are left"):
        draw_training_rows(POOL, 101, seed=3)
