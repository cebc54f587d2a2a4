"""A study's evidence as a folder: whole or absent, checked by its hashes, replayed to the same table, not private."""

import json
import shlex
import shutil
import socket
from pathlib import Path

import pytest

from qlora_lab import agreement, tournament
from qlora_lab.publishing.public import public
from qlora_lab.ratings.answers import Answer, answer_line
from qlora_lab.ratings.judgments import FIRST, Judgment, write_judgments
from qlora_lab.ratings.scores import ScoredPair, write_scores
from qlora_lab.release import main
from qlora_lab.runs.folder import RunFolder
from tests.helpers import tiny
from tests.ratings.helpers import STRENGTHS, played

QUICK = ["--draws", "50"]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Files of a judge, of two people, of scores and of answers, with fields of their own."""
    folder = tmp_path / "private-folder-name"
    folder.mkdir()
    write_judgments(folder / "judge.jsonl", played())
    people = [Judgment("0", "good", "poor", FIRST, f"human:{name}") for name in ("Maria", "Jo")]
    rows = [{**vars(vote), "token": "annotator-token-1", "seconds": 3} for vote in people]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_scores(folder / "scores.jsonl", [ScoredPair("0", "good", "poor", 8.0, 4.0, "made up")])
    answers = [
        {
            **answer_line(Answer(str(question), "math", f"What is {question} + 1?", f"see /usr/bin/bc {name}", name)),
            "settings": {"adapter": f"{folder}/runs/adapter", "temperature": 0.7, "host": "node17.example"},
            "stop_reason": "eos",
        }
        for question in range(40)
        for name in STRENGTHS
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return [str(folder)]


def table(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    tournament.main([*arguments, "--judge", "made up", "--orders", "50", "--json", *QUICK])
    return capsys.readouterr().out


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_release_replays_to_the_same_table(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([str(out), *sources])
    assert "files as released" in capsys.readouterr().out
    before = table([f"{sources[0]}/judge.jsonl", "--answers", f"{sources[0]}/answers.jsonl", "--length"], capsys)
    assert table([str(out / "ratings"), "--answers", str(out / "answers"), "--length"], capsys) == before
    agreement.main([str(out / "ratings"), *QUICK])
    assert "human and made up" in capsys.readouterr().out
    main([str(out), "--verify"])


def test_nothing_private_is_in_it(sources: list[str], tmp_path: Path) -> None:
    main([str(tmp_path / "out"), *sources])
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    published = "\n".join(file.read_text() for file in files)
    for private in (
        str(tmp_path),
        "private-folder-name/runs",
        "Maria",
        "annotator-token",
        "node17",
        socket.gethostname(),
    ):
        assert private not in published, private
    row = json.loads((tmp_path / "out/answers/good.jsonl").read_text().split("\n")[0])
    assert row["settings"] == {"adapter": "adapter", "temperature": 0.7} and row["stop_reason"] == "eos"
    assert row["answer"] == "see /usr/bin/bc good", "what a model wrote is evidence"
    votes = [json.loads(line) for line in (tmp_path / "out/ratings/human-1.jsonl").read_text().splitlines()]
    assert votes[0]["judge"] == "human:1" and votes[0]["seconds"] == 3


def test_a_secret_in_an_answer_stops_the_release(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "see /usr/bin/bc good")
    said = refusal([str(tmp_path / "out"), *sources], capsys)
    assert "answers/good.jsonl, line 1 would publish the secret in $SOME_API_KEY" in said
    assert "/usr/bin/bc" not in said
    assert [file for file in tmp_path.iterdir() if "out" in file.name] == [], "half a release is no release"


def test_the_manifest_is_looked_through_as_well(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USER", "somebody.known")
    folder = tmp_path / "somebody.known"
    folder.mkdir()
    shutil.copy(f"{sources[0]}/judge.jsonl", folder)
    monkeypatch.chdir(tmp_path)
    said = refusal(["out", "somebody.known"], capsys)
    assert "manifest.json, line" in said and "would publish the name of its user" in said
    assert not (tmp_path / "out").exists()


def test_a_short_name_is_looked_for_as_a_word_and_told(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USER", "bc")
    monkeypatch.setenv("LOGNAME", "oo")  # only inside of words
    main([str(tmp_path / "out"), *sources])
    said = capsys.readouterr().err
    assert "warning: 'bc', which is the name of its user, stands in " in said and "first in answers/" in said
    assert "'oo'" not in said


def test_what_to_run_is_told_for_every_judge(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "out"), *sources])
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("    python -m qlora_lab.")]
    assert [command[0] for command in commands] == [
        *("qlora_lab.release", "qlora_lab.tournament", "qlora_lab.tournament", "qlora_lab.tournament"),
        "qlora_lab.agreement",
    ]
    assert [command[command.index("--judge") + 1] for command in commands[1:4]] == ["human", "made up", "made up"]
    monkeypatch.chdir(tmp_path / "out")
    tournament.main([*commands[2][1:], "--orders", "50", *QUICK])
    tournament.main([*commands[3][1:], "--orders", "50", *QUICK])
    assert "scores as a part of" in capsys.readouterr().out


def test_a_run_is_released_with_its_settings_and_answers(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs", "model=tiny_random")
    run = RunFolder.create(tmp_path / "runs", "0123456789ab", config)
    run.write_environment(
        {"python": "3.11", "cpu": "a cpu", "command": ["train.py", f"paths.runs_dir={tmp_path}/runs"]}
    )
    evaluation = run.path / "evaluations" / "vicuna-1a2b"
    evaluation.mkdir(parents=True)
    (evaluation / "config.yaml").write_text(f"temperature: 0.7\npath: {tmp_path}/questions.jsonl\n")
    (evaluation / "result.json").write_text('{"answered": 1}')
    (evaluation / "answers.jsonl").write_text(json.dumps(answer_line(Answer("1", "", "Why?", "So.", "mine"))) + "\n")
    (evaluation / "items.jsonl").write_text('{"loss": 1}\n')
    out = tmp_path / "out"
    main([str(out), str(run.path)])
    told = json.loads((out / "runs" / "0123456789ab.json").read_text())
    assert told["config"]["model"]["name"] == config.model.name and "paths" not in told["config"]
    assert told["environment"]["command"] == ["train.py", "paths.runs_dir=runs"] and "cpu" not in told["environment"]
    (interrupted := run.path / "evaluations" / "probes-3c4d").mkdir()
    (interrupted / "config.yaml").write_text("temperature: 0.1\n")
    (interrupted / "answers.jsonl").write_text(json.dumps(answer_line(Answer("p", "", "Who?", "Me.", "mine"))) + "\n")
    alone = tmp_path / "runs" / "bases" / "tiny-5e6f" / "evaluations" / "vicuna-1a2b"
    shutil.copytree(evaluation, alone)
    (alone / "answers.jsonl").write_text(json.dumps(answer_line(Answer("1", "", "Why?", "No.", "base"))) + "\n")
    main([str(tmp_path / "more"), str(run.path), str(alone.parents[1])])
    of = {
        str(file.relative_to(tmp_path / "more/evaluations")): json.loads(file.read_text())
        for file in (tmp_path / "more/evaluations").rglob("*.json")
    }
    settings = {"temperature": 0.7, "path": "questions.jsonl"}
    assert of == {
        "0123456789ab/vicuna-1a2b.json": {"config": settings, "result": {"answered": 1}},
        "0123456789ab/probes-3c4d.json": {"config": {"temperature": 0.1}, "result": None},
        "tiny-5e6f/vicuna-1a2b.json": {"config": settings, "result": {"answered": 1}},
    }
    main([str(tmp_path / "one"), str(alone)])
    assert [file.name for file in (tmp_path / "one/evaluations").rglob("*.json")] == ["vicuna-1a2b.json"]
    assert json.loads((out / "answers" / "mine.jsonl").read_text())["answer"] == "So."
    assert str(tmp_path) not in "".join(file.read_text() for file in out.rglob("*") if file.is_file())


def test_a_full_disk_leaves_nothing(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_lab.publishing.manifest.write_json", full)
    assert "cannot be written: [Errno 28] No space left" in refusal([str(tmp_path / "out"), *sources], capsys)
    assert [file for file in tmp_path.iterdir() if "out" in file.name] == []


def test_a_release_is_never_written_over(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert "is there already" in refusal([str(tmp_path / "out"), *sources], capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_release_that_was_touched_or_is_half_is_refused(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main([str(out), *sources])
    with (out / "ratings" / "made-up.jsonl").open("a") as file:
        file.write("\n")
    (out / "answers" / "good.jsonl").unlink()
    (out / "answers" / "more.jsonl").write_text("")
    said = refusal([str(out), "--verify"], capsys)
    for wrong in ("answers/good.jsonl is missing", "more.jsonl is not in manifest", "made-up.jsonl has changed"):
        assert wrong in said
    (out / "manifest.json").unlink()
    assert "is no whole release" in refusal([str(out), "--verify"], capsys)


def test_two_answers_to_one_question_are_not_released_together(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.jsonl"
    again.write_text(json.dumps(answer_line(Answer("7", "", "What?", "Another.", "good"))) + "\n")
    assert "good answers question 7 otherwise in" in refusal([str(tmp_path / "out"), *sources, str(again)], capsys)
    again.write_text(json.dumps(answer_line(Answer("7", "", "What?", "see /usr/bin/bc good", "good"))) + "\n")
    main([str(tmp_path / "same"), *sources, str(again)])
    assert len((tmp_path / "same/answers/good.jsonl").read_text().splitlines()) == 40


def test_files_that_are_no_evidence_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text('{"loss": 1}\n')
    assert "x.jsonl" in refusal([str(tmp_path / "out"), str(tmp_path / "x.jsonl")], capsys)
    assert "name some" in refusal([str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(
    ("told", "published"),
    [
        ("model.path=/home/me/models/tiny paths.runs_dir=~/x/runs", "model.path=tiny paths.runs_dir=runs"),
        ("https://huggingface.co/a/b and 3/4", "https://huggingface.co/a/b and 3/4"),
        ({"wandb_api_key": "x", "max_tokens": 5, "token": 1, "key": 2}, {"max_tokens": 5}),
        (["/a/b", None, 1.5], ["b", None, 1.5]),
        ("file:///home/me/a.json,disk:/home/me/b s3://bucket/c", "file://a.json,disk:b s3://bucket/c"),
    ],
)
def test_what_is_published_of_settings(told: object, published: object) -> None:
    assert public(told) == published
