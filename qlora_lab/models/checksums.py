"""Weights compared with what the hub says of them.

A file of safetensors has no checksum, and a flipped bit of a weight is a number like any other. But the hub knows the
SHA-256 of every large file, and its downloads leave it behind: as the name of the file in its cache, or beside a folder
that `hf download --local-dir` has filled. Other folders may bring what `sha256sum` writes, as FILE.sha256 or as
SHA256SUMS; without these, a .bin of torch still has checksums of its own. Files without any of it are compared with the
plan of the run, if at all (runs/fingerprint.py): a bit that was flipped before the plan is found only where it makes an
absurd number (quant/damage.py).
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from qlora_lab.errors import ModelError
from qlora_lab.hashing import remembered_sha256
from qlora_lab.models.location import Location
from qlora_lab.quant.damage import LARGEST_SHARE_OF_VECTORS, check_magnitudes, file_of_weight

SHA256 = re.compile(r"[0-9a-f]{64}")
SUMS = "SHA256SUMS"
# what sha256sum writes, with a name or without (- of what it reads itself); and with --tag, as BSD and openssl do
SUMS_LINE = re.compile(r"\\?(?P<value>[0-9a-fA-F]{64})(?: [ *](?P<name>.+)| *)")
TAGGED_LINE = re.compile(r"SHA(?:2-)?256 ?\((?P<name>.+)\) ?= ?(?P<value>[0-9a-fA-F]{64}) *")


def check_weight_files(location: Location) -> None:
    """Compare the files that a model was read from with what is recorded of them; reads each once in a process.

    Raises:
        ModelError: a file has another content.
    """
    for file in _weight_files(location):
        expected, record = recorded_sha256(file)
        if expected is not None and (found := remembered_sha256(file)) != expected:
            raise ModelError(
                f"{file} is damaged: its SHA-256 is {found[:12]}, and {record} {expected[:12]}; {location.remedy}"
            )
        if expected is None and file.suffix == ".bin" and (damage := damage_of_zip(file)) is not None:
            raise ModelError(f"{file} is damaged: {damage}; {location.remedy}")


def damage_of_zip(file: Path) -> str | None:
    """Say which part of a checkpoint of torch is not as its CRC-32 says; None where all are whole.

    Such a file is a zip archive, whose checksums torch writes and does not compare. Files of torch before 1.6 are none.
    It is read once in a process unless its size or time of change say that it is another.
    """
    status = file.stat()
    return _damage_of_zip(file.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _damage_of_zip(file: Path, size: int, mtime_ns: int) -> str | None:
    if not zipfile.is_zipfile(file):
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        return f"its directory of parts cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None if part is None else f"its part {part} has another CRC-32 than it says"


def recorded_sha256(file: Path) -> tuple[str | None, str]:
    """Return the SHA-256 that a file should have, if anybody says one, and in words who does.

    Raises:
        ModelError: a file of checksums holds none that can be read, or FILE.sha256 none of that file.
    """
    name = file.resolve().name
    if SHA256.fullmatch(name):
        return name, "the hub's is"
    record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    lines = record.read_text(encoding="utf-8").split() if record.is_file() else []
    if len(lines) > 1 and SHA256.fullmatch(lines[1]):  # commit, SHA-256, time
        return lines[1], "the hub's is"
    own = file.with_name(f"{file.name}.sha256")
    for sums in (own, file.with_name(SUMS)):
        if not sums.is_file():
            continue
        lines = sums.read_text(
            encoding="utf-8-sig", errors="surrogateescape"
        ).splitlines()  # names may be of any encoding
        found = [match for line in lines if (match := SUMS_LINE.fullmatch(line) or TAGGED_LINE.fullmatch(line))]
        named = [(file.name if match["name"] in (None, "-") else match["name"], match["value"]) for match in found]
        values = _of_file(file, [(name, value.lower()) for name, value in named])
        if not found or (sums == own and not values):
            raise ModelError(
                f"{sums} holds no SHA-256 that can be read{f' of {file.name}' if found else ''}; write it again with "
                "sha256sum, or remove it"
            )
        if len(values) == 1:
            return values.pop(), f"{sums.name} says"
    return None, ""


def _of_file(file: Path, sums: list[tuple[str, str]]) -> set[str]:
    """Return the SHA-256 of those names that fit a file best: its own, with its folder, or in another place.

    Names in a folder that lies beside the file are of files there.
    """
    ranked: dict[int, set[str]] = {}
    for name, value in sums:
        parts = Path(name).parts
        if parts[-1:] == (file.name,):
            rank = 0 if len(parts) == 1 else 1 if parts[-2] == file.parent.name else 2
            if rank == 2 and (file.parent / name).parent.is_dir() and not Path(name).is_absolute():
                continue
            ranked.setdefault(rank, set()).add(value)
    return ranked[min(ranked)] if ranked else set()


@torch.no_grad()
def check_values(model: PreTrainedModel, location: Location) -> None:
    """Refuse numbers that no training leaves in what is not quantized; the quantizer does so with all else.

    Raises:
        ModelError: a weight holds some, with the file that it is in.
    """
    for name, weight in model.named_parameters():
        try:
            if weight.ndim < 2:
                check_magnitudes(weight.abs(), LARGEST_SHARE_OF_VECTORS)
            elif weight.numel():
                check_magnitudes(weight.amax(-1).maximum(-weight.amin(-1)))
        except ModelError as error:
            file = file_of_weight(list(_weight_files(location)), name)
            raise ModelError(
                f"{location.name} cannot be used: {name}{f' in {file}' if file else ''}: {error}; {location.remedy}"
            ) from error


def _weight_files(location: Location) -> Iterator[Path]:
    folder = location.snapshot if location.on_hub else Path(location.name)
    if folder is None:
        return
    yield from sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
