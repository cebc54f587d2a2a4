"""The command line: beginning and going on with a study, its export, its status."""

import json
import re
import socket
from pathlib import Path

import pytest

from qlora_lab import annotate
from qlora_lab.annotation.store import Store
from qlora_lab.ratings.answers import answer_line
from qlora_lab.ratings.judgments import read_judgments
from tests.annotation.helpers import NOON, made_up, new_study
from tests.small_disk import fill, small_disk


def run(capsys, *arguments: object) -> str:
    annotate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(capsys, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def answer_files(folder: Path, questions: int = 4, systems: str = "ab") -> list[Path]:
    folder.mkdir(exist_ok=True)
    for system in systems:
        lines = [json.dumps(answer_line(answer)) + "\n" for answer in made_up(questions, system)]
        (folder / f"{system}.jsonl").write_text("".join(lines))
    return sorted(folder.glob("*.jsonl"))


def voted(file: Path, *verdicts: str) -> None:
    """Let each annotator in turn give their next verdicts."""
    store = Store.open(file)
    for annotator, letters in zip(store.annotators(), verdicts, strict=True):
        for verdict in letters.split():
            assert store.vote(annotator, store.next_item(annotator).position, verdict, 2000, NOON)
    store.close()


def test_votes_become_judgments_that_a_tournament_reads(tmp_path, capsys):
    file, out = tmp_path / "s.sqlite", tmp_path / "ratings.jsonl"
    run(capsys, *answer_files(tmp_path / "answers"), "--db", file, "--annotators", "ann, bo", "--status")
    voted(file, "first second tie", "first")
    assert "4 votes written" in run(capsys, "--db", file, "--export", out)
    judgments = read_judgments(out)
    assert [one.verdict for one in judgments] == ["first", "second", "tie", "first"]
    assert [one.judge for one in judgments] == ["human:ann"] * 3 + ["human:bo"]
    assert {(one.first, one.second) for one in judgments} <= {("system-a", "system-b"), ("system-b", "system-a")}
    row = json.loads(out.read_text().splitlines()[0])
    assert row["category"] == "generic" and row["milliseconds"] == 2000 and row["voted_at"].startswith("2026-01-01T12")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "ratings.jsonl", "s.sqlite"], "one file each"


def test_second_votes_on_repeated_pairs_are_exported_apart(tmp_path, capsys):
    file = tmp_path / "s.sqlite"
    new_study(file, "ann", questions=4, repeat=0.5).close()
    voted(file, "first first tie first tie first")
    once, again = tmp_path / "once.jsonl", tmp_path / "again.jsonl"
    run(capsys, "--db", file, "--export", once, "--export-repeats", again)
    first, second = ({one.question: one for one in read_judgments(path)} for path in (once, again))
    assert len(first) == 4 and len(second) == 2
    assert all(second[question].first == first[question].second for question in second)


def test_status_tells_progress_and_agreement(tmp_path, capsys):
    file = tmp_path / "s.sqlite"
    store = new_study(file, "ann", "bo", questions=4, repeat=0.5)
    assert "no pair judged by both yet" in run(capsys, "--db", file, "--status")
    for annotator, favourite in zip(store.annotators(), "ab", strict=True):
        while (item := store.next_item(annotator)) is not None:
            better = "first" if item.answers[0].endswith(f"{favourite}.") else "second"
            store.vote(annotator, item.position, "tie" if "It is 0" in item.answers[0] else better, 2500, NOON)
    lines = run(capsys, "--db", file, "--status").splitlines()
    assert lines[1].split()[:5] == ["ann", "6", "of", "6", "2.5"]
    assert "2 of 2 the same (100%)" in lines[1]
    assert any(line.startswith("ann and bo: 1 of 4 the same (25%), Cohen's kappa 0.20") for line in lines)
    assert any(line.startswith("all: Krippendorff's alpha 0.") for line in lines)


