"""From plain values or Hydra's node to a RunConfig: unknown keys refused, types and ranges checked."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, nearest

TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list such as [a,b]",
    dict: "a mapping such as {key: value}",
    types.NoneType: "null",
}
Config = TypeVar("Config")
PLAIN_TYPES = {
    "str": "text",
    "int": "a number",
    "float": "a number",
    "bool": "true or false",
    "NoneType": "null",
    "AnyNode": "a single value",
}


def from_plain(values: dict[str, Any]) -> RunConfig:
    """Build a RunConfig from nested dicts, as `typed` does."""
    return typed(values, RunConfig)


def typed(values: dict[str, Any], schema: type[Config]) -> Config:
    """Build the configuration of a command from nested dicts.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or values that do not go together.
    """
    check_keys(values, schema)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf(error, schema)) from error
    assert isinstance(config, schema)
    return config


def check_keys(values: dict[str, Any], schema: type = RunConfig) -> None:
    """Refuse keys that the schema does not have.

    Raises:
        ConfigError: with the first of them, and the nearest valid one.
    """
    for key in _unknown_keys(values, schema, ""):
        raise ConfigError(unknown_key(key, known_keys(schema)))


def from_hydra(node: DictConfig) -> RunConfig:
    """Build a RunConfig from what Hydra composed, leaving Hydra's own node out."""
    return typed_from_hydra(node, RunConfig)


def typed_from_hydra(node: DictConfig, schema: type[Config]) -> Config:
    """Build the configuration of a command from what Hydra composed, leaving Hydra's own node out."""
    own = OmegaConf.masked_copy(node, [str(key) for key in node if key != "hydra"])
    try:
        plain = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf(error, schema)) from error
    assert isinstance(plain, dict)
    return typed({str(key): value for key, value in plain.items()}, schema)


def unknown_key(key: str, known: list[str] | None = None) -> str:
    """Word the refusal of a key that the schema does not have.

    Args:
        known: every key there is; without it, those of a run.
    """
    known = _with_names(known_keys() if known is None else known, key)
    parent, _, name = key.rpartition(".")
    if parent and parent not in known:
        return unknown_key(parent, known)
    siblings = [other for other in known if other.rpartition(".")[0] == parent]
    guess = nearest(key, known) or nearest(name, siblings)
    where = f"{parent} has the keys" if parent else "the groups and keys are"
    allowed = ", ".join(other.rpartition(".")[2] for other in siblings)
    return f"{key} is no configuration key; {where} {allowed or 'none of their own'}{guess}"


def _with_names(known: list[str], key: str) -> list[str]:
    """Put the name that `key` has there in place of the `*` of mappings with free names; leave out the others."""
    free = {other.partition("*")[0] for other in known if "*" in other}
    names = {start: key.removeprefix(start).partition(".")[0] for start in free if key.startswith(start)}
    named = [other.replace("*", names.get(other.partition("*")[0], "*")) for other in known]
    return [other for other in named if "*" not in other]


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Return every key of a schema, dotted; `*` stands for the names of a mapping, as in evaluation.sets.*.kind."""
    return list(_schema_keys(schema, prefix))


def _schema_keys(schema: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        inner, named = _dataclass_of(hint), _named_dataclass_of(hint)
        if inner is not None:
            yield from _schema_keys(inner, f"{prefix}{name}.")
        if named is not None:
            yield f"{prefix}{name}.*"
            yield from _schema_keys(named, f"{prefix}{name}.*.")


def _unknown_keys(values: dict[str, Any], schema: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            yield key
        elif isinstance(value, dict):
            inner, named = _dataclass_of(hints[name]), _named_dataclass_of(hints[name])
            if inner is not None:
                yield from _unknown_keys(value, inner, f"{key}.")
            if named is not None:
                items = {f"{key}.{own}.": item for own, item in value.items() if isinstance(item, dict)}
                for place, item in items.items():
                    yield from _unknown_keys(item, named, place)


def _dataclass_of(hint: Any) -> type | None:
    """Return the dataclass in `X`, or in `X | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    found = [option for option in options if dataclasses.is_dataclass(option)]
    return found[0] if found else None  # type: ignore[return-value]


def _named_dataclass_of(hint: Any) -> type | None:
    """Return the dataclass X in `dict[str, X]`."""
    return _dataclass_of(typing.get_args(hint)[1]) if typing.get_origin(hint) is dict else None


WRONG_TYPE = (
    "could not be converted",
    "Cannot convert",
    "not supported",
    "Invalid type",
    "Invalid value assigned",
    "is not a valid",
)


def explain_omegaconf(error: OmegaConfBaseException, schema: type = RunConfig) -> str:
    """Say in one sentence what OmegaConf refused."""
    key = error.full_key or "the configuration"
    first_line = (error.msg or str(error)).splitlines()[0]
    hint = _hint_of(str(key), schema)
    if hint is not None and any(words in first_line for words in WRONG_TYPE):
        return f"{key} must be {_words(hint)}; got {_given(first_line)}"
    if hint is not None and "is not Optional" in first_line:
        return f"{key} must be {_words(hint)}; got null"
    if "missing mandatory value" in first_line.lower():
        return f"{key} is not set, and it has no default; give {key}=..."
    return f"{key}: {first_line}"


def _given(message: str) -> str:
    """Return the value that OmegaConf's message quotes, or what it says of its type."""
    quoted = re.search(r"'([^']*)'", message)
    if quoted is not None:
        return f"'{quoted[1]}'"
    assigned = re.search(r"Invalid value assigned: (\w+)", message)
    return PLAIN_TYPES.get(assigned[1], assigned[1]) if assigned is not None else "something else"


def _hint_of(key: str, schema: Any) -> Any:
    for name in key.split("."):
        if _named_dataclass_of(schema) is not None:
            schema = hint = _named_dataclass_of(schema)
            continue
        hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
        if name not in hints:
            return None
        hint = hints[name]
        schema = _dataclass_of(hint) or hint
    return hint


def _words(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(_word(option) for option in options)


def _word(option: Any) -> str:
    if dataclasses.is_dataclass(option):
        return "a group of keys"
    return TYPE_WORDS.get(typing.get_origin(option) or option, str(option))
