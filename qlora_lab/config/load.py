"""From plain values or Hydra's node to a RunConfig: unknown keys refused, types and ranges checked."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, nearest

TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def from_plain(values: dict[str, Any]) -> RunConfig:
    """Build a RunConfig from nested dicts.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, or values that do not go together.
    """
    for key in _unknown_keys(values, RunConfig, ""):
        raise ConfigError(unknown_key(key))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf(error)) from error
    assert isinstance(config, RunConfig)
    return config


def from_hydra(node: DictConfig) -> RunConfig:
    """Build a RunConfig from what Hydra composed, leaving Hydra's own node out."""
    own = OmegaConf.masked_copy(node, [str(key) for key in node if key != "hydra"])
    try:
        plain = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf(error)) from error
    assert isinstance(plain, dict)
    return from_plain({str(key): value for key, value in plain.items()})


def unknown_key(key: str) -> str:
    """Word the refusal of a key that the schema does not have."""
    parent, _, name = key.rpartition(".")
    siblings = [known for known in known_keys() if known.rpartition(".")[0] == parent]
    guess = nearest(key, known_keys()) or nearest(name, siblings)
    where = f"{parent} has the keys" if parent else "the groups and keys are"
    allowed = ", ".join(known.rpartition(".")[2] for known in siblings)
    return f"{key} is no configuration key; {where} {allowed}{guess}"


def known_keys() -> list[str]:
    """Return every key of the schema, dotted."""
    return list(_schema_keys(RunConfig, ""))


def _schema_keys(schema: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        inner = _dataclass_of(hint)
        if inner is not None:
            yield from _schema_keys(inner, f"{prefix}{name}.")


def _unknown_keys(values: dict[str, Any], schema: type, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            yield key
        elif isinstance(value, dict):
            inner = _dataclass_of(hints[name])
            if inner is not None:
                yield from _unknown_keys(value, inner, f"{key}.")


def _dataclass_of(hint: Any) -> type | None:
    """Return the dataclass in `X`, or in `X | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    found = [option for option in options if dataclasses.is_dataclass(option)]
    return found[0] if found else None  # type: ignore[return-value]


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """Say in one sentence what OmegaConf refused."""
    key = error.full_key or "the configuration"
    first_line = (error.msg or str(error)).splitlines()[0]
    hint = _hint_of(str(key))
    if hint is not None and (
        "could not be converted" in first_line
        or "Cannot convert" in first_line
        or "not supported" in first_line
        or "Invalid type" in first_line
    ):
        given = first_line.split("'")[1] if "'" in first_line else "something else"
        return f"{key} must be {_words(hint)}; got '{given}'"
    if "Missing mandatory value" in first_line:
        return f"{key} is not set, and it has no default; give {key}=..."
    return f"{key}: {first_line}"


def _hint_of(key: str) -> Any:
    schema: Any = RunConfig
    for name in key.split("."):
        hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
        if name not in hints:
            return None
        hint = hints[name]
        schema = _dataclass_of(hint) or hint
    return hint


def _words(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = [TYPE_WORDS.get(option, "null" if option is type(None) else str(option)) for option in options]
    return " or ".join(words)
