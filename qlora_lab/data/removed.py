"""The rows that may not be trained on: counted by reason, and each of them listed in a file as it is removed."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qlora_lab.data.rows import Row

SHOWN_CHARACTERS = 80


class Removed:
    """Counts rows that are removed, and writes a line for each, so that any number of them takes no memory.

    Args:
        file: gets JSON lines: the reason, what makes it one, and the row by its key and beginning.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.counts: Counter[str] = Counter()  # by reason

    def add(self, row: Row, reason: str, because: str) -> None:
        self.counts[reason] += 1
        beginning = (row.source or row.target)[:SHOWN_CHARACTERS]
        line = {"reason": reason, "because": because, "key": row.key, "row": beginning}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class RemovedRows:
    """The list that `Removed` wrote, read from its file line by line.

    Attributes:
        keep: what the file lives as long as, such as a temporary folder.
    """

    path: Path
    count: int
    keep: Any = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
