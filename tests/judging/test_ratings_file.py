"""The file of ratings that judges write, also several at once."""

import threading
from pathlib import Path
from typing import Any

from qlora_lab.judging.ratings_file import merge_ratings
from qlora_lab.ratings.judgments import json_rows

WRITERS, TIMES = 6, 8


def row(question: str, verdict: str = "tie") -> dict[str, Any]:
    return {"question": question, "first": "x", "second": "y", "verdict": verdict, "judge": "j"}


def test_who_writes_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    file, together = tmp_path / "ratings.jsonl", threading.Barrier(WRITERS)

    def write(writer: int) -> None:
        for time in range(TIMES):
            together.wait()
            merge_ratings(file, [row(f"{writer}-{time}")])

    writers = [threading.Thread(target=write, args=[writer]) for writer in range(WRITERS)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert len({found["question"] for found, _ in json_rows(file)}) == WRITERS * TIMES


def test_a_comparison_that_is_judged_again_has_one_line(tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    merge_ratings(file, [row("1"), row("2")])
    merge_ratings(file, [row("1", "first")])
    assert [found for found, _ in json_rows(file)] == [row("1", "first"), row("2")]
