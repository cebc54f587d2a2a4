"""python -m qlora_lab.judge on a stand-in endpoint: what it asks, writes, costs and says, also when luck is bad."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lab import tournament
from qlora_lab.config.command import shipped
from qlora_lab.judging import cache as cache_module
from qlora_lab.judging.settings import KINDS, load_judge
from qlora_lab.ratings.judgments import read_judgments
from qlora_lab.ratings.scores import ScoredPair, read_scores
from tests.judging.endpoint_stand_in import WAIT_S, Says, endpoint
from tests.judging.helpers import KEY, answer_files, made_up, ratings, run, words, write_answers
from tests.small_disk import fill, small_disk


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def prefers_x(body: dict[str, Any], number: int = 0) -> Says:
    """Say that x is better, wherever it is shown."""
    asked = body["messages"][1]["content"]
    return Says("Clear.\n\n1" if asked.index("x says") < asked.index("y says") else "Clear.\n\n2")


def test_both_orders_are_judged_and_every_line_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(prefers_x) as server:
        assert run(words(tmp_path, server)) == 0
    said = capsys.readouterr().out
    assert "openai" not in said and "judge-large: 6 comparisons (verdicts) of 2 systems on 3 questions" in said
    assert "judged 6 of 6 comparisons" in said and "cost: $" in said
    judgments = read_judgments(tmp_path / "ratings.jsonl")
    assert [judgment.winner for judgment in judgments] == ["x"] * 6
    assert {(judgment.question, judgment.first) for judgment in judgments} == {(q, s) for q in "012" for s in "xy"}
    row = ratings(tmp_path)[0]
    assert (row["judge"], row["model"], row["text"]) == ("judge-large", "judge-large-0613", "Clear.\n\n1")
    assert row["sampling"] == {"temperature": 0.0, "max_tokens": 1024}
    assert row["cost"] == pytest.approx((10 * row["prompt_tokens"] + 30 * row["completion_tokens"]) / 1e6)
    assert {len(row[name]) for name in ("prompt_sha256", "request_sha256")} == {64} and row["date"].endswith("+00:00")
    assert server.bodies[0]["model"] == "judge-large" and server.bodies[0]["temperature"] == 0.0


def test_nothing_is_asked_twice_and_lost_ratings_come_back_from_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(prefers_x) as server:
        assert run(words(tmp_path, server)) == 0
        first = (tmp_path / "ratings.jsonl").read_text()
        (tmp_path / "ratings.jsonl").unlink()
        assert run(words(tmp_path, server)) == 0
        assert (tmp_path / "ratings.jsonl").read_text() == first
        assert len(server.bodies) == 6
        assert run(words(tmp_path, server, questions=4)) == 0  # one question more is two comparisons
        assert len(server.bodies) == 8 and len(ratings(tmp_path)) == 8
        warmer = words(tmp_path, server, settings=["temperature=0.5"])  # another judge, so to say
        assert run(warmer) == 2
        assert "line 1: judge-large was asked with other words or with {'temperature': 0.0" in capsys.readouterr().err
        assert run([*warmer, "--out", str(tmp_path / "warmer.jsonl")]) == 0
        assert len(server.bodies) == 8 + 6
        assert run(words(tmp_path, server, settings=["model=judge-small", "name=judge-large"])) == 2
        assert "is of another judge that is called judge-large as well" in capsys.readouterr().err
        assert len(server.bodies) == 8 + 6


def test_answers_that_are_the_same_to_the_letter_are_asked_about_once(tmp_path: Path) -> None:
    with endpoint(lambda body, number: Says("3")) as server:
        command = words(tmp_path, server, questions=1)
        write_answers(tmp_path / "y.jsonl", [replace(made_up("x", 1)[0], system="y")])
        assert run(command) == 0
        assert len(server.bodies) == 1 and [row["verdict"] for row in ratings(tmp_path)] == ["tie", "tie"]


def test_scores_beside_a_reference(tmp_path: Path) -> None:
    with endpoint(lambda body, number: Says("Fine.\n\n8 6.5")) as server:
        assert run(words(tmp_path, server, "--task", "scores", "--reference", "y", "--orders", "one")) == 0
    scores = read_scores(tmp_path / "ratings.jsonl")
    assert len(scores) == 3
    assert scores[0] == ScoredPair("0", scores[0].first, scores[0].second, 8.0, 6.5, "judge-large")


def test_a_judge_that_answers_nonsense_is_reminded_once_and_then_left_unread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgetful(body: dict[str, Any], number: int) -> Says:
        if "What is 2?" in body["messages"][1]["content"]:
            return Says("I like both of them, in a way.")
        return Says("Hm." if len(body["messages"]) == 2 else "2")

    with endpoint(forgetful) as server:
        assert run(words(tmp_path, server)) == 0
        assert "2 replies could not be read" in capsys.readouterr().out
        rows = ratings(tmp_path)
        assert [row["verdict"] for row in rows].count(None) == 2 and all(row["reminded"] for row in rows)
        assert {(row["unread_text"], row["text"]) for row in rows if row["verdict"]} == {("Hm.", "2")}
        reminder = next(body["messages"] for body in server.bodies if len(body["messages"]) == 4)
        assert [message["role"] for message in reminder] == ["system", "user", "assistant", "user"]
        assert server.times_asked() == [1] * 12
        assert run(words(tmp_path, server)) == 0  # neither the nonsense nor the reminders are paid again
        assert len(server.bodies) == 12


def test_the_plan_sends_nothing_and_needs_no_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(prefers_x) as server:
        assert run(words(tmp_path, server, "--plan")) == 0
        said = capsys.readouterr().out
        assert "0 answered in the cache, 6 to ask" in said and "($10 and $30 a million" in said
        settings = ["price_per_million=null"]
        assert run(words(tmp_path, server, "--plan", settings=settings)) == 0
        assert "the price of judge-large is not known" in capsys.readouterr().out
        assert run(words(tmp_path, server, "--max-cost", "1", settings=settings)) == 2
        assert "--max-cost needs the price of judge-large" in capsys.readouterr().err
        assert run(words(tmp_path, server)) == 2
        assert "OPENAI_API_KEY must hold the endpoint's key" in capsys.readouterr().err
        assert server.bodies == [] and not (tmp_path / "ratings.jsonl").exists()


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with endpoint(prefers_x) as server:
        assert run(words(tmp_path, server)) == 2
    assert "pip install 'qlora_lab[judge]'" in capsys.readouterr().err


def test_the_budget_is_kept_over_several_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(lambda body, number: Says("word " * 3000 + "\n1")) as server:
        budget = 0.5
        command = words(tmp_path, server, "--max-cost", str(budget), settings=["max_tokens=4000", "concurrency=4"])
        for _ in range(2):  # what the first one spent counts for the second
            assert run(command) == 1
            assert f"max_cost of ${budget} would be exceeded" in capsys.readouterr().err
        spent = sum(row["cost"] for row in ratings(tmp_path))
        assert 0 < len(ratings(tmp_path)) < 6 and spent <= budget < spent + 0.14  # one more could cost $0.13
        assert run(words(tmp_path, server, "--max-cost", "2", settings=["max_tokens=4000"])) == 0
        assert len(ratings(tmp_path)) == len(server.bodies) == 6


def test_refusals_are_waited_for_and_an_hour_of_them_ends_the_command_which_then_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = {"message": "slow down", "code": "rate_limit_exceeded", "status": 429}
    with endpoint(lambda body, number: Says(**limited) if number in (0, 2, 3) else prefers_x(body)) as server:
        assert run(words(tmp_path, server, settings=["concurrency=1"])) == 0
        assert len(server.bodies) == 9
    (tmp_path / "hour").mkdir()
    hour = {"headers": {"Retry-After": "3600"}}
    with endpoint(lambda body, number: Says(**limited, **hour) if number >= 2 else prefers_x(body)) as server:
        assert run(words(tmp_path / "hour", server, settings=["concurrency=1"])) == 1
        said = capsys.readouterr().err
        [error] = [line for line in said.splitlines() if line.startswith("error")]
        assert "429: slow down" in error and "it asks to wait 3600 s more" in error and said.endswith(f"{error}\n")
        assert "judging:  33%" in said  # how far it was
        assert len(ratings(tmp_path / "hour")) == 2
        server.script = prefers_x
        assert run(words(tmp_path / "hour", server)) == 0
        assert len(ratings(tmp_path / "hour")) == 6 and len(server.bodies) == 3 + 4


def test_what_times_out_or_fails_again_and_again_is_left_for_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = threading.Event()

    def unwell(body: dict[str, Any], number: int) -> Says:
        asked = body["messages"][1]["content"]
        if "What is 0?" in asked:
            return Says("1", hold=never)
        if "What is 1?" in asked:
            return (
                Says(status=503, message="overloaded") if asked.index("x says") < asked.index("y says") else Says("1")
            )
        return Says(raw="<html>proxy</html>") if number % 2 else Says("3")

    with endpoint(unwell) as server:
        assert run(words(tmp_path, server, settings=["timeout_s=0.3", "attempts=2", "concurrency=6"])) == 1
        never.set()
        said = capsys.readouterr().err
        assert "comparisons got no reply" in said and "question 0, " in said
        assert {row["question"] for row in ratings(tmp_path)} <= {"1", "2"}
        server.script = prefers_x
        assert run(words(tmp_path, server)) == 0
        assert len(ratings(tmp_path)) == 6


def test_a_key_that_is_refused_ends_at_once_and_is_nowhere_to_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = Says(status=401, message=f"Incorrect API key provided: {KEY}", code="invalid_api_key")
    with endpoint(lambda body, number: refusal) as server:
        assert run(words(tmp_path, server, settings=["concurrency=1"])) == 2
        said = capsys.readouterr()
        assert "refuses the key (in OPENAI_API_KEY): Incorrect API key provided: ***" in said.err
        assert len(server.bodies) == 1 and server.keys == {f"Bearer {KEY}"}
        server.script = lambda body, number: Says(f"Your key is {KEY}.\n\n1")
        assert run(words(tmp_path, server)) == 0
    assert run(words(tmp_path, server, settings=[f"api_key={KEY}"])) == 2
    assert run(words(tmp_path, server, settings=[f"key_variable={KEY}"])) == 2
    said = capsys.readouterr()
    assert "api_key is no configuration key" in said.err and "not a key itself" in said.err
    assert KEY not in said.err + said.out
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 4 and not [file for file in files if KEY.encode() in file.read_bytes()]


def test_who_waits_for_a_turn_does_not_hold_up_an_end(tmp_path: Path) -> None:
    both = threading.Event()

    def limited_then_refused(body: dict[str, Any], number: int) -> Says:
        if number == 0:
            return Says(status=429, message="slow down", headers={"Retry-After": "15"}, hold=both)
        both.set()
        return Says(status=401, message="no")

    with endpoint(limited_then_refused) as server:
        assert run(words(tmp_path, server, settings=["concurrency=2"])) == 2
        assert len(server.bodies) == 2  # the one that was to wait was not sent again


def test_a_model_that_does_not_exist_is_answered_with_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Says(status=404, message="no such model", code="model_not_found")
    with endpoint(lambda body, number: missing) as server:
        assert run(words(tmp_path, server, settings=["model=judge-lage"])) == 2
    assert "it has judge-large, judge-small; did you mean 'judge-large'?" in capsys.readouterr().err


def test_a_pair_that_is_too_long_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def short_sighted(body: dict[str, Any], number: int) -> Says:
        too_long = "What is 0?" in body["messages"][1]["content"]
        return Says(status=400, message="too long", code="context_length_exceeded") if too_long else Says("3")

    with endpoint(short_sighted) as server:
        assert run(words(tmp_path, server)) == 1
        assert "2 comparisons got no reply (question 0, x and y: " in capsys.readouterr().err
        assert len(ratings(tmp_path)) == 4
    with endpoint(lambda body, number: Says(status=400, message="no temperature, please")) as server:
        (tmp_path / "ratings.jsonl").unlink()  # those of another endpoint
        assert run(words(tmp_path, server, settings=["concurrency=1"])) == 2
        assert len(server.bodies) == 1
        assert "no temperature, please); change the judge's settings" in capsys.readouterr().err


def test_answers_without_counterpart_are_warned_of_and_the_rest_is_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with endpoint(prefers_x) as server:
        command = words(tmp_path, server)
        write_answers(tmp_path / "y.jsonl", made_up("y", questions=5)[1:])
        assert run(command) == 0
    said = capsys.readouterr()
    assert "warning: 1 answers of x have no counterpart by y" in said.err and "2 answers of y" in said.err
    assert {row["question"] for row in ratings(tmp_path)} == {"1", "2"} and len(ratings(tmp_path)) == 4


def test_a_file_of_other_ratings_is_refused_before_anything_is_paid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"question": "1", "first": "x", "second": "y", "verdict": "tie", "judge": "somebody"}
    with endpoint(prefers_x) as server:
        command = words(tmp_path, server)
        for content, sentence in (
            (json.dumps(line), "holds ratings of somebody"),
            (json.dumps(line | {"judge": "judge-large"}), "line 1 is of another judge that is called judge-large"),
            ("{torn\n", "ratings.jsonl, line 1"),
        ):
            (tmp_path / "ratings.jsonl").write_text(content)
            assert run(command) == 2
            assert sentence in capsys.readouterr().err
        assert server.bodies == []


def test_bad_settings_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = answer_files(tmp_path, "x", "y")
    out = ["--out", str(tmp_path / "o.jsonl")]
    for arguments, sentence in (
        (["--judge", "opnai", *out], "did you mean 'openai'?"),
        (["--judge", "openai", "--set", "temprature=1", *out], "did you mean 'temperature'?"),
        (["--judge", "openai", "--set", "max_tokens=many", *out], "max_tokens"),
        (["--judge", "openai", "--set", "concurrency=0", *out], "concurrency must be above 0; got 0"),
        (["--judge", "openai", "--set", "base_url=https://x/v1?key=sk-1", *out], "base_url must be an address without"),
        (["--judge", "openai", "--set", "base_url=https://sk-1@x/v1", *out], "base_url must be an address without"),
        (["--judge", "local_server", *out], "model is not set"),
        (["--judge", "openai", "--task", "scores", *out], "--task scores needs --reference"),
        (["--judge", "openai", "--reference", "z", *out], "--reference must be one of x, y; got 'z'"),
        (["--judge", "openai"], "--out FILE is needed"),
    ):
        assert run([*files, *arguments]) == 2
        assert sentence in capsys.readouterr().err


def started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_lab.judge", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_stopped_in_the_middle_it_keeps_what_is_paid_for_and_goes_on(tmp_path: Path) -> None:
    gate = threading.Event()
    with endpoint(lambda body, number: Says("1", hold=gate if number >= 2 else None)) as server:
        command = words(tmp_path, server, settings=["concurrency=2"])
        process = started(command)
        server.wait_for(4)  # two are answered, two under way
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert any("paid requests under way are waited for" in line for line in iter(process.stderr.readline, ""))
        gate.set()
        _, said = process.communicate(timeout=WAIT_S)
        assert process.returncode == 143 and "the same command goes on" in said
        assert len(server.bodies) == len(ratings(tmp_path)) == 4
        assert run(command) == 0
        assert server.times_asked() == [1] * 6 and len(ratings(tmp_path)) == 6


def test_two_processes_share_the_work_and_the_claims_of_a_killed_one_are_taken_over(tmp_path: Path) -> None:
    gate = threading.Event()
    with endpoint(lambda body, number: Says("1", hold=gate if number >= 1 else None)) as server:
        command = words(tmp_path, server, settings=["concurrency=2"])
        process = started(command)
        server.wait_for(3)  # one is answered, two are claimed and under way
        ours: list[int] = []
        beside = threading.Thread(target=lambda: ours.append(run_quietly(command)))
        beside.start()
        server.wait_for(5)  # the two of the other process are left to it
        assert server.times_asked() == [1] * 5
        process.kill()
        process.communicate(timeout=WAIT_S)
        gate.set()
        beside.join(WAIT_S)
        assert ours == [0] and len(ratings(tmp_path)) == 6
        assert sorted(server.times_asked()) == [1] * 4 + [2] * 2  # only what died with the other process


def run_quietly(command: list[str]) -> int:
    """Run the command in a thread, where signals cannot be handled."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(signal, "signal", lambda number, handler: None)
        return run(command)


