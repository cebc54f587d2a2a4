"""The annotation page shows what the models of a server answer."""

import json
from pathlib import Path

import pytest

from qlora_lab import annotate
from qlora_lab.serving.app import Limits
from qlora_lab.serving.shared_base import SharedBase
from tests.serving.server import served

TOKEN = "a secret of a test"


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit):
        annotate.main([str(word) for word in words])
    return capsys.readouterr().err


def test_people_compare_what_a_servers_adapters_answer(
    shared: SharedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, study = tmp_path / "questions.jsonl", tmp_path / "study.sqlite"
    rows = [{"question": number, "category": "made up", "prompt": f"What is {number}?"} for number in range(5)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("QLORA_LAB_TOKEN", TOKEN)
    with served(shared, Limits(max_new_tokens=6), token=TOKEN) as server:
        words = ["--server", f"{server.address}/v1", "--questions", str(questions), "--db", str(study)]
        words += ["--annotators", "ann", "--systems", "a,b", "--status"]
        annotate.main(words)
        assert "0 of 5" in capsys.readouterr().out
        asked = {(job.adapter, job.writing.text) for job in server.jobs}
        assert len(server.jobs) == 10 and {job.writing.choice.temperature for job in server.jobs} == {0}

        answers = tmp_path / "study.sqlite.answers.jsonl"
        told = [json.loads(line) for line in answers.read_text().splitlines()]
        assert {(one["system"], one["answer"]) for one in told} == asked
        assert {(one["prompt"], one["category"], one["stop_reason"]) for one in told} == {
            (row["prompt"], "made up", "length") for row in rows
        }
        study.unlink()
        answers.write_text(answers.read_text()[:-20])  # as a process that is killed leaves it
        annotate.main(words)
        assert len(server.jobs) == 11, "only the last answer is asked again"
        assert [json.loads(line) for line in answers.read_text().splitlines()] == told
        monkeypatch.setenv("QLORA_LAB_TOKEN", "wrong")
        assert "does not answer as it should (this server wants its token" in refusal(capsys, *words)
        monkeypatch.setenv("QLORA_LAB_TOKEN", TOKEN)
        rows[0]["prompt"] = "What else?"
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "to question 0 that is not asked for now; remove the file" in refusal(capsys, *words)
        words[words.index("a,b")] = "a,x"
        assert "--systems must be one of tiny_random, a, b, c, d; got 'x'" in refusal(capsys, *words)
        assert "--server needs --questions FILE" in refusal(capsys, *words[:2], "--db", study)