def test_a_study_goes_on_with_the_same_answers_or_none_and_refuses_others(tmp_path, capsys):
    file, files = tmp_path / "s.sqlite", answer_files(tmp_path / "answers")
    run(capsys, tmp_path / "answers", "--db", file, "--annotators", "ann", "--status")
    voted(file, "first")
    for arguments in ((), files):
        assert "1 of 4" in run(capsys, *arguments, "--db", file, "--status")
    assert "holds a study of other answers" in refusal(capsys, *files, "--db", file, "--limit", 2)
    assert "--limit is chosen when a study begins" in refusal(capsys, "--db", file, "--limit", 2)
    for share in (-0.1, 0.6):
        said = refusal(capsys, *files, "--db", tmp_path / "new.sqlite", "--repeat", share)
        assert f"--repeat must be a share from 0 to 0.5; got {share}" in said
    assert not (tmp_path / "new.sqlite").exists()
    assert "name them with --annotators" in refusal(capsys, *files, "--db", tmp_path / "new.sqlite")


def test_answers_that_cannot_be_used_are_refused_by_file_and_line(tmp_path, capsys):
    file, (one, other) = tmp_path / "s.sqlite", answer_files(tmp_path / "answers")
    with one.open("a") as lines:
        lines.write('{"question": 9, "system": "a"}\n')
    assert "a.jsonl, line 5 must have question, category, prompt" in refusal(capsys, one, other, "--db", file)
    one.write_text(other.read_text().replace('"answer": "', '"answer": "not '))
    said = refusal(capsys, one, other, "--db", file)
    assert "system-b answers question 0 otherwise in" in said and "a.jsonl" in said and "b.jsonl" in said
    (tmp_path / "none").mkdir()
    assert "it has none" in refusal(capsys, tmp_path / "none", "--db", file)
    assert not file.exists(), "nothing is begun"


def test_missing_answers_are_said(tmp_path, capsys):
    one, other = answer_files(tmp_path / "answers")
    other.write_text(other.read_text().split("\n", 1)[1])
    annotate.main([str(one), str(other), "--db", str(tmp_path / "s.sqlite"), "--status"])
    assert "note: system-b answers 3 of 4 questions; pairs need both" in capsys.readouterr().err


def test_an_export_that_does_not_fit_leaves_the_old_one(tmp_path, capsys):
    file = tmp_path / "s.sqlite"
    new_study(file, "ann", questions=100).close()
    voted(file, "first " * 100)
    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "ratings.jsonl").write_text("old")
        fill(disk)
        assert "cannot be written: No space left on device; the votes are safe" in refusal(
            capsys, "--db", file, "--export", disk / "ratings.jsonl"
        )
        assert (disk / "ratings.jsonl").read_text() == "old"


def test_a_port_in_use_is_said(tmp_path, capsys):
    new_study(tmp_path / "s.sqlite", "ann").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(capsys, "--db", tmp_path / "s.sqlite", "--port", port)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use; try another port" in said


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_every_annotator_gets_a_link_and_an_address_that_others_reach_is_warned_of(
    tmp_path, capsys, monkeypatch, host, warned
):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: [one.close() for one in sockets])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    new_study(tmp_path / "s.sqlite", "ann", "bo").close()
    voted(tmp_path / "s.sqlite", "first", "")
    annotate.main(["--db", str(tmp_path / "s.sqlite"), "--host", host, "--port", "0"])
    printed = capsys.readouterr()
    links = [
        re.fullmatch(r"(\w+): http://[^/]+:\d+/a/([\w-]{22}) \((\d) of 5 judged\)", line)
        for line in printed.out.splitlines()[:2]
    ]
    assert [(link[1], link[3]) for link in links] == [("ann", "1"), ("bo", "0")]
    assert links[0][2] != links[1][2]
    assert ("can be reached from other machines" in printed.err) == warned


def test_without_the_extra_the_page_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(annotate, "PACKAGES", ("json", "no_such_package"))
    new_study(tmp_path / "s.sqlite", "ann").close()
    said = refusal(capsys, "--db", tmp_path / "s.sqlite")
    assert "the page needs no_such_package; install them with `pip install 'qlora_lab[annotate]'`" in said


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback_is_told_from_what_others_reach(host, loopback):
    assert annotate.is_loopback(host) == loopback
