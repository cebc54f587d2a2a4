"""Bradley-Terry and Elo ratings, against other implementations and against what must hold."""

import evalica
import numpy as np
import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.bias import order_bias, win_rates
from qlora_lab.ratings.bradley_terry import POINTS, bradley_terry, length_differences
from qlora_lab.ratings.elo import _shuffled as shuffled
from qlora_lab.ratings.elo import elo, elo_question_std
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
    order = shuffled(len(matches), 1, len(matches), np.random.default_rng(3))[0]
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


def test_systems_without_a_distance_are_named() -> None:
    undefeated = [Judgment(str(question), "best", "good", FIRST, "made up") for question in range(2)]
    with pytest.raises(DataError, match=r"one side won every match: best \| fair, good, poor"):
        bradley_terry(matches_of(played() + undefeated))
    apart = [Judgment("1", "x", "y", TIE, "made up"), Judgment("1", "y", "x", FIRST, "made up")]
    with pytest.raises(DataError, match=r"never met each other: fair, good, poor \| x, y"):
        bradley_terry(matches_of(played() + apart))


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


def test_two_people_who_see_a_pair_in_one_order_each_swap_nothing() -> None:
    votes = [Judgment("1", "a", "b", FIRST, "human:ann"), Judgment("1", "b", "a", FIRST, "human:bo")]
    assert order_bias(votes).swapped_pairs == 0
    votes.append(Judgment("1", "b", "a", SECOND, "human:ann"))
    bias = order_bias(votes)
    assert (bias.swapped_pairs, bias.consistent) == (1, 1.0)


def lengths_and_verdicts(questions: int, effect: float) -> tuple[list[Judgment], dict[tuple[str, str], int]]:
    """Return verdicts of a judge who likes long answers so much, where `fair` writes the longest."""
    generator = np.random.default_rng(5)
    names = list(STRENGTHS)
    lengths = {
        (name, str(question)): int(generator.integers(100, 900) + 400 * (name == "fair"))
        for name in names
        for question in range(questions)
    }
    shown = [(str(q), a, b) for q in range(questions) for a in names for b in names if a != b]
    difference = np.array([lengths[a, q] - lengths[b, q] for q, a, b in shown])
    odds = effect * np.tanh(difference / difference.std())
    odds += [STRENGTHS[a] - STRENGTHS[b] for _, a, b in shown]
    wins = generator.random(len(shown)) < 1 / (1 + np.exp(-odds))
    verdicts = [
        Judgment(q, a, b, FIRST if won else SECOND, "made up") for (q, a, b), won in zip(shown, wins, strict=True)
    ]
    return verdicts, lengths


def test_the_effect_of_length_is_found_and_taken_out() -> None:
    judgments, lengths = lengths_and_verdicts(300, effect=1.5)
    matches = matches_of(judgments)
    plain = bradley_terry(matches, draws=50)
    rated = bradley_terry(matches, draws=50, longer=length_differences(matches, lengths))
    assert rated.length_effect is not None and plain.length_effect is None
    assert rated.length_effect[0] == pytest.approx(POINTS * 1.5 * np.tanh(1), abs=40)  # three standard errors
    strengths = np.array([STRENGTHS[system] for system in rated.systems])
    assert rated.rating == pytest.approx(1000 + POINTS * (strengths - strengths.mean()), abs=40)
    fair, good = rated.systems.index("fair"), rated.systems.index("good")
    assert plain.rating[fair] > plain.rating[good] and rated.rating[fair] < rated.rating[good]
    assert rated.win_rate[fair, 0] < plain.win_rate[fair, 0]
    assert (rated.win_rate[:, 1] <= rated.win_rate[:, 0]).all() and (rated.win_rate[:, 0] <= rated.win_rate[:, 2]).all()


def test_a_regression_by_match_is_the_regression_by_pair_where_no_answer_is_longer() -> None:
    matches = matches_of(played())
    alike = {(system, question): 7 for system in matches.systems for question in matches.questions}
    by_match = bradley_terry(matches, draws=20, longer=length_differences(matches, alike))
    by_pair = bradley_terry(matches, draws=20)
    assert by_match.rating == pytest.approx(by_pair.rating, abs=1e-3)
    assert by_match.high == pytest.approx(by_pair.high, abs=1e-3)
    assert by_match.length_effect == pytest.approx((0, 0, 0), abs=1e-6)


def test_a_length_that_is_not_known_is_refused() -> None:
    with pytest.raises(DataError, match="the length of fair's answer to question 0 is not known"):
        length_differences(matches_of(played(1)), {("good", "0"): 3, ("poor", "0"): 3})


def test_a_judge_of_ties_alone_makes_all_systems_equal() -> None:
    ties = [Judgment(its.question, its.first, its.second, TIE, "made up") for its in played(5)]
    rated, played_elo = bradley_terry(matches_of(ties), draws=20), elo(matches_of(ties), orders=20)
    assert rated.rating == pytest.approx([1000] * 3) and played_elo.mean == pytest.approx([1000] * 3)
    assert (rated.best_rank == 1).all()


def test_an_asymmetric_set_of_pairs_gives_the_right_ratings() -> None:
    """Half of the pairs were shown in one order only, by a judge who likes the first: it must not count for them."""
    judgments = [
        its for its in played(1500, first_advantage=0.8, ties=0) if {its.first, its.second} != {"good", "poor"}
    ]
    lopsided = [its for its in judgments if (its.first, its.second) != ("fair", "good") or int(its.question) % 4 == 0]
    rated = bradley_terry(matches_of(lopsided), draws=20)
    strengths = np.array([STRENGTHS[system] for system in rated.systems])
    assert rated.rating == pytest.approx(1000 + POINTS * (strengths - strengths.mean()), abs=25)


def test_elos_spread_over_questions_is_that_of_other_questions() -> None:
    """Told from one set of questions, it is what ratings of 12 other sets vary by; that over orders is another."""
    sets = [elo(matches_of(played(30, seed=seed)), orders=200).mean for seed in range(12)]
    told = elo_question_std(matches_of(played(30, seed=99)))
    assert told.mean() == pytest.approx(np.std(sets, axis=0, ddof=1).mean(), rel=0.4)
    same_verdicts = [Judgment(str(q), "a", "b", verdict, "j") for q in range(20) for verdict in (FIRST, SECOND)]
    alike = matches_of(same_verdicts)
    assert elo_question_std(alike).max() < 0.2 * elo(alike, orders=500).order_std.min()
