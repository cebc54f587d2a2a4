"""A model of this project as a judge."""

from pathlib import Path

import pytest

from qlora_lab.judging.cache import Response
from qlora_lab.judging.local import LocalJudge, local_model
from qlora_lab.judging.settings import JudgeConfig
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
    runs = f"paths.runs_dir={tmp_path}"
    folder, begun = finished(tmp_path, "optim.learning_rate=0.05"), planned(tmp_path, "seed=1")
    said = {}
    for name, settings in (
        ("base", JudgeConfig(kind="local", overrides=["model=tiny_random"], max_tokens=8)),
        ("run", JudgeConfig(kind="local", run=folder.run_id, overrides=[runs], max_tokens=8)),
    ):
        model = local_model(settings)
        named = model.named(settings)
        [reply] = LocalJudge(named, model).ask([[{"role": "user", "content": "Which of the two?"}]])
        assert isinstance(reply, Response)
        said[name] = (named.judge, reply.text)
    assert said["base"][0] == "tiny_random in nf4" and said["run"][0] == folder.run_id
    assert said["run"][1] != said["base"][1]
    files = [*answer_files(tmp_path, "x", "y", questions=1), "--out", str(tmp_path / "o.jsonl"), "--plan"]
    for arguments, sentence in (
        (["local_model", "--set", f"run={begun.path}"], f"run {begun.run_id} is new, and only finished runs"),
        (["local_model", "--set", "run=12e345678901"], "'12e345678901' is no run in"),  # and no number
        (["openai", "--set", "run=0123456789ab", "model=gpt-4"], "run is for a local judge"),
    ):
        assert run([*files, "--judge", *arguments]) == 2
        assert sentence in capsys.readouterr().err
