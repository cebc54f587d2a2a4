"""Published ratings in place of a judge."""

import json
from pathlib import Path

import pytest

from qlora_lab import tournament
from qlora_lab.ratings.judgments import FIRST, TIE, Judgment, read_judgments, write_judgments
from qlora_lab.ratings.scores import ScoredPair, read_scores, write_scores
from tests.judging.helpers import answer_files, run

RELEASED = "65b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-answer_gpt35-gpt-4-reviewer-threeclass.jsonl"


def review(question: int, score: int, text: str) -> str:
    row = {
        "review_id": "r",
        "question_id": question,
        "answer1_id": "a",
        "answer2_id": "b",
        "score": score,
        "text": text,
    }
    return json.dumps(row) + "\n"


def replay(folder: Path, *more: str, ratings: Path, settings: tuple[str, ...] = ()) -> int:
    out = ["--out", str(folder / "out.jsonl")]
    return run([*more, "--judge", "replay", *out, "--set", f"ratings=[{ratings}]", *settings])


def test_released_reviews_are_replayed_with_their_texts_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    (published / RELEASED).write_text(review(1, 1, "Better.\n\n1") + review(2, -1, "Therefore I choose option 3."))
    assert replay(tmp_path, ratings=published) == 0
    assert "replayed 2 verdicts of gpt-4 (0 could not be read); 2 are in one order only" in capsys.readouterr().out
    one, other = read_judgments(tmp_path / "out.jsonl")
    assert one == Judgment("1", "65b-guanaco", "gpt35", FIRST, "gpt-4") and other.verdict == TIE
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["text"] == "Better.\n\n1"


def test_own_ratings_of_one_judge_are_replayed_for_the_answers_at_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = tmp_path / "j.jsonl"
    judgments = [Judgment(q, first, second, TIE, "me") for q in "0123" for first, second in ("xy", "yx", "xz")]
    write_judgments(published, [*judgments, Judgment("0", "x", "y", FIRST, "you")])
    answers = answer_files(tmp_path, "x", "y", questions=2)
    assert replay(tmp_path, *answers, ratings=published) == 2
    assert "2 judges (me, you); choose with --set model=NAME" in capsys.readouterr().err
    assert replay(tmp_path, *answers, ratings=published, settings=("model=me", "name=mine")) == 0
    assert {(rating.question, rating.judge) for rating in read_judgments(tmp_path / "out.jsonl")} == {
        ("0", "mine"),
        ("1", "mine"),
    }
    assert replay(tmp_path, *answers, ratings=published, settings=("model=you", "name=mine")) == 1
    assert "3 of the comparisons have no published rating" in capsys.readouterr().out


def test_scores_are_replayed(tmp_path: Path) -> None:
    write_scores(tmp_path / "s.jsonl", [ScoredPair("0", "x", "y", 8.0, 7.0, "me")])
    assert replay(tmp_path, "--task", "scores", ratings=tmp_path / "s.jsonl") == 0
    assert read_scores(tmp_path / "out.jsonl") == read_scores(tmp_path / "s.jsonl")


def test_the_studys_scores_are_replayed(tmp_path: Path) -> None:
    file = tmp_path / "65b-guanaco-vicuna-generations-topp0.9-temp0.7-vs-gpt-3.5-gpt4-reviewer.jsonl"
    row = {"question_id": 5, "answer1_id": "a", "answer2_id": "b", "text": "8 9.5", "score": [8.0, 9.5]}
    file.write_text(json.dumps(row) + "\n")
    assert replay(tmp_path, "--task", "scores", ratings=file) == 0
    assert read_scores(tmp_path / "out.jsonl") == [ScoredPair("5", "65b-guanaco", "gpt35", 8.0, 9.5, "gpt-4")]


def test_the_release_becomes_a_tournament(
    tmp_path: Path, data_slices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_slices / "qlora_eval"
    answers = [str(file) for file in sorted((data / "generations").glob("*.jsonl"))]
    questions = ["--questions", str(data / "vicuna_questions.jsonl")]
    assert replay(tmp_path, *answers, *questions, ratings=data / "pairwise_gpt4_vicuna") == 0
    assert "replayed 1600 verdicts of gpt-4 (0 could not be read)\n" in capsys.readouterr().out
    tournament.main([str(tmp_path / "out.jsonl"), "--orders", "20", "--draws", "20"])
    assert "1600 matches on 80 questions, judged by gpt-4" in capsys.readouterr().out
