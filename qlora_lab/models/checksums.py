"""Weights compared with what the hub says of them.

A file of safetensors has no checksum, and a flipped bit of a weight is a number like any other. But the hub knows the
SHA-256 of every large file, and its downloads leave it behind: as the name of the file in its cache, or beside a folder
that `hf download --local-dir` has filled. Files of other origin are compared with the plan of the run, if at all
(runs/fingerprint.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from qlora_lab.errors import ModelError
from qlora_lab.hashing import remembered_sha256
from qlora_lab.models.location import Location

SHA256 = re.compile(r"[0-9a-f]{64}")


def check_weight_files(location: Location) -> None:
    """Compare the files that a model was read from with the hub's record of them; reads each once in a process.

    Raises:
        ModelError: a file has another content.
    """
    for file in _weight_files(location):
        expected = recorded_sha256(file)
        if expected is not None and (found := remembered_sha256(file)) != expected:
            raise ModelError(
                f"{file} is damaged: its SHA-256 is {found[:12]}, and the hub's is {expected[:12]}; {location.remedy}"
            )


def recorded_sha256(file: Path) -> str | None:
    """Return the SHA-256 that the hub gave for a file it sent, or None."""
    name = file.resolve().name
    if SHA256.fullmatch(name):
        return name
    record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    lines = record.read_text(encoding="utf-8").split() if record.is_file() else []
    return lines[1] if len(lines) > 1 and SHA256.fullmatch(lines[1]) else None  # commit, SHA-256, time


def _weight_files(location: Location) -> Iterator[Path]:
    folder = location.snapshot if location.on_hub else Path(location.name)
    if folder is None:
        return
    yield from sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
