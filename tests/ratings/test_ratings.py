"""Bradley-Terry and Elo ratings, against other implementations and against what must hold."""

import evalica
import numpy as np
import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.bias import order_bias, win_rates
from qlora_lab.ratings.bradley_terry import POINTS, bradley_terry
from qlora_lab.ratings.elo import elo
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment
from qlora_lab.ratings.matches import Matches, matches_of
from tests.ratings.helpers import STRENGTHS, played


def for_evalica(matches: Matches) -> tuple[list[str], list[str], list[evalica.Winner]]:
    winners = {1.0: evalica.Winner.X, 0.5: evalica.Winner.Draw, 0.0: evalica.Winner.Y}
    names = [[matches.systems[index] for index in side] for side in (matches.first, matches.second)]
    return names[0], names[1], [winners[score] for score in matches.score]


def test_bradley_terry_is_evalicas() -> None:
    matches = matches_of(played())
    ours = bradley_terry(matches, draws=2, first_advantage=False).rating
    scores = evalica.bradley_terry(*for_evalica(matches)).scores
    theirs = POINTS * np.log([scores[system] for system in matches.systems])
    assert ours == pytest.approx(theirs - theirs.mean() + 1000, abs=0.05)  # the prior moves them by less


def test_elo_in_one_order_is_evalicas() -> None:
    matches = matches_of(played(questions=1))
    order = np.random.default_rng(3).permuted(np.arange(len(matches), dtype=np.int32)[None], axis=1)[0]
    first, second, winner = ([side[index] for index in order] for side in for_evalica(matches))
    theirs = evalica.elo(first, second, winner, initial=1000.0, base=10.0, scale=400.0, k=32.0).scores
    ours = elo(matches, orders=1, seed=3)
    assert ours.mean == pytest.approx([theirs[system] for system in ours.systems], abs=0.01)
    assert np.isnan(ours.order_std).all()  # of one order nothing can be said


def test_elo_is_a_zero_sum_game_and_its_seed_repeats() -> None:
    matches = matches_of(played())
    ratings = elo(matches, orders=50, seed=1)
    assert ratings.mean.sum() == pytest.approx(3000, abs=0.05)
    assert (elo(matches, orders=50, seed=1).mean == ratings.mean).all()
    assert (elo(matches, orders=50, seed=2).mean != ratings.mean).any()


def test_elo_of_few_sampled_matches_stays_near_the_start() -> None:
    matches = matches_of(played())
    few, all_of_them = (elo(matches, orders=200, sampled=count).mean for count in (10, None))
    assert np.abs(few - 1000).max() < np.abs(all_of_them - 1000).max() / 2


def test_known_strengths_are_found_and_being_first_is_taken_out() -> None:
    advantage = 0.8
    rated = bradley_terry(matches_of(played(800, first_advantage=advantage, ties=0.0)), draws=200)
    strengths = np.array([STRENGTHS[system] for system in rated.systems])
    expected = 1000 + POINTS * (strengths - strengths.mean())
    assert rated.rating == pytest.approx(expected, abs=25)  # four standard errors
    assert rated.first_advantage is not None
    assert rated.first_advantage[0] == pytest.approx(POINTS * advantage, abs=25)
    assert ((rated.low < rated.rating) & (rated.rating < rated.high)).all()
    assert dict(zip(rated.systems, rated.best_rank, strict=True)) == {"fair": 2, "good": 1, "poor": 3}


def test_intervals_cover_what_other_questions_would_give() -> None:
    """Nine in ten or more of 40 draws of 40 questions have the rating of 800 questions inside."""
    truth = bradley_terry(matches_of(played(800, seed=99)), draws=2).rating
    covered = []
    for seed in range(40):
        rated = bradley_terry(matches_of(played(40, seed=seed)), draws=300, seed=seed)
        covered += list((rated.low <= truth) & (truth <= rated.high))
    assert 0.88 <= np.mean(covered) <= 1.0


@pytest.mark.parametrize("verdicts", [(FIRST, FIRST), ()])
def test_a_system_apart_has_no_rating(verdicts: tuple[str, ...]) -> None:
    """It won everything, or the others were never met."""
    judgments = played() + [Judgment(str(index), "best", "good", FIRST, "made up") for index, _ in enumerate(verdicts)]
    judgments += [] if verdicts else [Judgment("1", "x", "y", TIE, "made up")]
    with pytest.raises(DataError, match="no finite ratings exist"):
        bradley_terry(matches_of(judgments))


def test_win_rates_count_ties_as_half() -> None:
    rates = win_rates(matches_of([Judgment("1", "a", "b", FIRST, "j"), Judgment("2", "b", "a", TIE, "j")]))
    assert rates[0, 1] == 0.75 and rates[1, 0] == 0.25 and np.isnan(rates[0, 0])


def test_what_swapping_does_is_counted() -> None:
    def pair(question: str, shown: str | None, swapped: str | None) -> list[Judgment]:
        return [Judgment(question, "a", "b", shown, "j"), Judgment(question, "b", "a", swapped, "j")]

    judgments = pair("same winner", FIRST, SECOND) + pair("always first", FIRST, FIRST) + pair("ties", TIE, TIE)
    judgments += pair("a tie once", TIE, FIRST) + pair("unread", None, FIRST)
    bias = order_bias(judgments)
    assert (bias.swapped_pairs, bias.consistent, bias.flipped, bias.unread) == (4, 0.5, 0.25, 1)
    assert (bias.first, bias.second, bias.tie) == (5 / 9, 1 / 9, 3 / 9)
