"""Records as a file holds them, and the list of those that are broken."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from qlora_lab.errors import DataError, nearest

MAX_LISTED = 5  # different faults spelt out in one message
MAX_PLACES = 3  # places named of each

# Columns that name the kind of a task, in the order they are asked for.
FAMILY_COLUMNS = ("family", "task", "category", "subject", "task_name", "_task_name", "subset")


class BrokenRowError(Exception):
    """What is wrong with one row; collected in `BrokenRows`, never shown alone."""


class Record(NamedTuple):
    """One row of a file, and where it stands ("line 7")."""

    place: str
    columns: Mapping[str, Any]


@dataclass
class BrokenRows:
    """Every row of one file that could not be read: by their faults, the first few by name, all of them counted."""

    origin: str
    total: int = 0
    listed: dict[str, list[str]] = field(default_factory=dict)  # places of each fault
    counts: Counter[str] = field(default_factory=Counter)  # of the same faults

    def add(self, place: str, what: str) -> None:
        self.total += 1
        if what not in self.listed and len(self.listed) == MAX_LISTED:
            return
        self.counts[what] += 1
        places = self.listed.setdefault(what, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def raise_if_any(self) -> None:
        """Raise DataError that names the first broken rows and counts all, unless there are none."""
        if not self.total:
            return
        more = self.total - self.counts.total()
        tail = f"; and {more} more" if more else ""
        count = "1 broken row" if self.total == 1 else f"{self.total} broken rows"
        faults = [f"{self._places(what)}: {what}" for what in self.listed]
        raise DataError(f"{self.origin} has {count}: {'; '.join(faults)}{tail}")

    def _places(self, what: str) -> str:
        named = self.listed[what]
        more = self.counts[what] - len(named)
        return ", ".join(named) + (f" and {more} more" if more else "")


def text_of(columns: Mapping[str, Any], name: str) -> str:
    """Return the text in a column that every row must have.

    Raises:
        BrokenRowError: the column is missing, or holds something else than text.
    """
    if name not in columns:
        raise BrokenRowError(missing_column(name, tuple(columns)))
    return require_text(columns[name], f"column '{name}'")


@lru_cache  # all rows of a file may lack it, and the nearest name takes a while to find
def missing_column(name: str, columns: tuple[str, ...]) -> str:
    known = ", ".join(f"'{column}'" for column in columns) or "none"
    return f"column '{name}' is missing (columns: {known}{nearest(name, columns)})"


def optional_text_of(columns: Mapping[str, Any], name: str) -> str:
    """Return the text in a column that may be absent or null: then an empty text."""
    return text_of(columns, name) if columns.get(name) is not None else ""


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a record, also in its lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(part)


def list_of(columns: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the list of objects in a column; null gives an empty list.

    Raises:
        BrokenRowError: the column is missing, or holds something else than a list of objects.
    """
    items = columns[name] if name in columns else text_of(columns, name)
    if items is None:
        return []
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise BrokenRowError(f"column '{name}' must hold a list of objects; got {kind_of(items)}")
    return items


def family_of(columns: Mapping[str, Any]) -> str | None:
    """Return the kind of task that a row says it is of, if it says one."""
    for name in FAMILY_COLUMNS:
        if isinstance(columns.get(name), str):
            return columns[name] or None
    return None


def require_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BrokenRowError(f"{what} must hold text; got {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """Name a value's kind in JSON's words, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{'true or false' if isinstance(value, bool) else 'a number'} ({value})"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
