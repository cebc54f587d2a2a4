"""Judgments are read whole or refused by file and line, and votes become majorities."""

import json
from pathlib import Path

import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment, majority, read_judgments, write_judgments
from qlora_lab.ratings.released import answer_systems, read_released

GOOD = {"question": "1", "first": "a", "second": "b", "verdict": "tie", "judge": "me"}
RELEASED = "65b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-answer_gpt35-gpt-4-reviewer-threeclass.jsonl"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    judgments = [Judgment("1", "a", "b", FIRST, "me"), Judgment("ü", "b", "a", None, "me")]
    write_judgments(tmp_path / "j.jsonl", judgments)
    assert read_judgments(tmp_path / "j.jsonl") == judgments


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{cut", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        (json.dumps({**GOOD, "verdict": "better"}), "verdict must be one of first, second, tie"),
        (json.dumps({key: GOOD[key] for key in GOOD if key != "judge"}), "got no judge"),
        (json.dumps({**GOOD, "second": "a"}), "'a' twice"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(DataError, match=said) as refused:
        read_judgments(file)
    assert f"{file}, line 3" in str(refused.value)


def test_majorities() -> None:
    def votes(question: str, *verdicts: str | None) -> list[Judgment]:
        return [Judgment(question, "b", "a", verdict, f"voter {index}") for index, verdict in enumerate(verdicts)]

    cast = votes("two of three", FIRST, FIRST, SECOND) + votes("all differ", FIRST, SECOND, TIE)
    cast += votes("two ties", TIE, TIE, FIRST) + votes("one unread", None, SECOND) + votes("all unread", None)
    cast.append(Judgment("swapped", "a", "b", SECOND, "voter 0"))
    assert {judgment.question: judgment.winner for judgment in majority(cast)} == {
        "two of three": "b",
        "all differ": None,
        "two ties": None,
        "one unread": "a",
        "swapped": "b",
    }


def review(score: int, first: str = "x1", second: str = "y1", text: str = "") -> str:
    row = {"question_id": 7, "answer1_id": first, "answer2_id": second, "score": score, "text": text}
    return json.dumps(row) + "\n"


def test_answer_ids_decide_the_order_where_a_file_name_has_it_backwards(tmp_path: Path) -> None:
    generations = tmp_path / "answer_gpt35.jsonl"
    generations.write_text(json.dumps({"answer_id": "y1"}) + "\n")
    answers = answer_systems([generations])
    file = tmp_path / RELEASED
    file.write_text(review(1) + review(2, "y1", "x1"))
    told, backwards = read_released(file, answers)
    assert (told.first, told.second, told.winner) == ("65b-guanaco", "gpt35", "65b-guanaco")
    assert (backwards.first, backwards.second, backwards.winner) == ("gpt35", "65b-guanaco", "65b-guanaco")
    assert read_released(file, {})[1].first == "65b-guanaco"  # nothing but the name is known


def test_answers_of_other_systems_are_refused(tmp_path: Path) -> None:
    file = tmp_path / RELEASED
    file.write_text(review(1))
    with pytest.raises(DataError, match="line 1: the answers are of bard and nobody known"):
        read_released(file, {"x1": {"bard"}})


def test_a_released_row_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / RELEASED
    file.write_text(review(5))
    with pytest.raises(DataError, match="line 1: score must be 1, 2, 3 or -1; got 5"):
        read_released(file, {})


def test_unread_verdicts_are_read_again_unless_not_wanted(tmp_path: Path) -> None:
    file = tmp_path / RELEASED
    file.write_text(review(-1, text="Both are wrong. Therefore I choose option 3."))
    assert [judgment.verdict for judgment in read_released(file, {})] == [TIE]
    assert [judgment.verdict for judgment in read_released(file, {}, reparse=False)] == [None]
