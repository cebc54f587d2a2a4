"""One writer at a time: leases between real processes that die, are stopped, and wake up too late."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.errors import LeaseLostError
from qlora_lab.runs import lease as leases
from qlora_lab.runs.files import write_json
from qlora_lab.runs.folder import RUNNING, RunFolder
from qlora_lab.runs.heartbeat import BEAT, STALE_S, Observer
from qlora_lab.runs.lease import Claim, Lease
from qlora_lab.runs.metrics_file import MetricsFile

# Takes the lease, then writes a line of what becomes of each word it reads.
HOLDER = """
import sys
from pathlib import Path
from qlora_lab.errors import LeaseLostError
from qlora_lab.runs.files import write_json
from qlora_lab.runs.lease import Claim
folder = Path(sys.argv[1])
lease = Claim(folder, beat_s=0.02).attempt()
print("attempt", lease.attempt, flush=True)
for line in sys.stdin:
    try:
        if line.strip() == "staged":
            with lease.staged(folder / "result.json") as file:
                file.write_text("from the first")
                print("written", flush=True)
                sys.stdin.readline()
        else:
            write_json(folder / "result.json", "from the first", lease)
        print("accepted", flush=True)
    except LeaseLostError:
        print("refused", flush=True)
"""


class Clock:
    """Monotonic seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def first(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "attempt 1\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def take_over(folder: Path) -> Lease:
    """Watch a holder that says nothing until its lease is free."""
    clock = Clock()
    claim = Claim(folder, clock=clock)
    assert claim.attempt() is None, "it was just seen for the first time"
    clock.now = STALE_S
    lease = claim.attempt()
    assert lease is not None
    return lease


def test_one_of_two_gets_it_and_numbers_are_never_used_twice(tmp_path: Path) -> None:
    lease = Claim(tmp_path).attempt()
    assert lease is not None and lease.attempt == 1
    assert Claim(tmp_path).attempt() is None
    lease.release()
    assert not lease.is_held() and not list(tmp_path.iterdir()), "a lease that is over leaves nothing"
    again = Claim(tmp_path, last_attempt=lambda: 1).attempt()
    assert again is not None and again.attempt == 2
    again.release()


def test_a_holder_that_is_gone_by_a_schedulers_word_loses_that_lease_only(tmp_path: Path) -> None:
    first = Claim(tmp_path).attempt()
    assert first is not None
    second = Claim(tmp_path, dead=first.path).attempt()
    assert second is not None and not first.is_held()
    assert Claim(tmp_path, dead=first.path).attempt() is None and second.is_held()
    first.release()
    second.release()


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    assert Observer().living([tmp_path])
    assert Claim(tmp_path).attempt() is None
    first.kill()
    first.wait()
    assert not Observer().living([tmp_path])
    lease = Claim(tmp_path).attempt()
    assert lease is not None and lease.attempt == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lease.000002"]
    lease.release()


def test_a_holder_that_beats_is_left_alone_however_long(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    clock = Clock()
    claim = Claim(tmp_path, clock=clock)
    beat = tmp_path / "lease.000001" / BEAT
    for _ in range(3):
        assert claim.attempt() is None
        before = beat.read_bytes()  # what was just seen, or later
        while beat.read_bytes() == before:
            time.sleep(0.001)
        clock.now += 10 * STALE_S
    assert claim.attempt() is None and claim.holder_moved


def test_a_stopped_holder_is_replaced_and_refused_when_it_wakes(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    first.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    second = take_over(tmp_path)
    write_json(tmp_path / "result.json", "from the second", second)
    first.send_signal(signal.SIGCONT)
    say(first, "write")
    assert heard(first) == "refused"
    assert json.loads((tmp_path / "result.json").read_text()) == "from the second"
    assert second.is_held()
    second.release()


def test_a_child_that_outlives_a_killed_holder_is_waited_for(tmp_path: Path) -> None:
    """An sbatch that hangs keeps the lock, but does not beat."""
    lease = Claim(tmp_path, beat_s=600).attempt()
    assert lease is not None
    child = subprocess.Popen(["sleep", "600"], pass_fds=[lease.fileno()])
    os.close(lease.fileno())  # as its parent's death does
    clock = Clock()
    patient = Claim(tmp_path, patient=True, clock=clock)
    for _ in range(3):
        assert patient.attempt() is None
        clock.now += 10 * STALE_S
    child.kill()
    child.wait()
    after = patient.attempt()
    assert after is not None and after.attempt == 2
    after.release()


def test_a_holder_stopped_in_the_middle_of_writing_is_refused(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    """It has checked and has written everything; all that is left to do is to put it in place."""
    say(first, "staged")
    assert heard(first) == "written"
    first.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    second = take_over(tmp_path)
    first.send_signal(signal.SIGCONT)
    say(first, "go on")
    assert heard(first) == "refused"
    assert not (tmp_path / "result.json").exists()
    second.release()


def test_a_holder_on_another_kernel_is_not_believed_dead(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    """Its lock cannot be seen from here."""
    beat = tmp_path / "lease.000001" / BEAT
    said = json.loads(beat.read_bytes().splitlines()[0])
    first.kill()
    first.wait()
    beat.write_text(json.dumps({**said, "kernel": "elsewhere"}) + "\n000000000007\n")
    take_over(tmp_path).release()


def test_a_folder_filled_after_the_lease_was_lost_is_refused(tmp_path: Path) -> None:
    """What fills it may make missing parents, and so the lost lease's own folder, again."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "of the second").touch()
    first = Claim(tmp_path).attempt()
    assert first is not None
    with pytest.raises(LeaseLostError), first.staged(tmp_path / "adapter") as staged:
        second = take_over(tmp_path)
        staged.mkdir(parents=True)
        (staged / "of the first").touch()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["of the second"]
    first.release()
    assert second.is_held() and {path.name for path in tmp_path.iterdir()} == {"adapter", second.path.name}
    second.release()


def test_a_number_that_comes_again_is_another_lease(tmp_path: Path) -> None:
    """Where no record keeps them, they begin anew once nobody has the lease."""
    first = Claim(tmp_path).attempt()
    assert first is not None
    take_over(tmp_path).release()
    third = Claim(tmp_path).attempt()
    assert third is not None and third.path == first.path
    assert not first.is_held()
    first.release()
    assert third.is_held()
    third.release()


def test_a_file_server_that_fails_for_a_while_does_not_end_the_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError(errno.EIO, "the server is away")] * 3
    stat = os.stat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if threading.current_thread().name.startswith("beat") and failures:
            raise failures.pop()
        return stat(path, **options)

    monkeypatch.setattr(leases.os, "stat", failing)
    lease = Claim(tmp_path, beat_s=0.001).attempt()
    assert lease is not None
    deadline = time.monotonic() + 60
    while (lease.path / BEAT).read_bytes().splitlines()[-1] == b"0" * leases.COUNTER_DIGITS:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    lease.release()


def test_without_locks_beats_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre, unless it was mounted with them."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(leases.fcntl, "flock", refuse)
    first = Claim(tmp_path).attempt()
    assert first is not None and first.is_held()
    second = take_over(tmp_path)
    assert second.attempt == 2 and not first.is_held()
    second.release()
    first.release()


@pytest.mark.parametrize(
    "write",
    [
        lambda run: run.end("finished", 1.0),
        lambda run: run.write_result({}),
        lambda run: run.write_evaluation([{}], []),
        lambda run: run.write_environment({}),
        lambda run: run.lease.remove(run.path / "checkpoints"),
    ],
)
def test_whatever_a_run_writes_is_refused_after_another_took_over(
    tmp_path: Path, write: Callable[[RunFolder], None]
) -> None:
    old, new = RunFolder(tmp_path), RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with old.lock():
        old.begin()
        metrics = MetricsFile(old, lambda: 1.0)
        metrics.append(1, {})
        lease = take_over(tmp_path)
        with new.holding(lease):
            new.begin()
            before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
            with pytest.raises(LeaseLostError, match="another one took over"):
                write(old)
            with pytest.raises(LeaseLostError):
                metrics.append(2, {})
            assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before
            assert (tmp_path / "checkpoints").exists()
            status = new.status()
            assert status is not None and (status["state"], status["attempt"]) == (RUNNING, 2)
            assert [attempt["attempt"] for attempt in status["history"]] == [1]


def test_a_line_that_slips_through_after_a_lease_is_lost_is_seen_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old attempt was stopped between asking for its lease and writing."""
    old, new = RunFolder(tmp_path), RunFolder(tmp_path)
    with old.lock() as lease:
        late = MetricsFile(old, lambda: 1.0)
        late.append(1, {"by": 1})
        with new.holding(take_over(tmp_path)):
            metrics = MetricsFile(new, lambda: 1.0)
            monkeypatch.setattr(lease, "check", lambda: None)
            late.append(2, {"by": 1})
            metrics.append(2, {"by": 2})
            late.append(3, {"by": 1})
            with pytest.raises(OSError, match="No such file"):
                MetricsFile(old, lambda: 1.0)
    assert [json.loads(line)["by"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    lease = Claim(tmp_path).attempt()
    assert lease is not None
    with pytest.raises(ValueError, match="in between"), lease.staged(tmp_path / "adapter") as staged:
        staged.mkdir()
        raise ValueError("in between")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["old"]
    with lease.staged(tmp_path / "adapter") as staged:
        staged.mkdir()
        (staged / "new").touch()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new"]
    lease.release()
