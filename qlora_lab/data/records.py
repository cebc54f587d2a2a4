"""Records as a file holds them, and the list of those that are broken."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qlora_lab.errors import DataError, nearest

MAX_LISTED = 5  # broken rows spelt out in one message


class BrokenRowError(Exception):
    """What is wrong with one row; collected in `BrokenRows`, never shown alone."""


class Record(NamedTuple):
    """One row of a file, and where it stands ("line 7")."""

    place: str
    columns: Mapping[str, Any]


@dataclass
class BrokenRows:
    """Every row of one file that could not be read: the first few by name, all of them counted."""

    origin: str
    total: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, place: str, what: str) -> None:
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(f"{place}: {what}")

    def raise_if_any(self) -> None:
        """Raise DataError that names the first broken rows and counts all, unless there are none."""
        if not self.total:
            return
        more = self.total - len(self.listed)
        tail = f"; and {more} more" if more else ""
        count = "1 broken row" if self.total == 1 else f"{self.total} broken rows"
        raise DataError(f"{self.origin} has {count}: {'; '.join(self.listed)}{tail}")


def text_of(columns: Mapping[str, Any], name: str) -> str:
    """Return the text in a column that every row must have.

    Raises:
        BrokenRowError: the column is missing, or holds something else than text.
    """
    if name not in columns:
        known = ", ".join(f"'{column}'" for column in columns) or "none"
        raise BrokenRowError(f"column '{name}' is missing (columns: {known}{nearest(name, columns)})")
    return require_text(columns[name], f"column '{name}'")


def optional_text_of(columns: Mapping[str, Any], name: str) -> str:
    """Return the text in a column that may be absent or null: then an empty text."""
    return text_of(columns, name) if columns.get(name) is not None else ""


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
