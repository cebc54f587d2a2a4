"""Files of ratings as they are found: being written, with corrections, with systems nobody knows."""

import json
from pathlib import Path

import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.answers import Answer, answer_line
from qlora_lab.ratings.files import AnswerFiles, load_answers, load_ratings
from qlora_lab.ratings.judgments import FIRST, TIE, Judgment, RatingsWarning, read_judgments, write_judgments
from qlora_lab.ratings.scores import ScoredPair, write_scores

ONE = Judgment("1", "a", "b", FIRST, "j")


@pytest.mark.parametrize("torn", [b'{"question": "2", "fir', '{"question": "ü'.encode()[:-1]])
def test_a_line_that_is_still_being_written_is_left_out_and_told(torn: bytes, tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    write_judgments(file, [ONE])
    file.write_bytes(file.read_bytes() + torn)
    with pytest.warns(RatingsWarning, match="line 2 is torn"):
        assert read_judgments(file) == [ONE]


def test_a_torn_line_amid_others_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    file.write_bytes(b'{"question": "2", "fir\xff\n' + json.dumps({"question": "1"}).encode() + b"\n")
    with pytest.raises(DataError, match="line 1 must be a JSON object"):
        read_judgments(file)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """Unicode knows other ends of lines, which stand inside what models write."""
    judgment = Judgment("1 \u2028 \x85", "a", "b", TIE, "j")
    write_judgments(tmp_path / "j.jsonl", [judgment])
    assert read_judgments(tmp_path / "j.jsonl") == [judgment]


def test_the_last_of_a_judges_verdicts_on_the_same_counts(tmp_path: Path) -> None:
    corrected = Judgment("1", "a", "b", TIE, "j")
    others = [Judgment("1", "b", "a", FIRST, "j"), Judgment("1", "a", "b", FIRST, "k")]
    write_judgments(tmp_path / "1.jsonl", [ONE, *others])
    write_judgments(tmp_path / "2.jsonl", [corrected])
    with pytest.warns(RatingsWarning, match="^1 judgments came again from the same judge"):
        found = load_ratings([tmp_path], AnswerFiles())
    assert sorted(found.judgments, key=str) == sorted([corrected, *others], key=str)


def test_scores_and_verdicts_are_told_apart(tmp_path: Path) -> None:
    write_judgments(tmp_path / "j.jsonl", [ONE])
    write_scores(tmp_path / "s.jsonl", [ScoredPair("1", "a", "b", 3.0, 4.0, "j")])
    found = load_ratings([tmp_path], AnswerFiles())
    assert (len(found.judgments), len(found.scores)) == (1, 1)


def test_a_system_without_answers_is_refused_by_file(tmp_path: Path) -> None:
    write_judgments(tmp_path / "j.jsonl", [ONE])
    known = AnswerFiles(answers=[Answer("1", "", "?", "!", name) for name in ("a", "c")])
    with pytest.raises(DataError, match=r"j.jsonl: a system must be one of a, c; got 'b'"):
        load_ratings([tmp_path], known)


def test_two_judges_of_one_name_are_not_taken_for_one(tmp_path: Path) -> None:
    for name, asked in (("1", "ab"), ("2", "cd")):
        row = {**vars(ONE), "question": name, "judge_sha256": asked}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load_ratings([tmp_path / "1.jsonl"], AnswerFiles()).judgments) == 1
    with pytest.raises(DataError, match=r"1.jsonl and .*2.jsonl are of two judges that are both called j"):
        load_ratings([tmp_path], AnswerFiles())


def test_an_answer_in_two_files_is_one_and_two_answers_are_refused(tmp_path: Path) -> None:
    for name, text in (("1", "So."), ("2", "So."), ("3", "No.")):
        row = answer_line(Answer("q", "", "Why?", text, "mine"))
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [tmp_path / f"{name}.jsonl" for name in "123"]
    assert [answer.answer for answer in load_answers(files[:2]).answers] == ["So."]
    with pytest.raises(DataError, match=r"mine answers question q otherwise in .*1.jsonl than in .*3.jsonl"):
        load_answers(files)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl must be a text file"):
        load_ratings([tmp_path / "absent.jsonl"], AnswerFiles())
