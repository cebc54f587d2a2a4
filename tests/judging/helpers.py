"""Answers of made-up systems, and the command that has them judged."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.judge import main
from qlora_lab.ratings.answers import Answer, answer_line
from tests.judging.endpoint_stand_in import StandIn

KEY = "sk-stand-in-0123456789abcdef"  # no key of anything
CATEGORIES = ("generic", "coding", "math")


def made_up(system: str, questions: int = 3) -> list[Answer]:
    return [
        Answer(str(number), CATEGORIES[number % 3], f"What is {number}?", f"{system} says: {number}.", system)
        for number in range(questions)
    ]


def write_answers(file: Path, answers: Sequence[Answer]) -> Path:
    file.write_text("".join(json.dumps(answer_line(answer)) + "\n" for answer in answers))
    return file


def answer_files(folder: Path, *systems: str, questions: int = 3) -> list[str]:
    return [str(write_answers(folder / f"{system}.jsonl", made_up(system, questions))) for system in systems]


def words(folder: Path, server: StandIn, *more: str, questions: int = 3, settings: Sequence[str] = ()) -> list[str]:
    """Return a command line that has two systems judged by the stand-in, quick to give up."""
    return [
        *answer_files(folder, "x", "y", questions=questions),
        *(
            "--judge",
            "openai",
            "--out",
            str(folder / "ratings.jsonl"),
            "--cache",
            str(folder / "cache/responses.sqlite"),
        ),
        *("--set", f"base_url={server.url}", "model=judge-large", "backoff_s=0.01", "max_wait_s=20", "timeout_s=30"),
        *("price_per_million.prompt=10", "price_per_million.completion=30", *settings),
        *more,
    ]


def run(arguments: Sequence[str]) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def ratings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ratings.jsonl").read_text().splitlines()]
