"""Files that are either whole or absent: written under another name, flushed to disk, then renamed."""

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_lab.runs.lease import Lease

# another file system, one without links, another user's file, or a file that has all the names it may have
NO_LINK = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMLINK)


def write_atomic(path: Path, content: str | bytes, lease: Lease | None = None) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the new one.

    Args:
        lease: of the run; without it the file is written whatever others do.

    Raises:
        LeaseLostError: a later attempt has the run; `path` is as that one wants it.
        OSError: the disk is full or not writable; `path` is unchanged and nothing is left behind.
    """
    data = content.encode() if isinstance(content, str) else content
    with _written_whole(path, lease) as file:
        file.write(data)


def link_or_copy(source: Path, path: Path, lease: Lease | None = None) -> None:
    """Make `path` a second name of a file that nobody changes, or a copy of it where the file system gives none.

    Raises:
        LeaseLostError: a later attempt has the run; `path` is as that one wants it.
        OSError: `source` cannot be read, or the disk is full or not writable; `path` is unchanged.
    """
    if path.exists() and path.samefile(source):
        if lease is not None:
            lease.check()
        return  # renaming a file over another name of itself does nothing, and would leave both
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _staged(path, lease) as temporary:
            os.link(source.resolve(), temporary)
            with source.open("rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        with source.open("rb") as content, _written_whole(path, lease) as copy:
            shutil.copyfileobj(content, copy)


@contextmanager
def _written_whole(path: Path, lease: Lease | None) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _staged(path, lease) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _staged(path: Path, lease: Lease | None) -> AbstractContextManager[Path]:
    return lease.staged(path) if lease is not None else _staged_beside(path)


@contextmanager
def _staged_beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(value: Any, indent: int | None = None) -> str:
    """Return valid JSON, which has no NaN and no infinity: they become null, a value that is missing."""
    return json.dumps(_finite_or_null(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any, lease: Lease | None = None) -> None:
    write_atomic(path, to_json(value, indent=2) + "\n", lease)


def write_json_lines(path: Path, records: list[dict[str, Any]], lease: Lease | None = None) -> None:
    write_atomic(path, "".join(to_json(record) + "\n" for record in records), lease)


def whole_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Return the lines of a file that grows by lines, and half of one that a killed process left at its end."""
    *lines, torn = path.read_bytes().split(b"\n")
    return lines, torn


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return value
