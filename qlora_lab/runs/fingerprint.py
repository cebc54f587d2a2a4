"""Which file a data source means, and the hash of what is in it. Light: planning uses it for run ids."""

import hashlib
from pathlib import Path

from qlora_lab.config.schema import SourceConfig
from qlora_lab.errors import DataError

CHUNK_BYTES = 1 << 20


def locate_file(path: str, data_dir: Path) -> Path:
    """Find a data file: a relative path is looked up under `data_dir`, then in the working directory.

    Raises:
        DataError: it is in neither place, or is no file.
    """
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [data_dir / given, Path.cwd() / given]
    for place in places:
        if place.is_file():
            return place
    if any(place.is_dir() for place in places):
        raise DataError(f"data.source.path '{path}' is a folder; name one file in it")
    looked = " or ".join(f"'{place}'" for place in places)
    raise DataError(
        f"data.source.path '{path}' was not found as {looked}; give an absolute path, or set paths.data_dir "
        "(or the environment variable QLORA_LAB_DATA) to the folder that holds it"
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def source_fingerprint(source: SourceConfig, data_dir: Path) -> str | None:
    """Return the SHA-256 of a local data file, so that changed data is a new run.

    Other kinds need none: a wheel is pinned by its hash, a hub set by its revision, and procedural rows
    are made from the configuration alone.

    Raises:
        DataError: the file is missing.
    """
    if source.kind != "file" or source.path is None:
        return None
    return file_sha256(locate_file(source.path, data_dir))


def check_fingerprint(path: Path, expected: str | None) -> None:
    """Refuse a file whose content is not the one the run was planned with.

    Raises:
        DataError: the hash differs.
    """
    if expected is None:
        return
    found = file_sha256(path)
    if found != expected:
        raise DataError(
            f"{path} has changed since this run was planned (SHA-256 {found[:12]}, planned with "
            f"{expected[:12]}); start the study again to plan runs on the new content, or restore the file"
        )
