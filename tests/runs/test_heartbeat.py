"""Who lives and who is dead, on machines whose locks and clocks say nothing."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lab.runs import folder as folders
from qlora_lab.runs import heartbeat
from qlora_lab.runs.folder import INTERRUPTED, RUNNING, RunFolder
from qlora_lab.runs.heartbeat import BEAT, STALE_S, Observer
from qlora_lab.sweep.states import read_states

HOLDER = """
import sys
from pathlib import Path
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.lease import Claim
lease = Claim(Path(sys.argv[1]), beat_s=0.02).attempt()
run = RunFolder(Path(sys.argv[1]), lease)
run.begin()
print("begun", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[tuple[RunFolder, subprocess.Popen[str]]]]:
    """Two runs, each executed by a process of its own."""
    found = []
    for number in range(2):
        folder = tmp_path / f"{number:012x}"
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        found.append((RunFolder(folder), process))
    for _, process in found:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
    yield found
    for _, process in found:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """We are on another machine than the runs."""
    monkeypatch.setattr(heartbeat, "_kernel", lambda: "another")


@pytest.fixture
def locks_stay_on_their_node(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre with `localflock`, or NFS with `local_lock`: every lock of another node seems to be free."""
    monkeypatch.setattr(heartbeat.fcntl, "flock", lambda file, operation: None)


class Waiting:
    """A clock on which each look is a second later; the holders have as much time as they need to beat."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1.0
        time.sleep(0.05)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def observer() -> tuple[Observer, Waiting]:
    waiting = Waiting()
    return Observer(clock=waiting, sleep=waiting.sleep), waiting


def never(seconds: float) -> None:
    raise AssertionError("a lock that is seen needs no waiting")


def test_on_the_same_machine_nobody_waits(runs: list[tuple[RunFolder, subprocess.Popen[str]]]) -> None:
    paths = [run.path for run, _ in runs]
    assert Observer(sleep=never).living(paths) == set(paths)
    kill(runs[0][1])
    assert Observer(sleep=never).living(paths) == {paths[1]}


def test_a_lock_that_is_held_is_believed_on_any_machine(
    runs: list[tuple[RunFolder, subprocess.Popen[str]]], elsewhere: None
) -> None:
    paths = [run.path for run, _ in runs]
    assert Observer(sleep=never).living(paths) == set(paths)


def test_where_locks_do_not_cross_the_beat_tells_running_from_dead(
    runs: list[tuple[RunFolder, subprocess.Popen[str]]],
    locks_stay_on_their_node: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watch, waiting = observer()
    monkeypatch.setattr(folders, "OBSERVER", watch)
    (alive, _), (dead, process) = runs
    kill(process)
    states = read_states(alive.path.parent, [alive.run_id, dead.run_id])
    assert [state.state for state in states.values()] == [RUNNING, INTERRUPTED]
    assert waiting.now == pytest.approx(STALE_S, abs=1), "the silence of all is waited for together"
    assert capsys.readouterr().err.count("waiting for the heartbeat of 2 runs on other machines") == 1
    since = waiting.now
    assert (alive.state(), dead.state()) == (RUNNING, INTERRUPTED)
    assert waiting.now == since, "what was seen is remembered"


def test_no_clock_of_the_runs_machine_is_asked(
    runs: list[tuple[RunFolder, subprocess.Popen[str]]], locks_stay_on_their_node: None
) -> None:
    (alive, living), (dead, process) = runs
    kill(process)
    os.utime(dead.path / "lease.000001" / BEAT, (2**33, 2**33))
    watch, waiting = observer()

    def sleep(seconds: float) -> None:
        waiting.sleep(seconds)
        os.utime(alive.path / "lease.000001" / BEAT, (0, 0))

    watch._sleep = sleep
    assert watch.living([alive.path, dead.path]) == {alive.path}
    kill(living)
    waiting.now += STALE_S + 1  # it beat when it was seen last: one look sees that, and the next that it is silent
    watch.living([alive.path])
    waiting.now += STALE_S + 1
    assert watch.living([alive.path]) == set()


def test_a_run_that_ends_while_its_heartbeat_is_waited_for_has_ended(
    runs: list[tuple[RunFolder, subprocess.Popen[str]]],
    locks_stay_on_their_node: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, process = runs[0]
    kill(process)

    def end(seconds: float) -> None:
        run.end("finished", 1.0)
        (run.path / "lease.000001").rename(run.path / ".claim-gone")

    monkeypatch.setattr(folders, "OBSERVER", Observer(sleep=end))
    assert read_states(run.path.parent, [run.run_id])[run.run_id].state == "finished"
    monkeypatch.setattr(folders, "OBSERVER", Observer(sleep=never))
    assert run.state() == "finished"
