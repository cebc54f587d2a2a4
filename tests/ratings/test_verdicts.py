"""What judges write, read or left unread; the released reviews are read where they are at hand."""

import json
from pathlib import Path

import pytest

from qlora_lab.ratings.judgments import FIRST, SECOND, TIE
from qlora_lab.ratings.verdicts import three_class_verdict, two_scores

RELEASED = {1: FIRST, 2: SECOND, 3: TIE}  # the release's scores
UNREAD = -1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        # codes
        ("Assistant 1 is vague.\n\n2", SECOND),
        ("All in all:\n**1**\n", FIRST),
        ("`1`", FIRST),
        ("Answer: 3", TIE),
        ("Fine answers, both.\n[[C]]", TIE),
        ("Fine.\nVerdict: Tie", TIE),
        ("Fine.\n\nFinal verdict: Assistant A", FIRST),
        ("Choice: [[2]]\nThank you for asking!", SECOND),
        ("$\\boxed{1}$", FIRST),
        ("2\n\nThe second one has its facts right.", SECOND),
        # choices of a number
        ("So I would choose 2, since it names its sources.", SECOND),
        ("My final choice is **2**.", SECOND),
        ("**Verdict:** 2 (Assistant 2)", SECOND),
        ("I first thought to choose 1, but the facts are wrong.\nI choose 2 in the end.", SECOND),
        # choices in words
        ("In short, Assistant 2's answer is slightly better, being shorter.", SECOND),
        ("Based on this, I prefer Assistant 1's answer.", FIRST),
        ("The best answer is from Assistant 2.", SECOND),
        ("The winner is Answer B.", SECOND),
        ("Response 1 wins.", FIRST),
        ("Assistant 2 has its facts wrong, so its answer is worse. Assistant 2's response is worse.", FIRST),
        ("Though Assistant 1 is better written, Assistant 2's answer is superior.", SECOND),
        ("Assistant 1's answer is deeper and well ordered, making it the better choice.", FIRST),
        ("Por lo tanto, la mejor respuesta es la del Asistente 2.", SECOND),
        ("Overall, both answers are equally good.", TIE),
        ("Both are fine, so it is a tie.", TIE),
        ("Neither answer is better.", TIE),
        ("I cannot choose between the two, as both are wrong.", TIE),
        # scores of both
        ("Assistant 1: 8/10\nAssistant 2: 9/10", SECOND),
        ("Scores: Assistant 1: 4/5, Assistant 2: 4/5", TIE),
        # nothing that is a choice, or two
        ("Assistant 1 lists 2 ideas and Assistant 2 lists 3.", None),
        ("Assistant 1 is better in style.\nIn facts, Assistant 1 is better, in depth Assistant 2 is better.", None),
        ("Assistant 1's answer is not better than Assistant 2's.", None),
        ("Assistant 1 might be better, if the date is right.", None),
        ("Assistant 1's answer is more detailed.", None),
        ("The best answer is a matter of taste.", None),
        ("1. Helpful\n2. Accurate\n3. Clear", None),
        ("I choose 3/5 for the first.", None),
        ("As an AI language model I cannot compare.", None),
        ("4", None),
        ("", None),
    ],
)
def test_verdicts_as_judges_write_them(text: str, verdict: str | None) -> None:
    assert three_class_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("9 8.5\nBoth name five ways; the first one explains them.", (9, 8.5)),
        ("The first is right.\n\nScores: 8, 7", (8, 7)),
        ("8 7\n\nOn second thoughts:\n9 9", (9, 9)),
        ("8/10 7/10", (8, 7)),
        ("8.0 | 7.0", (8, 7)),
        ("8 and 7", (8, 7)),
        ("10 9", (10, 9)),
        ("[[8]] [[9]]", (8, 9)),
        ("In the end [[8, 9]], I think.", (8, 9)),
        ("Assistant 1: 8/10\nAssistant 2: 7.5/10", (8, 7.5)),
        ("**Assistant 1:** 8\n**Assistant 2:** 9", (8, 9)),
        ("Assistant A - 6\nAssistant B - 7", (6, 7)),
        ("I rate Assistant 1's answer 8 out of 10 and Assistant 2's answer 6 out of 10.", (8, 6)),
        ("Assistant 1 receives a score of 9, and Assistant 2 receives a score of 10.", (9, 10)),
        ("11 8", None),
        ("0 5", None),
        ("8", None),
        ("Both get an 8.", None),
        ("Assistant 1: 80/100\nAssistant 2: 70/100", None),
        ("Assistant 1: 4/5\nAssistant 2: 3/5", None),
        ("", None),
    ],
)
def test_scores_as_judges_write_them(text: str, scores: tuple[float, float] | None) -> None:
    assert two_scores(text) == scores


def released_reviews(data_slices: Path) -> list[tuple[str, int]]:
    files = sorted((data_slices / "qlora_eval/pairwise_gpt4_vicuna").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(row["text"], row["score"]) for row in rows]


def test_the_released_reviews_are_read_as_the_study_read_them_and_where_it_could_not(data_slices: Path) -> None:
    reviews = released_reviews(data_slices)
    assert len(reviews) == 1600
    assert [three_class_verdict(text) for text, score in reviews if score == UNREAD] == [TIE, TIE]
    assert all(three_class_verdict(text) == RELEASED[score] for text, score in reviews if score != UNREAD)


def test_where_the_code_is_cut_off_the_words_are_read_right_or_not_at_all(data_slices: Path) -> None:
    """Of 1,598 reviews without their last line 613 are read, 610 of them as the line said."""
    reviews = [(text.rstrip().rpartition("\n")[0], score) for text, score in released_reviews(data_slices)]
    read = [(three_class_verdict(text), RELEASED[score]) for text, score in reviews if score != UNREAD]
    right = [verdict == truth for verdict, truth in read if verdict is not None]
    assert len(right) > 550
    assert sum(right) / len(right) > 0.99
