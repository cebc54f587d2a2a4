"""Votes in their file: each once, none lost, whoever else writes and however the process ends."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.annotation.database import NotSavedError
from qlora_lab.annotation.store import Store
from qlora_lab.errors import DataError
from qlora_lab.ratings.answers import Answer
from tests.annotation.helpers import NOON, made_up, new_study
from tests.small_disk import fill, small_disk

VOTE_ALL = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from qlora_lab.annotation.store import Store

store = Store.open(Path(sys.argv[1]))
annotator = store.annotators()[0]
print("ready", flush=True)
sys.stdin.readline()
while (item := store.next_item(annotator)) is not None:
    if store.vote(annotator, item.position, sys.argv[2], 5, datetime.now(UTC)):
        print(item.position, flush=True)
"""


def voters(file: Path, *verdicts: str) -> list[subprocess.Popen]:
    """Start processes that vote for all there is at the same time, and name each position that was saved."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", VOTE_ALL, str(file), verdict], **pipes) for verdict in verdicts
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def test_votes_are_taken_back_one_by_one_and_asked_again(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann")
    (ann,) = store.annotators()
    shown = [store.next_item(ann)]
    for verdict in ("first", "tie"):
        assert store.vote(ann, shown[-1].position, verdict, 1500, NOON)
        shown.append(store.next_item(ann))
    assert [item.position for item in shown] == [0, 1, 2]
    for position, earlier in ((1, "tie"), (0, "first")):
        last = store.progress(ann).last_vote
        store.undo(ann, last)
        store.undo(ann, last)  # a second time, as from a key pressed twice
        item = store.next_item(ann)
        assert (item.position, item.earlier) == (position, earlier)
        assert store.progress(ann).judged == position
    assert store.votes() == []


def test_a_vote_sent_twice_counts_once_and_a_second_opinion_is_refused(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann")
    (ann,) = store.annotators()
    assert store.vote(ann, 0, "first", 1500, NOON)
    assert store.vote(ann, 0, "first", 1500, NOON)
    assert not store.vote(ann, 0, "second", 1500, NOON)
    (vote,) = store.votes()
    assert (vote.judgment.verdict, vote.judgment.judge, vote.milliseconds) == ("first", "human:ann", 1500)
    assert vote.voted_at == "2026-01-01T12:00:00.000+00:00"
    with pytest.raises(DataError, match="ann has no item 99"):
        store.vote(ann, 99, "first", 1, NOON)
    with pytest.raises(DataError, match="verdict must be one of first, second, tie; got 'third'"):
        store.vote(ann, 1, "third", 1, NOON)


def test_nobody_takes_back_the_vote_of_another(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann", "bo")
    ann, bo = store.annotators()
    store.vote(ann, 0, "first", 1, NOON)
    store.undo(bo, store.progress(ann).last_vote)
    assert store.progress(ann).judged == 1


def test_the_verdict_is_about_the_systems_in_the_order_shown(tmp_path):
    store = new_study(tmp_path / "s.sqlite", "ann", questions=6)
    (ann,) = store.annotators()
    orders = set()
    while (item := store.next_item(ann)) is not None:
        store.vote(ann, item.position, "first", 1, NOON)
        judgment = store.votes()[-1].judgment
        orders.add((judgment.first, judgment.second))
        answers = {f"It is {judgment.question} of {system[-1]}." for system in (judgment.first, judgment.second)}
        assert item.answers[0] == f"It is {judgment.question} of {judgment.winner[-1]}."
        assert set(item.answers) == answers
    assert len(orders) == 2


def test_a_study_goes_on_with_its_annotators_and_takes_new_ones(tmp_path):
    file = tmp_path / "new" / "s.sqlite"
    store = new_study(file, "ann")
    (ann,) = store.annotators()
    store.vote(ann, 0, "tie", 1, NOON)
    store.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600, "it holds tokens"
    again = new_study(file, "bo", "ann")
    assert [(one.name, one.number) for one in again.annotators()] == [("ann", 0), ("bo", 1)]
    assert again.annotators()[0] == ann == again.annotator(ann.token)
    assert again.progress(ann).judged == 1
    assert again.annotator("") is None
    for names in (["cy", ""], ["cy", "cy"], ["c" * 61], ["c\ny"], ["\udcff"]):
        with pytest.raises(DataError, match="--annotators must be different names of 1 to 60 characters"):
            again.add_annotators(names)


def test_an_answer_cut_in_the_middle_of_a_character_can_be_shown(tmp_path):
    answers = [Answer("1", "", "Smile.", "here: \ud83d", system) for system in "ab"]
    store = new_study(tmp_path / "s.sqlite", "ann", answers=answers)
    assert store.next_item(store.annotators()[0]).answers == ("here: \ufffd",) * 2


def test_a_file_that_is_no_study_or_another_is_refused_and_left_alone(tmp_path):
    with pytest.raises(DataError, match=r"none.sqlite does not exist; to begin a study there, name the files"):
        Store.open(tmp_path / "none.sqlite")
    new_study(tmp_path / "s.sqlite", "ann").close()
    with pytest.raises(DataError, match="holds a study of other answers, pairs or options"):
        new_study(tmp_path / "s.sqlite", questions=6)
    (tmp_path / "text").write_text("a long enough text that is certainly no database " * 30)
    with pytest.raises(DataError, match="cannot be used as the file of an annotation study: file is not a database"):
        new_study(tmp_path / "text", "ann")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(DataError, match="holds something else than an annotation study"):
        new_study(tmp_path / "other", "ann")
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty is empty; to begin a study there"):
        Store.open(tmp_path / "empty")


def test_what_was_acknowledged_survives_sigkill(tmp_path):
    file = tmp_path / "s.sqlite"
    new_study(file, "ann", questions=5000).close()
    (process,) = voters(file, "tie")
    said = [process.stdout.readline() for _ in range(40)]
    os.kill(process.pid, signal.SIGKILL)
    said += process.communicate()[0].splitlines()
    assert process.returncode == -signal.SIGKILL
    store = Store.open(file)
    (ann,) = store.annotators()
    assert len(said) <= store.progress(ann).judged < 5000
    assert store.next_item(ann).position == store.progress(ann).judged >= int(said[-1]) + 1


def test_two_processes_that_write_the_same_ratings_lose_nothing_and_ask_nothing_twice(tmp_path):
    file = tmp_path / "s.sqlite"
    store = new_study(file, "ann", questions=300)
    processes = voters(file, "first", "second")
    saved = [list(map(int, process.communicate()[0].split())) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(saved[0] + saved[1]) == list(range(300))
    votes = store.votes()
    assert [sum(vote.judgment.verdict == verdict for vote in votes) for verdict in ("first", "second")] == [
        len(part) for part in saved
    ]


def test_a_full_disk_refuses_the_vote_and_keeps_the_others(tmp_path):
    with small_disk(tmp_path / "disk", 512) as disk:
        store = new_study(disk / "s.sqlite", "ann", questions=200)
        (ann,) = store.annotators()
        ballast = fill(disk)
        saved = 0
        with pytest.raises(NotSavedError, match=r"s.sqlite could not be written: database or disk is full"):
            while (item := store.next_item(ann)) is not None:
                store.vote(ann, item.position, "first", 1, NOON)
                saved += 1
        assert store.progress(ann).judged == saved, "what was refused is not there, what was not is"
        ballast.unlink()
        assert store.vote(ann, item.position, "first", 1, NOON)
        assert store.progress(ann).judged == saved + 1
        store.close()


def test_a_study_that_does_not_fit_on_the_disk_is_begun_later(tmp_path):
    with small_disk(tmp_path / "disk", 256) as disk:
        ballast = fill(disk, leaving=40 << 10)
        with pytest.raises(NotSavedError):
            new_study(disk / "s.sqlite", "ann", answers=made_up(500))
        ballast.unlink()
        new_study(disk / "s.sqlite", "ann").close()
