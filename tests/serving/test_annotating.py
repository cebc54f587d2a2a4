"""The annotation page shows what the models of a server answer."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_lab import annotate
from qlora_lab.annotation import from_server
from qlora_lab.errors import ModelError
from qlora_lab.ratings.stopping import StopSignal
from qlora_lab.serving.app import Limits
from qlora_lab.serving.asking import Asking
from qlora_lab.serving.scheduler import Scheduler
from qlora_lab.serving.shared_base import SharedBase
from tests.serving.server import WAIT_S, Served, served

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


@pytest.fixture
def server(shared: SharedBase) -> Iterator[Served]:
    with served(shared, Limits(max_new_tokens=6)) as found:
        yield found


def words_of(server: Served, folder: Path, count: int) -> list[str]:
    questions = folder / "questions.jsonl"
    rows = [{"question": number, "category": "made up", "prompt": f"What is {number}?"} for number in range(count)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--server", f"{server.address}/v1", "--questions", str(questions), "--systems", "a,b"]
    return [*asked, "--db", str(folder / "study.sqlite"), "--annotators", "ann", "--status"]


def answers_in(folder: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (folder / "study.sqlite.answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_answers_under_way_are_kept_when_the_command_is_stopped(
    server: Served,
    tmp_path: Path,
    signum: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    under_way, gate, work, stop = threading.Event(), threading.Event(), Scheduler.work, StopSignal.__call__

    def held_up(self: Scheduler) -> bool:
        if self.running == 1:
            under_way.set()
            gate.wait(WAIT_S)
        return work(self)

    monkeypatch.setattr(from_server, "AT_A_TIME", 1)
    monkeypatch.setattr(Scheduler, "work", held_up)
    monkeypatch.setattr(StopSignal, "__call__", lambda self, *which: (stop(self, *which), gate.set()))
    words = words_of(server, tmp_path, 4)
    stopper = threading.Thread(target=lambda: under_way.wait(WAIT_S) and os.kill(os.getpid(), signum))
    stopper.start()
    with pytest.raises(SystemExit) as ended:
        annotate.main(words)
    stopper.join()
    assert ended.value.code == 128 + signum
    assert "this command was stopped; " in (said := capsys.readouterr().err) and "the same command goes on" in said
    kept = answers_in(tmp_path)
    assert sorted(kept) == sorted(job.writing.text for job in server.jobs) and len(kept) == 1
    annotate.main(words)
    assert answers_in(tmp_path)[:1] == kept and len(answers_in(tmp_path)) == len(server.jobs) == 8
    assert "0 of 4" in capsys.readouterr().out


def test_answers_beside_one_that_fails_are_kept(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = Asking.chat

    def failing(self: Asking, adapter: str | None, turns: Any, *rest: Any, **how: Any) -> Any:
        if turns[-1].text == "What is 1?":
            raise ModelError("no answer to this one")
        return chat(self, adapter, turns, *rest, **how)

    words = words_of(server, tmp_path, 40)
    with monkeypatch.context() as patch:
        patch.setattr(Asking, "chat", failing)
        said = refusal(capsys, *words)
    assert "does not answer as it should (no answer to this one); the same command goes on" in said
    assert sorted(answers_in(tmp_path)) == sorted(job.writing.text for job in server.jobs)
    assert len(server.jobs) < 70, "nothing more is asked after a failure"
    annotate.main(words)
    assert len(answers_in(tmp_path)) == 80
