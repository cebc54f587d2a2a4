"""The framing of a W&B run file (run-ID.wandb): which records it holds, and where it is damaged.

The file is a log in the format of LevelDB: after a header of 7 bytes, blocks of 32 KiB hold parts with a checksum each,
and a record is a whole part or a first, middle ones and a last. What follows a damaged part in its block cannot be
found; the next block is read again, as W&B's own reader does.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

HEADER = b":W&B"
HEADER_BYTES = 7  # with a magic number and the version
BLOCK_BYTES = 32768
PART_HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
CHECKSUM_OF_KIND = {kind: zlib.crc32(bytes([kind])) for kind in (WHOLE, FIRST, MIDDLE, LAST)}


@dataclass
class Damage:
    """What could not be read of a file.

    Attributes:
        places: parts of it whose checksum is wrong, or whose record has lost its other parts.
        torn: it ends inside a record, as that of a killed run does.
    """

    places: int = 0
    torn: bool = False

    @property
    def count(self) -> int:
        return self.places + self.torn


def records(data: bytes, damage: Damage) -> Iterator[bytes]:
    """Yield every whole record of a file's bytes; what is left out is counted in `damage`."""
    if not data.startswith(HEADER):
        damage.places += not HEADER.startswith(data)  # an empty file, or less than a header, is of a killed run
        return
    position, end = HEADER_BYTES, len(data)
    content: bytes | None = None  # of a record that has begun
    skipping = False  # after damage: the rest of a record of which a part is lost
    while position < end:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < PART_HEADER.size:
            position += left
            continue
        if end - position < PART_HEADER.size:
            damage.torn = True
            return
        checksum, length, kind = PART_HEADER.unpack_from(data, position)
        begin = position + PART_HEADER.size
        if position + left > end and begin + length > end and kind in CHECKSUM_OF_KIND:
            damage.torn = True
            return
        part = data[begin : begin + length]
        whole = PART_HEADER.size + length <= left and kind in CHECKSUM_OF_KIND
        if not whole or zlib.crc32(part, CHECKSUM_OF_KIND[kind]) != checksum:
            damage.places += 1
            position, content, skipping = position + left, None, True
            continue
        position = begin + length
        if kind in (WHOLE, FIRST):
            damage.places += content is not None
            content, skipping = part, False
        elif content is None:
            damage.places += not skipping
            skipping = True
            continue
        else:
            content += part
        if kind in (WHOLE, LAST):
            yield content
            content = None
    damage.torn = content is not None


def framed(contents: Iterable[bytes], header: bytes) -> bytes:
    """Return the bytes of a file with these records, behind the header of another file."""
    data = bytearray(header[:HEADER_BYTES])
    for content in contents:
        rest, begun = content, False
        while rest or not begun:
            left = BLOCK_BYTES - len(data) % BLOCK_BYTES
            if left < PART_HEADER.size:
                data += bytes(left)
                left = BLOCK_BYTES
            part, rest = rest[: left - PART_HEADER.size], rest[left - PART_HEADER.size :]
            kind = (MIDDLE if begun else FIRST) if rest else (LAST if begun else WHOLE)
            data += PART_HEADER.pack(zlib.crc32(part, CHECKSUM_OF_KIND[kind]), len(part), kind) + part
            begun = True
    return bytes(data)
