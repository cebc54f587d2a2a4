"""Folders to publish: whole or absent, with the SHA-256 of each file, and nothing private in them."""

import shutil
import sys
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from qlora_lab.errors import DataError
from qlora_lab.hashing import file_sha256
from qlora_lab.publishing.public import public, refuse_private
from qlora_lab.runs.environment import PACKAGES, git_commit, package_version
from qlora_lab.runs.files import read_json, write_json

MANIFEST = "manifest.json"


def publish(
    out: Path, fill: Callable[[Path], dict[str, Any]], *, layout: str, command: str, paths: Collection[str] = ()
) -> None:
    """Write the folder `out`; until it is whole it has another name.

    Args:
        fill: writes its files, and returns what its manifest says of them.
        layout: what kind of folder it is, and its version.
        paths: of this machine, see `public`.

    Raises:
        DataError: `out` is there already, cannot be written, or something private would be published.
    """
    if out.exists():
        raise DataError(f"{out} is there already; a release is never written over: give another folder, or remove it")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        told = fill(partial)
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        write_json(
            partial / MANIFEST,
            {
                "format": layout,
                **told,
                "files": {str(file.relative_to(partial)): _of_file(file) for file in files},
                "versions": {name: package_version(name) for name in PACKAGES},
                "python": sys.version.split()[0],
                "git_commit": git_commit(Path(__file__).parent),
                "command": public(command, paths),
            },
        )
        refuse_private(partial, paths)
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify(folder: Path) -> str:
    """Say that a folder is as it was written.

    Raises:
        DataError: it has no manifest, or a file is missing, changed or added; names them.
    """
    try:
        told = read_json(folder / MANIFEST)["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no whole release: {MANIFEST} cannot be read ({error})") from error
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    wrong = [f"{name} is missing" for name in sorted(set(told) - there)]
    wrong += [f"{name} is not in {MANIFEST}" for name in sorted(there - set(told))]
    wrong += [
        f"{name} has changed"
        for name in sorted(there & set(told))
        if file_sha256(folder / name) != told[name]["sha256"]
    ]
    if wrong:
        raise DataError(f"{folder} is not as it was released: {'; '.join(wrong)}")
    return f"{folder}: {len(told)} files as released"


def _of_file(file: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(file), "bytes": file.stat().st_size}
