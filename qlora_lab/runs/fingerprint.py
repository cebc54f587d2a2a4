"""The content of a data file as part of a run's identity."""

import hashlib
from pathlib import Path

from qlora_lab.config.schema import SourceConfig


def data_file(path: str, data_dir: Path) -> Path:
    """Return where a source's file lies: absolute, below `data_dir`, or below the working folder."""
    candidates = [Path(path)] if Path(path).is_absolute() else [data_dir / path, Path(path)]
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def source_fingerprint(source: SourceConfig, data_dir: Path) -> str | None:
    """Return the sha256 of a source's local file; None for other kinds, or while the file is missing."""
    if source.kind != "file" or source.path is None:
        return None
    file = data_file(source.path, data_dir)
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
