"""Responses are kept, claimed by one process at a time, and paid for within a budget."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.errors import DataError
from qlora_lab.judging.cache import CLAIMED, TAKEN, TOO_DEAR, Response, ResponseCache

RESPONSE = Response("1", "judge", "stop", 100, 10, 0.25, "2026-01-01T00:00:00+00:00")
DIES_WITH_A_CLAIM = """
import os, sys
from pathlib import Path
from qlora_lab.judging.cache import ResponseCache
cache = ResponseCache(Path(sys.argv[1]))
print(cache.claim("a", "a", 5.0), flush=True)
os.kill(os.getpid(), 9)
"""


def test_responses_outlive_their_process(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "new" / "r.sqlite")
    assert cache.get("a") is None and cache.claim("a", "a") == CLAIMED
    cache.put("a", "a", "{}", RESPONSE)
    cache.close()
    again = ResponseCache(tmp_path / "new" / "r.sqlite")
    assert again.get("a") == RESPONSE and again.claim("a", "a") == TAKEN
    again.close()


def test_a_claim_is_one_processs_until_it_is_released_or_its_process_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "r.sqlite"
    one, other = ResponseCache(file), ResponseCache(file)
    assert one.claim("a", "a") == CLAIMED and other.claim("a", "a") == TAKEN and one.claim("a", "a") == TAKEN
    one.release("a")
    assert other.claim("a", "a") == CLAIMED and one.claim("a", "a") == TAKEN
    other.close()
    assert one.claim("a", "a") == CLAIMED
    one.close()


def test_a_killed_processs_claim_is_taken_over_and_its_reserve_is_free(tmp_path: Path) -> None:
    file = tmp_path / "r.sqlite"
    killed = subprocess.run([sys.executable, "-c", DIES_WITH_A_CLAIM, str(file)], capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-9, "claimed\n")
    cache = ResponseCache(file)
    cache.plan(["a", "b"])
    assert cache.claim("b", "b", 1.0, max_cost=1.0) == CLAIMED
    cache.release("b")
    assert cache.claim("a", "a", 1.0, max_cost=1.0) == CLAIMED
    cache.close()


def test_a_budget_counts_what_was_paid_and_what_others_may_still_pay(tmp_path: Path) -> None:
    one, other = ResponseCache(tmp_path / "r.sqlite"), ResponseCache(tmp_path / "r.sqlite")
    for cache in (one, other):
        cache.plan(["a", "b", "c"])
    one.claim("x", "x", 9.0)  # of another plan
    assert one.claim("a", "a", 0.5, max_cost=1.0) == CLAIMED
    one.put("a", "a", "{}", RESPONSE)  # costs a quarter
    assert one.claim("b", "b", 0.5, max_cost=1.0) == CLAIMED
    assert other.claim("c", "c", 0.5, max_cost=1.0) == TOO_DEAR
    assert other.claim("c", "c", 0.25, max_cost=1.0) == CLAIMED
    assert other.spent() == 0.25
    one.close()
    other.close()


def test_something_else_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_text("no database, but long enough to look at: " * 100)
    with pytest.raises(DataError, match="cannot be used as the cache of responses"):
        ResponseCache(tmp_path / "r.sqlite")
    assert (tmp_path / "r.sqlite").read_text().startswith("no database")


def test_what_lies_in_the_cache_is_there_for_other_programs(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "r.sqlite")
    cache.claim("a", "a")
    cache.put("a", "a", '{"model": "judge"}', RESPONSE)
    cache.close()
    with sqlite3.connect(tmp_path / "r.sqlite") as database:
        assert database.execute("SELECT request, text, cost FROM responses").fetchall() == [
            ('{"model": "judge"}', "1", 0.25)
        ]
