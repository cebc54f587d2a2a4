"""When requests may go, by a clock of its own."""

import threading

import pytest

from qlora_lab.errors import JudgeError
from qlora_lab.judging.pace import Pace, Stopping


class Clock(threading.Event):
    """A clock that goes on only while somebody waits for the command to end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        return self.is_set()


def pace(clock: Clock, requests_per_minute: float | None = None, max_wait_s: float = 60.0) -> Pace:
    return Pace(requests_per_minute, backoff_s=1.0, max_wait_s=max_wait_s, stop=clock, clock=clock)


def test_so_many_requests_a_minute_go() -> None:
    clock = Clock()
    ours = pace(clock, requests_per_minute=30)
    assert [ours.wait() - 100 for _ in range(4)] == pytest.approx([0, 2, 4, 6])


def test_pauses_double_and_the_server_decides_where_it_says_how_long() -> None:
    clock = Clock()
    ours, pauses = pace(clock), []
    for retry_after_s in (None, None, None, 7.0):
        sent_at = ours.wait()
        ours.refused(sent_at, "no", retry_after_s)
        pauses.append(ours.wait() - sent_at)
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2 <= pauses[2] <= 4 and pauses[3] == 7
    ours.replied()
    sent_at = ours.wait()
    ours.refused(sent_at, "no")
    assert ours.wait() - sent_at <= 1  # a reply between, and it begins anew


def test_refusals_of_requests_that_went_together_are_one() -> None:
    clock = Clock()
    ours = pace(clock)
    sent = [ours.wait() for _ in range(8)]
    clock.now += 0.01
    for sent_at in sent:
        ours.refused(sent_at, "no")
    assert ours.wait() - sent[0] <= 1.01


def test_waiting_has_an_end() -> None:
    clock = Clock()
    ours = pace(clock, max_wait_s=60.0)
    with pytest.raises(JudgeError, match=r"busy, for \d+ s without a single reply, which is more than max_wait_s=60"):
        while True:
            ours.refused(ours.wait(), "busy")
    assert 130 < clock.now <= 160
    with pytest.raises(JudgeError, match="it asks to wait 3600 s more"):
        pace(clock).refused(clock.now, "busy", 3600.0)


def test_nobody_waits_for_a_command_that_ends() -> None:
    clock = Clock()
    ours = pace(clock)
    ours.refused(ours.wait(), "no")
    clock.set()
    with pytest.raises(Stopping):
        ours.wait()
