from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.data.noise import put_in_wrong_answers
from qlora_lab.data.procedural import procedural_rows
from qlora_lab.data.rows import Row, normalise
from qlora_lab.errors import DataError

row_lists = st.lists(
    st.builds(
        Row,
        source=st.uuids().map(str),
        target=st.sampled_from(["yes", "YES ", "no", "maybe", "7", "8"]),
        family=st.sampled_from(["a", "b", None]),
    ),
    min_size=1,
    max_size=40,
)


@given(rows=row_lists, share=st.floats(0, 1), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_share_is_exact_and_wrong_answers_are_wrong_and_of_the_family(rows: list[Row], share: float, seed: int) -> None:
    try:
        noisy = put_in_wrong_answers(rows, share, seed)
    except DataError:
        assert all(len(answers_of(rows, row.family)) == 1 for row in rows)
        return
    changed = [(old, new) for old, new in zip(rows, noisy.rows, strict=True) if old != new]
    able = sum(len(answers_of(rows, row.family)) > 1 for row in rows)
    wanted = round(share * len(rows))
    assert noisy.wrong == len(changed) == min(wanted, able)
    assert noisy.impossible == wanted - noisy.wrong
    for old, new in changed:
        assert (old.source, old.family) == (new.source, new.family)
        assert normalise(old.target) != normalise(new.target)
        assert normalise(new.target) in answers_of(rows, old.family)


def answers_of(rows: list[Row], family: str | None) -> set[str]:
    return {normalise(row.target) for row in rows if row.family == family}


def test_wrong_answers_depend_on_the_seed() -> None:
    rows = procedural_rows(60, seed=0, role="training")
    assert put_in_wrong_answers(rows, 0.5, 1) == put_in_wrong_answers(rows, 0.5, 1)
    assert put_in_wrong_answers(rows, 0.5, 1) != put_in_wrong_answers(rows, 0.5, 2)
    assert put_in_wrong_answers(rows, 0.0, 1).rows == rows


def test_answers_are_drawn_as_often_as_rows_have_them() -> None:
    rows = [Row(f"q{index}", "a" if index % 4 else "b") for index in range(2000)]
    rows += [Row(f"c{index}", "c") for index in range(4000)]
    noisy = put_in_wrong_answers(rows, 1.0, 0).rows
    drawn = Counter(new.target for old, new in zip(rows, noisy, strict=True) if old.target == "c")
    assert set(drawn) == {"a", "b"}
    assert 0.70 < drawn["a"] / 4000 < 0.80  # 3 to 1; the standard error is 0.007


def test_texts_without_a_question_have_no_wrong_answer() -> None:
    rows = [Row("", "one"), Row("", "two"), Row("q", "three")]
    noisy = put_in_wrong_answers(rows, 1.0, 0)
    assert (noisy.wrong, noisy.impossible) == (1, 2)
    assert noisy.rows[:2] == rows[:2]
    with pytest.raises(DataError, match="no row can take a wrong answer"):
        put_in_wrong_answers(rows[:2], 0.5, 0)
