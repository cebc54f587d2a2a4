"""A model of this project as a judge."""

from pathlib import Path

import pytest

from tests.judging.helpers import answer_files, ratings, run

LONGER = "model.max_length_tokens=4096,model.architecture.max_position=4096"
TINY = f"overrides=[model=tiny_random,quant=none,{LONGER}]"


def test_a_local_model_judges_and_is_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        *answer_files(tmp_path, "x", "y", questions=2),
        *("--judge", "local_model", "--out", str(tmp_path / "ratings.jsonl"), "--cache", str(tmp_path / "c.sqlite")),
        *("--set", TINY, "max_tokens=8", "batch=3"),
    ]
    assert run(command) == 0
    rows = ratings(tmp_path)
    assert len(rows) == 4 and {row["judge"] for row in rows} == {"tiny_random"}
    assert all(row["reminded"] and 0 < row["completion_tokens"] <= 16 for row in rows if row["verdict"] is None)
    assert "4 comparisons (verdicts)" in capsys.readouterr().out
    assert run([*command, "--plan"]) == 0
    assert "4 answered in the cache, 0 to ask" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "other.jsonl")]
    assert run([*command, *out, "--plan", "--set", f"overrides=[model=tiny_random,quant=nf4,{LONGER}]"]) == 0
    assert "0 answered in the cache, 4 to ask" in capsys.readouterr().out  # other weights are another judge
    assert run([*command, *out, "--set", "max_tokens=4000"]) == 1
    assert "tiny_random has room for 96 before a reply of 4000" in capsys.readouterr().err