def test_a_full_disk_loses_nothing_that_was_paid_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "RESERVE_BYTES", 1 << 17)
    with small_disk(tmp_path / "disk", 1024) as disk, endpoint(prefers_x) as server:
        filled: list[Path] = []

        def filling(body: dict[str, Any], number: int) -> Says:
            if number == 2:
                filled.append(fill(disk))
            return Says("word " * 2000 + "\n\n1")

        server.script = filling
        command = words(tmp_path, server, "--cache", str(disk / "r.sqlite"), settings=["concurrency=1"])
        command[command.index("--out") + 1] = str(disk / "ratings.jsonl")
        assert run(command) == 1
        said = capsys.readouterr().err
        assert "make space" in said and "Traceback" not in said
        filled[0].unlink()
        assert run(command) == 0
        assert server.times_asked() == [1] * 6 and len(ratings(disk)) == 6


def test_the_ratings_make_a_tournament(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that prefers what is shown first, unless the other is by x."""
    with endpoint(lambda body, number: prefers_x(body) if number % 3 else Says("1")) as server:
        assert run(words(tmp_path, server, questions=6, settings=["concurrency=1"])) == 0
    capsys.readouterr()
    tournament.main([str(tmp_path / "ratings.jsonl"), "--orders", "20", "--draws", "20"])
    said = capsys.readouterr().out
    assert "judged by judge-large" in said and said.index("\nx ") < said.index("\ny ")


@pytest.mark.parametrize(
    "file", sorted((shipped("conf") / "evaluation/judge").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_judge_of_conf_loads(file: Path) -> None:
    needs = {"local_server": ["model=m"], "replay": ["ratings=[r]"]}
    config = load_judge(file.stem, needs.get(file.stem, []), file.parent)
    assert config.kind in KINDS and (config.kind == "replay" or config.price is not None)
