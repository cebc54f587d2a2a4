"""What the study printed, against itself and against the part of its release that is at hand."""

import csv
from pathlib import Path

import numpy as np
import pytest

from qlora_lab.ratings.agreement import kendall_tau, spearman_rho
from qlora_lab.ratings.bias import order_bias
from qlora_lab.ratings.bradley_terry import bradley_terry, length_differences
from qlora_lab.ratings.elo import elo, elo_question_std
from qlora_lab.ratings.files import AnswerFiles, load_answers, load_ratings
from qlora_lab.ratings.judgments import Judgment, json_rows
from qlora_lab.ratings.matches import matches_of

PAPER = Path(__file__).parents[2] / "sweeps" / "paper"


def printed(**wanted: str) -> dict[str, float]:
    """Return the ratings of a printed column by system."""
    with (PAPER / "elo.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]
    return {row["release_name"]: float(row["elo"]) for row in rows}


@pytest.mark.parametrize(
    ("column", "systems", "off"),
    [
        ({"table": "1"}, 8, -1),
        ({"table": "7", "judge": "human"}, 8, 2),
        ({"table": "7", "judge": "gpt-4", "benchmark": "vicuna"}, 8, -4),  # 13B is 913 here and 916 in table 1
        ({"table": "7", "benchmark": "openassistant"}, 7, 0),
    ],
)
def test_printed_columns_are_of_a_zero_sum_game(column: dict[str, str], systems: int, off: int) -> None:
    """To rounding, half a point a system."""
    ratings = printed(**column)
    assert len(ratings) == systems
    assert sum(ratings.values()) - 1000 * systems == off
    assert abs(off) <= systems / 2


def test_the_printed_rank_correlations_are_not_those_of_the_printed_columns() -> None:
    people, gpt4 = printed(table="7", judge="human"), printed(table="7", judge="gpt-4", benchmark="vicuna")
    columns = [np.array([column[name] for name in sorted(people)]) for column in (people, gpt4)]
    with (PAPER / "agreement.csv").open() as file:
        told = {row["measure"]: float(row["value"]) for row in csv.DictReader(file)}
    assert (told["Kendall tau"], told["Spearman rho"]) == (0.43, 0.55)
    assert kendall_tau(*columns) == pytest.approx(16 / 28)  # 0.571
    assert spearman_rho(*columns) == pytest.approx(1 - 6 * 32 / (8 * 63))  # 0.619


def test_the_printed_scores_depend_on_the_order_and_their_mean_is_not_that_of_the_columns() -> None:
    names = ("chatgpt_vs_system_percent", "system_vs_chatgpt_percent", "percent_of_chatgpt")
    with (PAPER / "relative_to_chatgpt.csv").open() as file:
        scores = {row["system"]: [float(row[name]) for name in names] for row in csv.DictReader(file)}
    gained = {system: round(first - second, 1) for system, (second, first, _) in scores.items()}
    assert [system for system, points in gained.items() if points < 0] == ["GPT-4"]
    assert max(gained.values()) == gained["FLAN v2 13B"] == 28.8 and len(scores) == 21
    off = {system: round(mean - (first + second) / 2, 2) for system, (second, first, mean) in scores.items()}
    assert (min(off.values()), off["Alpaca 13B"]) == (-0.85, -0.85)
    assert (max(off.values()), off["Unnatural Instructions 13B"]) == (0.3, 0.3)
    assert scores["Open Assistant 33B"] == scores["Vicuna 13B"]


@pytest.fixture(scope="module")
def release(data_slices: Path) -> tuple[list[Judgment], AnswerFiles]:
    known = load_answers([data_slices / "qlora_eval" / "generations"])
    return load_ratings([data_slices / "qlora_eval" / "pairwise_gpt4_vicuna"], known).judgments, known


def test_every_answer_id_is_known_from_its_text(release: tuple[list[Judgment], AnswerFiles], data_slices: Path) -> None:
    _, known = release
    for file in (data_slices / "qlora_eval" / "pairwise_gpt4_vicuna").glob("*.jsonl"):
        for row, place in json_rows(file):
            assert {row["answer1_id"], row["answer2_id"]} <= known.systems_of_ids.keys(), place


def test_order_bias_and_swap_consistency(release: tuple[list[Judgment], AnswerFiles]) -> None:
    bias = order_bias(release[0])
    assert (bias.first, bias.second, bias.tie) == pytest.approx((864 / 1600, 526 / 1600, 210 / 1600))  # counted by hand
    assert (bias.swapped_pairs, bias.consistent, bias.flipped) == (800, 545 / 800, 127 / 800)


def test_elo_as_described_comes_near_the_printed_distances(release: tuple[list[Judgment], AnswerFiles]) -> None:
    """Ten points, of five systems of eight; the printed +-1 is over orders alone, questions say twenty times that."""
    matches = matches_of(release[0])
    played = elo(matches, orders=500)
    column = np.array([printed(table="1")[system] for system in played.systems])
    difference = (played.mean - played.mean.mean()) - (column - column.mean())
    assert np.sqrt((difference**2).mean()) == pytest.approx(8.8, abs=1.5)
    assert (1.96 * played.order_std / np.sqrt(10_000)).mean() == pytest.approx(0.8, abs=0.1)
    assert (1.96 * elo_question_std(matches) > 20).all()


def test_fewer_points_a_match_come_nearer(release: tuple[list[Judgment], AnswerFiles]) -> None:
    matches = matches_of(release[0])
    column = np.array([printed(table="1")[system] for system in matches.systems])

    def off(k: float, sampled: int | None) -> float:
        mean = elo(matches, k=k, sampled=sampled, orders=200).mean
        return float(np.sqrt((((mean - mean.mean()) - (column - column.mean())) ** 2).mean()))

    assert off(8, None) < off(16, None) < off(32, None)
    assert off(8, 250) > 5 * off(32, 250)


def test_length_explains_guanacos_lead_over_chatgpt(release: tuple[list[Judgment], AnswerFiles]) -> None:
    judgments, known = release
    matches = matches_of(judgments)
    plain = bradley_terry(matches, draws=100)
    rated = bradley_terry(matches, draws=100, longer=length_differences(matches, known.lengths()))
    chat, guanaco = matches.systems.index("gpt35"), matches.systems.index("65b-guanaco")
    assert plain.rating[guanaco] > plain.rating[chat] and rated.rating[guanaco] < rated.rating[chat]
    assert rated.length_effect is not None and rated.length_effect[1] > 100
    assert rated.first_advantage is not None and plain.first_advantage is not None
    assert plain.first_advantage[0] == pytest.approx(110, abs=2)
