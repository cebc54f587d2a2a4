"""A model of this project as a judge."""

from pathlib import Path

import pytest

from tests.evaluation.finished_runs import finished, planned
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


def test_a_finished_run_judges_with_its_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = ("optim.learning_rate=0.05", *LONGER.split(","))
    folder = finished(tmp_path / "runs", *longer)
    base = f"overrides=[model=tiny_random,{LONGER}]"
    said = {}
    for name, settings in (
        ("base", [base]),
        ("run", [f"run={folder.run_id}", f"overrides=[paths.runs_dir={tmp_path}/runs]"]),
    ):
        (place := tmp_path / name).mkdir()
        files = answer_files(place, "x", "y", questions=1)
        out = ("--out", str(place / "ratings.jsonl"), "--cache", str(tmp_path / "c.sqlite"))
        assert run([*files, "--judge", "local_model", *out, "--set", *settings, "max_tokens=8"]) == 0
        said[name] = [row["text"] for row in ratings(place)]
    assert said["run"] != said["base"] and {row["judge"] for row in ratings(tmp_path / "run")} == {folder.run_id}
    begun = planned(tmp_path / "runs", *longer, "seed=1")
    assert run([*files, "--judge", "local_model", *out, "--set", f"run={begun.path}"]) == 2
    assert f"run {begun.run_id} is new, and only finished runs are evaluated" in capsys.readouterr().err
    assert run([*files, "--judge", "local_model", *out, "--set", "run=12e345678901"]) == 2  # no number
    assert "'12e345678901' is no run in" in capsys.readouterr().err
    assert run([*files, "--judge", "openai", *out, "--set", "run=0123456789ab", "model=gpt-4"]) == 2
    assert "run is for a local judge" in capsys.readouterr().err
