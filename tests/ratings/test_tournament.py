"""The tournament's command, on made-up judgments and on what is at hand of the study's release."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_lab.ratings.judgments import FIRST, SECOND, Judgment, write_judgments
from qlora_lab.tournament import main
from tests.ratings.helpers import played

QUICK = ["--orders", "50", "--draws", "50"]


def test_the_table_names_the_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", played(first_advantage=0.5))
    main([str(tmp_path), *QUICK])
    said = capsys.readouterr().out
    assert said.index("good") < said.index("fair") < said.index("poor")
    assert "240 matches on 40 questions, judged by made up" in said and "warning" not in said


def test_other_numbers_of_matches_in_each_order_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_judgments(tmp_path / "j.jsonl", [*played(), Judgment("one more", "good", "poor", FIRST, "made up")])
    main([str(tmp_path), *QUICK])
    assert "warning: not shown equally often in both orders, which the ratings allow for: good and poor" in (
        capsys.readouterr().err
    )


def test_without_swapped_pairs_being_first_is_not_told_from_being_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = [FIRST] * 75 + [SECOND] * 25
    judgments = [Judgment(str(number), "a", "b", verdict, "j") for number, verdict in enumerate(verdicts)]
    write_judgments(tmp_path / "j.jsonl", judgments)
    main([str(tmp_path), "--json", *QUICK])
    said = capsys.readouterr()
    told = json.loads(said.out)
    distance = told["systems"][0]["rating"] - told["systems"][1]["rating"]
    assert told["first_advantage"] is None
    assert distance == pytest.approx(400 * np.log10(3), abs=0.5)  # odds of 3 to 1, less the prior's pull
    assert "warning: no pair was shown in both orders" in said.err


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_judges_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", [*played(), Judgment("1", "good", "poor", FIRST, "another")])
    assert "2 judges (another, made up); choose one" in refusal([str(tmp_path)], capsys)
    assert "did you mean 'made up'" in refusal([str(tmp_path), "--judge", "made upp"], capsys)


def test_votes_of_people_count_as_their_majority(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes = [replace(its, judge=f"human:{name}") for its in played(30) for name in ("one", "two")]
    against = [replace(its, judge="human:three", verdict=FIRST) for its in played(30)]
    write_judgments(tmp_path / "j.jsonl", [*votes, *against])
    main([str(tmp_path), "--json", *QUICK])
    told = json.loads(capsys.readouterr().out)
    assert (told["judge"], told["matches"], told["first_advantage"]) == ("human", 90, None)
    assert [row["system"] for row in told["systems"]] == ["good", "fair", "poor"]
    main([str(tmp_path), "--judge", "human:three", "--json", *QUICK])
    assert json.loads(capsys.readouterr().out)["matches"] == 180


def test_systems_and_settings_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", played())
    main([str(tmp_path), "--systems", "good", "poor", "--k", "16", "--start", "0", "--sampled", "30", "--json", *QUICK])
    told = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in told["systems"]] == ["good", "poor"]
    assert sum(row["elo"] for row in told["systems"]) == pytest.approx(0, abs=0.01)
    assert "--systems must be one of fair, good, poor; got 'god'" in refusal(
        [str(tmp_path), "--systems", "god"], capsys
    )


@pytest.mark.parametrize("option", ["--draws", "--orders", "--sampled"])
def test_nothing_is_drawn_none_times(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", played(5))
    assert f"{option}: must be 1 or more; got 0" in refusal([str(tmp_path), option, "0"], capsys)


def test_length_needs_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", played())
    assert "give all answers that were judged with --answers" in refusal([str(tmp_path), "--length"], capsys)


def test_nothing_to_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it has none" in refusal([str(tmp_path)], capsys)


def test_the_released_ratings(capsys: pytest.CaptureFixture[str]) -> None:
    """Five of the study's eight systems. Shares were counted by hand from the files' scores."""
    if "QLORA_LAB_DATA" not in os.environ:
        pytest.skip("QLORA_LAB_DATA does not name a folder with qlora_eval")
    folder = Path(os.environ["QLORA_LAB_DATA"]) / "qlora_eval"
    main([str(folder / "pairwise_gpt4_vicuna"), "--answers", str(folder / "generations"), "--json", *QUICK])
    result = json.loads(capsys.readouterr().out)
    assert (result["matches"], result["questions"]) == (1600, 80)  # the release leaves two verdicts unread
    assert result["order"]["unread"] == 0
    assert [row["system"] for row in result["systems"]] == ["gpt4", "65b-guanaco", "vicuna-13b", "gpt35", "7b-guanaco"]
    # as sweeps/paper/README.md has them
    ratings = [row["rating"] for row in result["systems"]]
    assert ratings == pytest.approx([1341, 978, 934, 924, 823], abs=2)
    assert result["order"]["first"] == pytest.approx(864 / 1600)
    assert result["first_advantage"][1] > 0, "GPT-4 prefers the answer shown first"
