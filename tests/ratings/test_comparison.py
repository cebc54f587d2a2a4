"""Judges compared, on votes whose agreement is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats import inter_rater

from qlora_lab.agreement import main
from qlora_lab.ratings.agreement import cohen_kappa
from qlora_lab.ratings.answers import Answer, answer_line
from qlora_lab.ratings.comparison import (
    compare_group,
    compare_rankings,
    compare_two,
    verdicts,
    verdicts_as_shown,
)
from qlora_lab.ratings.disagreements import cases
from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, VERDICTS, Judgment, write_judgments
from tests.ratings.helpers import played

QUICK = ["--draws", "50"]


def noisy(judgments: list[Judgment], judge: str, share: float, seed: int) -> list[Judgment]:
    """Return another judge's verdicts, of which so many are drawn by chance."""
    generator = np.random.default_rng(seed)
    drawn = generator.choice(VERDICTS, len(judgments))
    by_chance = generator.random(len(judgments)) < share
    return [
        replace(its, judge=judge, verdict=str(verdict) if wrong else its.verdict)
        for its, verdict, wrong in zip(judgments, drawn, by_chance, strict=True)
    ]


def test_two_judges_on_pairs_in_the_same_order() -> None:
    one = played()
    other = noisy(one, "other", 0.5, seed=1)
    compared = compare_two(verdicts_as_shown(one), verdicts_as_shown(other), draws=200)
    assert compared is not None
    assert (compared.items, compared.questions) == (240, 40)
    assert compared.cohen is not None
    assert compared.cohen[0] == pytest.approx(cohen_kappa([its.verdict for its in one], [its.verdict for its in other]))
    assert compared.same[0] == pytest.approx(
        np.mean([its.verdict == others.verdict for its, others in zip(one, other, strict=True)])
    )
    for low, value, high in ((interval[1], interval[0], interval[2]) for interval in (compared.cohen, compared.fleiss)):
        assert low < value < high


def test_a_judge_of_both_orders_has_one_verdict_on_a_pair() -> None:
    shown = [Judgment("1", "a", "b", FIRST, "j"), Judgment("1", "b", "a", SECOND, "j")]
    torn = [Judgment("2", "a", "b", FIRST, "j"), Judgment("2", "b", "a", FIRST, "j")]
    assert verdicts(shown + torn) == {("1", "a", "b"): 2, ("2", "a", "b"): 1}
    assert verdicts_as_shown(torn) == {("2", "a", "b"): 2, ("2", "b", "a"): 2}


def test_intervals_are_over_questions_not_items() -> None:
    """Ten pairs a question with one fate are no more than one."""
    one, other = {}, {}
    for question in range(20):
        for pair in range(10):
            one[str(question), "a", str(pair)] = 2
            other[str(question), "a", str(pair)] = 2 * (question % 2)
    compared = compare_two(one, other, draws=400)
    assert compared is not None and compared.same[0] == 0.5
    assert compared.same[2] - compared.same[1] == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 20), rel=0.2)


def test_a_group_is_compared_as_statsmodels_does_where_all_voted() -> None:
    truth = played(20)
    votes = [vote for seed in range(3) for vote in noisy(truth, f"human:{seed}", 0.4, seed)]
    votes = [vote for vote in votes if vote.first < vote.second]
    some = [vote for vote in votes if not (vote.judge == "human:2" and vote.question == "7")]
    compared = compare_group(some, draws=50)
    assert compared is not None
    assert (compared.raters, compared.items, compared.fleiss_items) == (3, 60, 57)
    by_item: dict[tuple[str, ...], list[str]] = {}
    for vote in some:
        by_item.setdefault((vote.question, *vote.pair), []).append(vote.winner or "tie")
    whole = [
        [("tie" if who == "tie" else who == item[1]) for who in its] for item, its in by_item.items() if len(its) == 3
    ]
    counts, _ = inter_rater.aggregate_raters(np.array([[str(who) for who in its] for its in whole]))
    assert compared.fleiss[0] == pytest.approx(inter_rater.fleiss_kappa(counts))


def test_who_sees_a_pair_twice_is_one_rater() -> None:
    ann = [Judgment("1", "a", "b", FIRST, "human:ann"), Judgment("1", "b", "a", SECOND, "human:ann")]
    assert compare_group(ann, draws=10) is None
    compared = compare_group([*ann, Judgment("1", "a", "b", SECOND, "human:bo")], draws=10)
    assert compared is not None
    assert (compared.raters, compared.same[0]) == (2, 0.0)


