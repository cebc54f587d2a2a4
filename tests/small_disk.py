"""A small file system, to be filled: a tmpfs, which root alone may mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK = 4096


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """Mount a file system of `size_kib` KiB at `folder`, a new one; skip the test where that is not allowed."""
    folder.mkdir()
    options = f"size={size_kib}k"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leaving: int = 0) -> Path:
    """Fill a disk but for `leaving` bytes, and return the file to remove when there is to be space again."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        while (free := os.statvfs(disk).f_bavail * BLOCK - leaving) >= BLOCK:
            os.write(file.fileno(), bytes(min(free, 1 << 20)))
    return ballast
