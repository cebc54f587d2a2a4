"""A RunConfig put together from its groups, each typed and checked once however many runs share it.

OmegaConf takes 30 ms to type a whole configuration, which ten thousand runs cannot afford.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from qlora_lab.config.load import check_keys, from_plain
from qlora_lab.config.schema import RunConfig

# References that name a key from the top, or a variable of the environment; others may look anywhere.
REFERENCE = re.compile(r"\$\{(?:oc\.env:[^${}]*|([A-Za-z_]\w*)(?:\.\w+)*)\}")
FIELDS = [field.name for field in dataclasses.fields(RunConfig)]


@dataclass(frozen=True, eq=False)
class Part:
    """What a configuration has under one of its top keys, with `${...}` not resolved yet."""

    value: Any

    @cached_property
    def text(self) -> str:
        return repr(self.value)

    @cached_property
    def refers_to(self) -> frozenset[str] | None:
        """Return the top keys that its references name; None where that cannot be told."""
        found = list(REFERENCE.finditer(self.text))
        if len(found) != self.text.count("${"):
            return None
        return frozenset(match[1] for match in found if match[1])


class TypedParts:
    """Builds configurations that share the objects of equal groups."""

    def __init__(self) -> None:
        self._typed: dict[tuple[str, ...], Any] = {}

    def config(self, parts: Mapping[str, Part]) -> RunConfig:
        """Return what `from_plain` gives for the same values.

        Raises:
            ConfigError: as `from_plain` does.
        """
        if len(parts) != len(FIELDS) or not all(name in parts for name in FIELDS):
            return from_plain({name: part.value for name, part in parts.items()})
        return RunConfig(**{name: self._of(name, parts) for name in FIELDS})

    def _of(self, name: str, parts: Mapping[str, Part]) -> Any:
        part = parts[name]
        around = {name: part} if part.refers_to == frozenset() else _with_what_it_refers_to(name, parts)
        key = (name, *(item for other, its in around.items() for item in (other, its.text)))
        if key not in self._typed:
            try:
                self._typed[key] = _typed(name, {other: its.value for other, its in around.items()})
            except Exception:
                # The whole configuration is refused in the words that any command uses.
                self._typed[key] = getattr(from_plain({other: its.value for other, its in parts.items()}), name)
        return self._typed[key]


def _with_what_it_refers_to(name: str, parts: Mapping[str, Part]) -> Mapping[str, Part]:
    wanted, known = [name], dict.fromkeys([name])
    while wanted:
        refers_to = parts[wanted.pop()].refers_to
        if refers_to is None:
            return parts
        new = [other for other in sorted(refers_to) if other not in known and other in parts]
        known |= dict.fromkeys(new)
        wanted += new
    return {other: parts[other] for other in known}


def _typed(name: str, values: dict[str, Any]) -> Any:
    """Return the value of one top key, typed, as merging onto the whole schema gives it."""
    hints = typing.get_type_hints(RunConfig)
    check_keys({name: values[name]})
    if not dataclasses.is_dataclass(hints[name]):
        if type(values[name]) is hints[name]:
            return values[name]
        raise TypeError(f"{name} is left to the whole configuration")
    schema = OmegaConf.create(
        {
            other: OmegaConf.structured(hints[other]) if dataclasses.is_dataclass(hints[other]) else value
            for other, value in values.items()
        }
    )
    return OmegaConf.to_object(OmegaConf.select(OmegaConf.merge(schema, values), name))
