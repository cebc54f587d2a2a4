"""Nested values by dotted keys: {"adapter": {"rank": 8}} is {"adapter.rank": 8}."""

from collections.abc import Mapping
from typing import Any

Point = dict[str, str]  # a value of each axis, by its dotted key


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": value}` for nested mappings; an empty mapping leaves no key."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if type(value) is dict or isinstance(value, Mapping):  # the first is ten times as quick to ask
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