def test_rankings_agree_where_judges_do_and_turn_where_one_is_turned() -> None:
    one = played(60, first_advantage=0.5)
    turned = [replace(its, verdict={FIRST: SECOND, SECOND: FIRST, TIE: TIE}[its.verdict or TIE]) for its in one]
    same, reverse = compare_rankings(one, one, draws=50), compare_rankings(one, turned, draws=50)
    assert same is not None and reverse is not None
    assert (same.kendall_tau, same.spearman_rho) == ((1, 1, 1), (1, 1, 1))
    assert (reverse.kendall_tau[0], reverse.spearman_rho[0]) == (-1, -1)
    assert compare_rankings(one, [Judgment("1", "good", "poor", FIRST, "j")]) is None


def test_cases_are_sorted_by_how_far_two_differ() -> None:
    people = [Judgment("1", "b", "a", vote, f"human:{vote}") for vote in (FIRST, SECOND, TIE)]
    people += [Judgment("2", "a", "b", FIRST, f"human:{name}") for name in "xy"]
    judge = [
        Judgment("1", "a", "b", FIRST, "j"),
        Judgment("2", "a", "b", SECOND, "j"),
        Judgment("3", "a", "b", TIE, "j"),
    ]
    first, second = cases(judge, people)
    assert (first.question, first.one, first.other, first.opposite) == ("2", 0.0, 1.0, True)
    assert (second.question, second.one, second.other, second.opposite) == ("1", 1.0, 0.5, False)
    names = ["10", "b", "9", "a"]
    sides = [[Judgment(name, "a", "b", verdict, "j") for name in names] for verdict in (FIRST, SECOND)]
    assert [case.question for case in cases(*sides)] == ["9", "10", "a", "b"]  # as people count


def test_the_command_compares_judges_people_and_a_judge_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = played(20)
    people = [vote for seed in range(2) for vote in noisy(truth, f"human:{seed}", 0.3, seed)]
    write_judgments(tmp_path / "j.jsonl", [*truth, *people])
    main([str(tmp_path), *QUICK])
    said = capsys.readouterr().out
    for name in ("human and made up", "people among themselves", "human:0 and human:1", "made up, order swapped"):
        assert name in said
    main([str(tmp_path), *QUICK, "--json"])
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["one"], first["other"], first["items"]["items"], first["rankings"]["systems"]) == (
        "human",
        "made up",
        60,
        3,
    )


def test_a_judge_of_ties_alone_has_no_kappa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ties = [replace(its, verdict=TIE) for its in played(5)]
    write_judgments(tmp_path / "j.jsonl", ties)
    main([str(tmp_path), *QUICK])
    assert "none: one class only" in capsys.readouterr().out


def test_the_report_shows_disagreements_and_escapes_what_models_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = "<script>alert(1)</script>"
    write_judgments(tmp_path / "j.jsonl", [Judgment("1", f"a{attack}", "b", FIRST, f"j{attack}")])
    write_judgments(tmp_path / "p.jsonl", [Judgment("1", f"a{attack}", "b", SECOND, "human:x")])
    answers = [Answer("1", f"math{attack}", f"Why{attack}?", f"So{attack}.", name) for name in (f"a{attack}", "b")]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(answer_line(answer)) + "\n" for answer in answers))
    page = tmp_path / "r.html"
    ratings = [str(tmp_path / "j.jsonl"), str(tmp_path / "p.jsonl")]
    main([*ratings, "--answers", str(file), "--report", str(page), *QUICK])
    html = page.read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "On 1 they prefer different answers" in html
    assert 'href="#question-1"' in html and 'id="question-1"' in html
    for heading in ("By category", "math&lt;script&gt;alert(1)&lt;/script&gt;: the largest", "Largest", "Questions"):
        assert heading in html


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_judgments(tmp_path / "j.jsonl", [Judgment("1", "a", "b", FIRST, "j")])
    assert "nothing to compare" in refusal([str(tmp_path)], capsys)
    write_judgments(tmp_path / "k.jsonl", [Judgment("1", "a", "b", FIRST, name) for name in ("k", "l")])
    report = [str(tmp_path), "--report", str(tmp_path / "r.html"), *QUICK]
    assert "choose with --judges from j, k, l" in refusal(report, capsys)
    assert "did you mean 'k'" in refusal([*report, "--judges", "k1", "l"], capsys)
