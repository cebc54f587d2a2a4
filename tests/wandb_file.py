"""The records of a W&B run file, read without W&B's own reader, which its wheels no longer bring."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES = 7  # of the file: ":W&B", a magic number, the version
BLOCK_BYTES = 32768  # a record that does not fit the rest of a block goes on in the next (the log format of LevelDB)
PART_HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, LAST = 1, 4


def records(file: Path, timeout_s: float = 20.0) -> list[Any]:
    """Return every record of a .wandb file, in order, once its run has ended there: `finish` does not wait for it."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + timeout_s
    while True:
        found = [Record.FromString(content) for content in _contents(file.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{file} never came to its end"
        time.sleep(0.05)


def _contents(data: bytes) -> Iterator[bytes]:
    assert data.startswith(b":W&B"[: len(data)])
    position, content = HEADER_BYTES, b""
    while position < len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < PART_HEADER.size:
            position += left
            continue
        if len(data) - position < PART_HEADER.size:
            return
        _, length, kind = PART_HEADER.unpack_from(data, position)
        position += PART_HEADER.size
        if position + length > len(data):
            return  # W&B is still writing this part
        content += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield content
            content = b""
