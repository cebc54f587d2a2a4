"""Scores relative to a reference system."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlora_lab.errors import DataError
from qlora_lab.ratings.relative import relative_scores
from qlora_lab.ratings.scores import ScoredPair, write_scores
from qlora_lab.tournament import main


def scored(question: str, its: float | None, references: float | None, *, reference_first: bool) -> ScoredPair:
    if reference_first:
        return ScoredPair(question, "chat", "mine", references, its, "j")
    return ScoredPair(question, "mine", "chat", its, references, "j")


def test_percent_is_of_totals_over_both_orders() -> None:
    scores = [
        scored("1", 4.0, 8.0, reference_first=True),
        scored("2", 9.0, 9.0, reference_first=True),
        scored("1", 8.0, 4.0, reference_first=False),
        scored("3", None, None, reference_first=False),
        ScoredPair("1", "mine", "another", 1.0, 10.0, "j"),
    ]
    (mine,) = relative_scores(scores, "chat", draws=50)
    assert (mine.system, mine.pairs, mine.unread, mine.questions) == ("mine", 3, 1, 3)
    assert mine.percent == pytest.approx(100 * 21 / 21)
    assert mine.reference_first == pytest.approx(100 * 13 / 17)
    assert mine.system_first == pytest.approx(200)


def test_the_interval_covers_what_other_questions_would_give() -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        its, references = generator.normal(6, 1.5, 40), generator.normal(8, 1, 40)
        scores = [
            scored(str(question), pair[0], pair[1], reference_first=True)
            for question, pair in enumerate(zip(its, references, strict=True))
        ]
        (mine,) = relative_scores(scores, "chat", draws=200)
        covered.append(mine.low <= 75 <= mine.high)
        assert np.isnan(mine.system_first)
    assert 0.85 <= np.mean(covered) <= 1


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(DataError, match="--reference must be one of chat, mine; got 'chta'; did you mean 'chat'"):
        relative_scores([scored("1", 1.0, 2.0, reference_first=True)], "chta")


def test_the_command_tells_relative_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scores(tmp_path / "s.jsonl", [scored("1", 6.0, 8.0, reference_first=order) for order in (True, False)])
    main([str(tmp_path), "--reference", "chat", "--draws", "20"])
    assert "75.0 %" in capsys.readouterr().out
    main([str(tmp_path), "--reference", "chat", "--draws", "20", "--json"])
    assert json.loads(capsys.readouterr().out)["relative"][0]["pairs"] == 2
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "--reference" in capsys.readouterr().err
