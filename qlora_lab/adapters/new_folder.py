"""Folders that are replaced as a whole, or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to fill, and put it in place when the block ends well.

    What was in `folder` before stays there when the block fails. Between two renames it lies beside it under a
    hidden name ending in `.previous`, where a machine that dies in that instant leaves it.

    Raises:
        OSError: the disk is full or not writable; `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    previous = fresh.with_name(f"{fresh.name}.previous")
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(previous)
        try:
            fresh.rename(folder)
        except OSError:
            if previous.exists():
                previous.rename(folder)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
