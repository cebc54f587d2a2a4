"""What was about to be submitted, and what came of it: a line each, on disk before the next step is taken."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_lab.runs.attempt import now
from qlora_lab.runs.files import to_json

INTENT, SUBMITTED, REFUSED, LOST = "intent", "submitted", "refused", "lost"


class Journal:
    """journal.jsonl in the folder of everything submitted for a study. Only who holds that folder's lease writes it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "journal.jsonl"

    def append(self, event: str, nonce: str, **details: Any) -> None:
        """Add a line, and return once it is on the disk."""
        line = to_json({"event": event, "nonce": nonce, "at": now(), **details}) + "\n"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and not self._ends_whole(file):
                line = "\n" + line  # whoever wrote before was killed in the middle
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return, of each submission, its intent with the last event after it and what that added."""
        found: dict[str, dict[str, Any]] = {}
        for record in self._lines():
            found.setdefault(record["nonce"], {}).update(record)
        return found

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            lines = self._file.read_bytes().split(b"\n")  # and at no other line break, which a message may hold
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:  # half a line of a killed launcher: that step was not taken
                continue

    @staticmethod
    def _ends_whole(file: Any) -> bool:
        file.seek(-1, os.SEEK_END)
        return bool(file.read(1) == b"\n")
