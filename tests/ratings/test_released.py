"""The study's full release, on made-up files in its exact layout: reviews, scores, votes of people, both benchmarks."""

import csv
import json
from pathlib import Path

import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.files import AnswerFiles, RatingFiles, load_answers, load_ratings
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment, RatingsWarning
from qlora_lab.ratings.released import answer_systems
from qlora_lab.ratings.scores import ScoredPair

GUANACO = "30b-guanaco-vicuna-generations-topp0.9-temp0.7"
PEOPLE = ["hit_id_hash", "worker_id_hash", "system_a", "system_b", "prompt", "generation_system_a"]
PEOPLE += ["generation_system_b", "answer"]
ID_OF_TEXT = {"Plants make sugar of light.": "892ZwSPDpgaEUbjpwYiyEW"}  # test_paper.py tries real ones


def write(file: Path, *rows: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def generations(tmp_path: Path) -> Path:
    """Answers to one question: of a model of the study's own, which then begins another turn, and of ChatGPT."""
    text = "Plants make sugar of light."
    told = {"question_id": 5, "text": "What do plants do?", "category": "knowledge", "prompt": "Human: What ..."}
    shown = f"{text}A chat between a curious human and an artificial intelligence assistant. ### Human: And then?"
    write(
        tmp_path / "generations" / f"{GUANACO}.jsonl",
        {**told, "generation": "not shown", "generation_truncated": shown},
    )
    write(
        tmp_path / "generations" / "answer_gpt35.jsonl",
        {"answer_id": "chat5", "question_id": 5, "model_id": "gpt-3.5-turbo:20230327", "text": "They grow."},
    )
    return tmp_path / "generations"


def read(path: Path, generations: Path) -> RatingFiles:
    return load_ratings([path], load_answers([generations]))


def test_answers_are_what_judges_saw_and_their_ids_are_hashes_of_it(generations: Path) -> None:
    answers = load_answers([generations])
    assert {answer.system: answer.answer for answer in answers.answers} == {
        "30b-guanaco": "Plants make sugar of light.",
        "gpt35": "They grow.",
    }
    assert answers.systems_of_ids == {"chat5": {"gpt35"}, ID_OF_TEXT["Plants make sugar of light."]: {"30b-guanaco"}}


def test_scores_follow_answer_ids_where_the_file_names_the_order_backwards(tmp_path: Path, generations: Path) -> None:
    its = ID_OF_TEXT["Plants make sugar of light."]
    file = write(
        tmp_path / "relative-gpt-3.5" / f"{GUANACO}-vs-gpt-3.5-gpt4-reviewer.jsonl",
        {"question_id": 5, "answer1_id": "chat5", "answer2_id": its, "text": "8 9.5\n...", "score": [8.0, 9.5]},
        {"question_id": 6, "answer1_id": "x", "answer2_id": its, "text": "?", "score": [-1, -1]},
    )
    assert read(file, generations).scores == [
        ScoredPair("5", "gpt35", "30b-guanaco", 8.0, 9.5, "gpt-4"),
        ScoredPair("6", "gpt35", "30b-guanaco", None, None, "gpt-4"),
    ]
    with pytest.raises(DataError, match=r"line 1: score must be a list of two numbers"):
        read(write(file, {"question_id": 5, "answer1_id": "x", "answer2_id": "y", "score": 8}), generations)


def test_the_openassistant_set_has_other_names_and_ids(tmp_path: Path) -> None:
    file = write(
        tmp_path / "7b-guanaco-oa-generations-topp0.9-temp0.7-vs-gpt-4-oa-generations-gpt-4-reviewer-threeclass.jsonl",
        {"message_id": "00-aa", "answer1_id": "x", "answer2_id": "y", "text": "...\n2", "score": 2},
        {"message_id": "00-ab", "answer1_id": "v", "answer2_id": "w", "text": "Hm.", "score": -1},
    )
    with pytest.warns(RatingsWarning, match="the order shown in 1 files of the release is taken from their names"):
        ratings = load_ratings([file], AnswerFiles())
    assert ratings.judgments == [
        Judgment("00-aa", "7b-guanaco", "gpt4", SECOND, "gpt-4"),
        Judgment("00-ab", "7b-guanaco", "gpt4", None, "gpt-4"),
    ]


def votes(file: Path, *rows: tuple[str, str, str, str, str]) -> Path:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(PEOPLE)
        for worker, first, second, prompt, answer in rows:
            writer.writerow(["hit", worker, first, second, prompt, "one\ntext", 'another "text"', answer])
    return file


def test_votes_of_people_get_the_questions_id_and_the_systems_names(tmp_path: Path, generations: Path) -> None:
    file = votes(
        tmp_path / "vicuna_benchmark_human_annotations.csv",
        ("w1", "guanaco-33b", "gpt35", "What do plants  do?\n", "system_a"),
        ("w2", "guanaco-33b", "gpt35", "What do plants do?", "tie"),
        ("w3", "gpt35", "guanaco-33b", "What do plants do?", "system_a"),
    )
    assert read(file, generations).judgments == [
        Judgment("5", "30b-guanaco", "gpt35", FIRST, "human:w1"),
        Judgment("5", "30b-guanaco", "gpt35", TIE, "human:w2"),
        Judgment("5", "gpt35", "30b-guanaco", FIRST, "human:w3"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            ("w1", "gpt4", "gpt35", "What do plants do?", "both"),
            r"line 3: answer must be one of system_a, system_b, tie",
        ),
        (("w1", "gpt4", "gpt35", "Why?", "tie"), r"line 3: no question has the text 'Why\?'"),
        (("w1", "gpt35", "gpt35", "What do plants do?", "tie"), "line 3: .* got 'gpt35' twice"),
    ],
)
def test_a_vote_that_is_none_is_named(row: tuple[str, ...], said: str, tmp_path: Path, generations: Path) -> None:
    """By the line on which the row ends: its cells hold whole answers, with lines of their own."""
    with pytest.raises(DataError, match=said):
        read(votes(tmp_path / "v.csv", row), generations)  # type: ignore[arg-type]


def test_a_file_of_other_columns_is_refused(tmp_path: Path, generations: Path) -> None:
    (tmp_path / "v.csv").write_text("worker,answer\n1,tie\n")
    with pytest.raises(DataError, match=r"must have the columns .*; got no worker_id_hash, system_a, system_b, prompt"):
        read(tmp_path / "v.csv", generations)


def test_the_same_text_of_two_systems_has_one_id(tmp_path: Path) -> None:
    rows = {"question_id": 1, "generation": "Yes."}
    files = [write(tmp_path / f"{name}-oa-generations.jsonl", rows) for name in ("a", "b")]
    assert list(answer_systems(files).values()) == [{"a", "b"}]
