"""A merged model written file by file, so that it never lies in memory as a whole and an interrupted merge goes on.

Until it is whole and compared it lies beside its place, in a hidden folder `.NAME.partial` without a config.json, and
with a journal of the files that are done and what they were made from. The same merge goes on after the last of them;
another merge of that name begins anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_lab.errors import ModelError
from qlora_lab.hashing import file_sha256
from qlora_lab.merging.tensors import MergedTensors
from qlora_lab.models.location import HALF_WRITTEN
from qlora_lab.runs.files import read_json, write_json
from qlora_lab.runs.progress import progress_bar
from qlora_lab.train.tensor_file import write_tensors

INDEX = "model.safetensors.index.json"
DIGEST_DIGITS = 16


@dataclass
class PartialMerge:
    """A folder that is being written.

    Attributes:
        key: what it is made from, as a hash.
        files: SHA-256 of those that are done, by name.
    """

    folder: Path
    key: str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.folder / HALF_WRITTEN

    def record(self) -> None:
        write_json(self.journal, {"key": self.key, "files": self.files})

    def take_up(self) -> None:
        """Begin, or go on with what the same merge has left; files that are not as they were written are left out."""
        try:
            left = read_json(self.journal)
        except (OSError, ValueError):
            left = {}
        if left.get("key") != self.key:
            if self.folder.is_dir():
                print(f"removed {self.folder}, which another merge, or an older one, has left half-written", flush=True)
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        told = left.get("files", {}) if left.get("key") == self.key else {}
        self.files = {name: sha256 for name, sha256 in told.items() if _has(self.folder / name, sha256)}
        for path in self.folder.iterdir():
            if path.is_dir():  # of a tokenizer's templates
                shutil.rmtree(path)
            elif path.name not in self.files and path != self.journal:
                path.unlink()
        self.record()

    def finish(self, out: Path) -> None:
        """Put the folder in its place, whole."""
        self.journal.unlink()
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        self.folder.rename(out)


@contextmanager
def partial_merge(out: Path, described: Mapping[str, Any]) -> Iterator[PartialMerge]:
    """Give the folder in which the merge `out` is written, alone; what it holds stays for the next time.

    Args:
        described: everything that decides what is written.

    Raises:
        ModelError: `out` is there already, or another process is writing it.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:DIGEST_DIGITS]
    lock = out.with_name(f".{out.name}.lock")
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ModelError(
                f"another process is writing {out} at the moment; wait for it, or give another out"
            ) from error
        check_free(out)
        partial = PartialMerge(out.with_name(f".{out.name}.partial"), key)
        partial.take_up()
        yield partial
        lock.unlink(missing_ok=True)


def check_free(out: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        ModelError: it is.
    """
    if out.exists():
        raise ModelError(f"{out} is there already; a merge is never written over: give another out, or remove it")


def write_weights(tensors: MergedTensors, partial: PartialMerge, shard_bytes: int) -> None:
    """Write every tensor into files of about `shard_bytes`, one file in memory at a time, and their index.

    Raises:
        ModelError: a weight of the base is damaged.
        OSError: the disk is full or not writable; what is done stays.
    """
    shards = planned_shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with progress_bar(len(tensors.names), what="merging", unit="tensor") as bar:
        for number, names in enumerate(shards, start=1):
            name = file_name(number, len(shards))
            if name not in partial.files:
                made: dict[str, Tensor] = {}
                for parameter in names:
                    made |= tensors.make(parameter)
                    bar.update()
                partial.files[name] = write_tensors(partial.folder / name, made, {"format": "pt"})
                del made
                partial.record()
            else:
                bar.update(len(names))
            sizes = _sizes(partial.folder / name)
            weight_map |= dict.fromkeys(sizes, name)
            total_bytes += sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (partial.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def planned_shards(tensors: MergedTensors, shard_bytes: int) -> list[list[str]]:
    """Cut the tensors into files, in their order; a tensor larger than a file has one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in tensors.names:
        size = tensors.planned_bytes(name)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def file_name(number: int, count: int) -> str:
    """Return the name that transformers gives one of several files."""
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _has(file: Path, sha256: str) -> bool:
    return file.is_file() and file_sha256(file) == sha256


def _sizes(file: Path) -> dict[str, int]:
    """Return the bytes of each tensor in a file, from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {
        name: its["data_offsets"][1] - its["data_offsets"][0] for name, its in header.items() if name != "__metadata__"
    }
