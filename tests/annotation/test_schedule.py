"""Which pairs are compared, and in which order an annotator sees them."""

from collections import Counter
from dataclasses import replace

import pytest

from qlora_lab.annotation.schedule import asked, comparisons, items_for, unanswered
from qlora_lab.errors import DataError
from qlora_lab.ratings.answers import Answer
from tests.annotation.helpers import made_up


def test_every_two_answers_to_a_question_are_compared_and_missing_ones_said():
    answers = [answer for answer in made_up(4) if (answer.question, answer.system) != ("0", "system-b")]
    pairs = {(one.question, one.systems) for one in comparisons(answers)}
    assert len(pairs) == 3 * 3 + 1
    assert {systems for question, systems in pairs if question == "0"} == {("system-a", "system-c")}
    assert unanswered(answers) == ["system-b answers 3 of 4 questions"]


def test_pairs_can_be_kept_to_one_system_and_to_a_number_spread_over_all():
    answers = made_up(40, "abcd")
    assert all("system-b" in one.systems for one in comparisons(answers, against="system-b"))
    chosen = comparisons(answers, limit=14)
    counts = Counter(one.systems for one in chosen)
    assert len(chosen) == 14 and sorted(counts.values()) == [2, 2, 2, 2, 3, 3]
    assert chosen == comparisons(answers, limit=14) != comparisons(answers, limit=14, seed=1)
    with pytest.raises(DataError, match=r"--against must be one of .*; got 'system-e'; did you mean"):
        comparisons(answers, against="system-e")
    with pytest.raises(DataError, match="no question is answered by two of system-a"):
        comparisons(made_up(3, "a"))


def test_each_system_is_shown_first_in_half_and_each_pair_both_ways_to_two_annotators():
    chosen = comparisons(made_up(21))
    ann, bo = (items_for(chosen, name, number) for number, name in enumerate(("ann", "bo")))
    first = Counter((item.first, item.second) for item in ann)
    assert len(ann) == 63 and set(first.values()) == {10, 11}
    orders = [{(item.question, item.first, item.second) for item in items} for items in (ann, bo)]
    assert not orders[0] & orders[1]
    assert [item.question for item in ann] != [item.question for item in bo]
    shown = "".join("x" if item.first < item.second else "o" for item in ann)
    assert "xxx" in shown and "ooo" in shown, "a regular order could be guessed"


@pytest.mark.parametrize(("questions", "repeat", "repeats"), [(20, 0.2, 4), (7, 0.5, 4), (1, 0.4, 0), (9, 0.0, 0)])
def test_a_repeat_comes_half_a_sequence_later_the_other_way_round(questions, repeat, repeats):
    items = items_for(comparisons(made_up(questions, "ab")), "ann", 0, repeat=repeat)
    again = [item for item in items if item.repeat]
    assert len(again) == repeats and len(items) == questions + repeats
    for item in again:
        once = replace(item, first=item.second, second=item.first, repeat=False)
        assert items.index(item) - items.index(once) >= questions // 2


def test_what_was_asked_is_known_from_any_answer_and_must_be_one_thing():
    bare = Answer("0", "", "", "x", "system-a")
    assert asked([bare, *made_up(1, "b")])["0"].prompt == "What is 0?"
    with pytest.raises(DataError, match="no file says what was asked in question 0; give the questions with"):
        asked([bare])
    with pytest.raises(
        DataError, match=r"question 0 is 'What is 0\?' in one file and 'Who\?' in the answer of system-a"
    ):
        asked([*made_up(1, "b"), Answer("0", "", "Who?", "x", "system-a")])
