"""Answers, questions and scores in the files that hold them."""

import json
from pathlib import Path

import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.answers import Answer, Question, answer_line, common_questions, read_answers, read_questions
from qlora_lab.ratings.scores import ScoredPair, read_scores, write_scores


def write(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_answers_survive_their_file(tmp_path):
    answers = [Answer("1", "math", "1 + 1?", "2", "a"), Answer("1", "math", "1 + 1?", "zwei", "b")]
    file = write(tmp_path / "x.jsonl", *({**answer_line(answer), "stop_reason": "eos"} for answer in answers))
    assert read_answers(file) == answers
    assert common_questions(answers, ["a", "b"]) == ["1"]
    assert common_questions(answers[:1], ["a", "b"]) == []


def test_the_studys_two_layouts_name_the_system_by_the_file(tmp_path):
    questions = read_questions(write(tmp_path / "q.jsonl", {"question_id": 7, "text": "Why?", "category": "generic"}))
    assert questions == {"7": Question("7", "generic", "Why?")}
    own = write(
        tmp_path / "9b-model-vicuna-generations-topp0.9.jsonl",
        {"question_id": 7, "text": "Why?", "category": "generic", "prompt": "Human: Why?", "generation": "So."},
    )
    other = write(tmp_path / "answer_other.jsonl", {"answer_id": "x", "question_id": 7, "text": "Because."})
    assert read_answers(own) == [Answer("7", "generic", "Why?", "So.", "9b-model")]
    assert read_answers(other, questions) == [Answer("7", "generic", "Why?", "Because.", "other")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": 1, "system": "a"}], "line 1 must have question, category, prompt, answer, system"),
        ([{"question": 1, "system": "a", "answer": "x"}] * 2, "line 2: a answers question 1 twice"),
    ],
)
def test_a_line_that_is_no_answer_is_refused_by_its_number(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_answers(write(tmp_path / "x.jsonl", *rows))


def test_a_question_comes_once(tmp_path):
    with pytest.raises(DataError, match="line 2: question 1 comes twice"):
        read_questions(write(tmp_path / "q.jsonl", *[{"question": 1, "prompt": "x"}] * 2))


def test_scores_survive_their_file_and_stay_in_their_range(tmp_path):
    scores = [ScoredPair("1", "a", "b", 8.0, 7.5, "judge"), ScoredPair("2", "a", "b", None, None, "judge")]
    write_scores(tmp_path / "s.jsonl", scores)
    assert read_scores(tmp_path / "s.jsonl") == scores
    for bad, message in ((11, "must be a number from 1 to 10"), (None, "either both scores")):
        row = {"question": 1, "first": "a", "second": "b", "first_score": bad, "second_score": 3, "judge": "j"}
        with pytest.raises(DataError, match=message):
            read_scores(write(tmp_path / "bad.jsonl", row))
