"""People's votes in the layout of the QLoRA study's release (eval/ratings-human/*.csv).

A row is one vote of one worker: `hit_id_hash`, `worker_id_hash`, `system_a`, `system_b` (in the order shown), `prompt`,
the two generations, and `answer`: system_a, system_b or tie. Questions have no id there; their text tells it.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from qlora_lab.errors import DataError
from qlora_lab.ratings.judgments import FIRST, HUMAN, SECOND, TIE, Judgment

COLUMNS = ("worker_id_hash", "system_a", "system_b", "prompt", "answer")
VERDICTS_OF_PEOPLE = {"system_a": FIRST, "system_b": SECOND, "tie": TIE}
LLAMA_33B = {"33": "30"}  # what people's votes call 33b, files of generations call 30b


def read_people(file: Path, questions: Mapping[str, str]) -> list[Judgment]:
    """Read a file of votes; the judge is human:WORKER.

    Args:
        questions: the id of each question's text.

    Raises:
        DataError: a column is missing, or a row has another answer or a question of no known id; names file and line.
    """
    csv.field_size_limit(2**31 - 1)  # whole answers stand in the cells
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{file} must have the columns {', '.join(COLUMNS)}; got no {', '.join(missing)}")
            return [_vote(row, f"{file}, line {reader.line_num}", questions) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} must be a CSV file of votes; got {error}") from error


def text_key(prompt: str) -> str:
    """Return a question's text without differences of white space."""
    return " ".join(prompt.split())


def _vote(row: dict[str, str], place: str, questions: Mapping[str, str]) -> Judgment:
    if row["answer"] not in VERDICTS_OF_PEOPLE:
        raise DataError(f"{place}: answer must be one of {', '.join(VERDICTS_OF_PEOPLE)}; got {row['answer']!r}")
    question = questions.get(text_key(row["prompt"] or ""))
    if question is None:
        raise DataError(
            f"{place}: no question has the text {text_key(row['prompt'] or '')[:60]!r}; votes of the release need "
            "--questions with the file of its questions"
        )
    first, second = _system(row["system_a"]), _system(row["system_b"])
    if first == second:
        raise DataError(f"{place}: system_a and system_b must be different systems; got '{first}' twice")
    return Judgment(question, first, second, VERDICTS_OF_PEOPLE[row["answer"]], f"{HUMAN}:{row['worker_id_hash']}")


def _system(name: str) -> str:
    """Return the name that files of generations have for a system: guanaco-33b is 30b-guanaco there."""
    size = re.match(r"^guanaco-(\d+)b$", name)
    return f"{LLAMA_33B.get(size[1], size[1])}b-guanaco" if size else name
