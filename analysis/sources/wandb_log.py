"""The records of a W&B run file (run-ID.wandb), read without W&B, whose wheels bring no reader and are slow to import.

A record is a message of W&B's protocol; the few fields that are read here are named in FIELDS. Wanted only: what a run
is called, its configuration, history and summary. Where the records lie in the file, `tracking.wandb_file` knows.
"""

import functools
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.tracking.wandb_file import Damage, records

# Numbers of fields in W&B's protocol (wandb 0.31, wandb_internal.proto); a test compares them with the installed one's.
FIELDS = {
    "Record": {"history": 2, "summary": 3, "config": 5, "run": 17},
    "RunRecord": {"run_id": 1, "config": 4, "start_time": 17},
    "ConfigRecord": {"update": 1},
    "SummaryRecord": {"update": 1},
    "HistoryRecord": {"item": 1},
    "HistoryItem": {"key": 1, "nested_key": 2, "value_json": 16},
}
HISTORY, SUMMARY, CONFIG, RUN = FIELDS["Record"].values()
KEY, NESTED_KEY, VALUE = FIELDS["HistoryItem"].values()
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # wire types of protocol buffers
# The usual item: one key and a value in printable ASCII, each shorter than 128 bytes, behind a byte of length. It ends
# where a byte that is not printable begins the next one.
PLAIN_ITEM = re.compile(rb"\n[\0-\x7f][\n\x12][\0-\x7f]([!-~]+)\x82\x01[\0-\x7f]([ -~]+)", re.DOTALL)
PLAIN_ITEMS = re.compile(rb"(?:\n[\0-\x7f][\n\x12][\0-\x7f][!-~]+\x82\x01[\0-\x7f][ -~]+)*", re.DOTALL)
SHORT = 64
AFTER_ITEMS = b"\x12"  # the tag of what stands behind the items of a history record, its step


@dataclass
class WandbRun:
    """What one file holds of a run; a run that was resumed has several.

    Attributes:
        started_at: seconds since 1970; 0.0 where the file breaks off before it says so.
        history: one mapping a logged step.
        damage: what of the file could not be read, whatever was in it.
    """

    file: Path
    run_id: str | None = None
    started_at: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    damage: Damage = field(default_factory=Damage)


def read_wandb_file(file: Path, *, history: bool = True, summary: bool = True) -> WandbRun:
    """Read one file but for what is damaged: a killed run leaves a torn last part, or nothing but the header.

    Args:
        history: read the logged steps.
        summary: read configuration and summary. W&B writes a summary with every step, so each half of the file takes
            its own time.

    Raises:
        OSError: it cannot be read.
    """
    run = WandbRun(file)
    lines: list[bytes] = []
    summaries: list[bytes] = []
    wanted = {RUN} | ({HISTORY} if history else set()) | ({SUMMARY, CONFIG} if summary else set())
    for record in records(file.read_bytes(), run.damage):
        number, value = _content(record, wanted)
        if number == HISTORY:
            lines.append(value)
        elif number == SUMMARY:
            summaries.append(value)
        elif number == CONFIG:
            run.config.update(_items(value))
        elif number == RUN:
            _read_run(run, value)
    run.history = _lines(lines)
    for items in _lines(summaries):
        run.summary.update(items)
    return run


def _content(record: bytes, wanted: Collection[int]) -> tuple[int, bytes]:
    """Return the one field that says what a record is of and its content; 0 where it is not wanted."""
    position = 0
    while position < len(record):
        number, value, position = _field(record, position)
        if number in wanted:
            return number, value
    return 0, b""


def _read_run(run: WandbRun, content: bytes) -> None:
    for number, value in _fields(content):
        if number == FIELDS["RunRecord"]["run_id"]:
            run.run_id = bytes(value).decode()
        elif number == FIELDS["RunRecord"]["config"]:
            run.config.update(_items(value))
        elif number == FIELDS["RunRecord"]["start_time"]:
            parts = dict(_fields(value))  # a Timestamp: seconds and nanoseconds
            run.started_at = parts.get(1, 0) + 1e-9 * parts.get(2, 0)


def _items(content: bytes) -> dict[str, Any]:
    """Return the items of a history, summary or config record: keys, and values from JSON."""
    found = _plain_items(content)
    if found is not None:
        values = json.loads(b"[" + b",".join([value for _, value in found]) + b"]")
        return dict(zip([_decoded(key) for key, _ in found], values, strict=True))
    return _short_nested_items(content) if len(content) < SHORT else _nested_items(content)


def _lines(contents: Sequence[bytes]) -> list[dict[str, Any]]:
    """Return the items of many records; what is plain in them is parsed at once, which takes half the time."""
    plain = {number: found for number, content in enumerate(contents) if (found := _plain_items(content)) is not None}
    texts = [b"[" + b",".join([value for _, value in found]) + b"]" for found in plain.values()]
    parsed = dict(zip(plain, json.loads(b"[" + b",".join(texts) + b"]"), strict=True))
    return [
        dict(zip([_decoded(key) for key, _ in plain[number]], parsed[number], strict=True))
        if number in parsed
        else _items(content)
        for number, content in enumerate(contents)
    ]


def _plain_items(content: bytes) -> list[tuple[bytes, bytes]] | None:
    """Return keys and values of a record's items, or None where one has another form than the usual."""
    plain = PLAIN_ITEMS.match(content)
    end = plain.end() if plain else 0
    if end < len(content) and content[end : end + 1] != AFTER_ITEMS:
        return None
    return PLAIN_ITEM.findall(content)


def _nested_items(content: bytes) -> dict[str, Any]:
    """Return items of any form; those that are not plain have a path of keys, mostly."""
    paths: list[list[bytes]] = []
    texts: list[bytes] = []
    for number, item in _fields(content):
        if number == 1:
            path, text = _item(item)
            if path and text is not None:
                paths.append(path)
                texts.append(text)
    items: dict[str, Any] = {}
    for path, parsed in zip(paths, json.loads(b"[" + b",".join(texts) + b"]"), strict=True):
        _put(items, [key.decode() for key in path], parsed)
    return items


# W&B repeats the seconds that a run has taken with every step.
_short_nested_items = functools.lru_cache(maxsize=1024)(_nested_items)


@functools.lru_cache(maxsize=4096)
def _decoded(key: bytes) -> str:
    return key.decode()


def _item(item: bytes) -> tuple[list[bytes], bytes | None]:
    """Return an item's key, as the path to it, and its value in JSON."""
    path, value = [], None
    position = 0
    while position < len(item):
        number, part, position = _field(item, position)
        if number in (KEY, NESTED_KEY):
            path.append(part)
        elif number == VALUE:
            value = part
    return path, value


def _put(items: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        items = items.setdefault(key, {})
    items[path[-1]] = value


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of a message's fields."""
    position = 0
    while position < len(content):
        number, value, position = _field(content, position)
        yield number, value


def _field(content: bytes, position: int) -> tuple[int, Any, int]:
    """Return a field's number, its value (a whole number or bytes, None of a fixed width), and where it ends."""
    tag, position = content[position], position + 1
    if tag > 127:
        tag, position = _varint(content, position - 1)
    number, kind = tag >> 3, tag & 7
    if kind == BYTES:
        length, position = content[position], position + 1
        if length > 127:
            length, position = _varint(content, position - 1)
        return number, content[position : position + length], position + length
    if kind == VARINT:
        value, position = _varint(content, position)
        return number, value, position
    return number, None, position + {EIGHT_BYTES: 8, FOUR_BYTES: 4}[kind]


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = content[position]
    position += 1
    if value < 128:
        return value, position
    value &= 127
    shift = 7
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
