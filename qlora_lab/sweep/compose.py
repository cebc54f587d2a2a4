"""Configurations of thousands of runs: Hydra composes each distinct choice of groups once, values go on top.

One composition takes Hydra a tenth of a second, which ten thousand runs cannot afford.
"""

import copy
from collections.abc import Callable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from qlora_lab.config.load import from_hydra
from qlora_lab.config.parts import Part, TypedParts
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import Axes
from qlora_lab.sweep.dotted import Point

Load = Callable[[list[str]], DictConfig]
Parts = dict[str, Part]


class Composer:
    """Gives the configuration at each point of a study's axes, the same as Hydra would.

    Args:
        load: composes a list of overrides with Hydra.
        is_group: says whether a key chooses an option of a group.
        is_independent: says whether the options of a group, with these names, write under the group's own key alone
            and choose no others. Of such groups Hydra composes each option once, rather than each combination.
    """

    def __init__(
        self,
        load: Load,
        is_group: Callable[[str], bool],
        is_independent: Callable[[str, list[str]], bool] = lambda key, options: False,
    ) -> None:
        self._load = load
        self._is_group = _remembered(is_group)
        self._is_independent = is_independent
        self._independent: dict[str, bool] = {}
        self._parser = OverridesParser.create()
        self._composed: dict[tuple[str, ...], Parts | Exception] = {}
        self._chosen: dict[tuple[tuple[str, str], ...], Parts] = {}
        self._edited: dict[tuple[Part, tuple[tuple[str, str], ...]], Part | None] = {}
        self._parsed: dict[tuple[str, str], Any] = {}
        self._typed = TypedParts()

    def __call__(self, axes: Axes, point: Point) -> RunConfig:
        """Return the unresolved configuration of the run at `point`."""
        choices: Point = {}  # for Hydra to make
        values: dict[str, list[tuple[str, str]]] = {}  # to put on top, by top key
        for key, text in point.items():
            if self._is_group(key) or key in axes.prefixes or isinstance(self._value(key, text), dict):
                choices[key] = text
            else:
                values.setdefault(key.partition(".")[0], []).append((key, text))
        if self._in_each_others_way(choices, values):
            return self.by_hydra(axes, point)
        parts = dict(self._parts(axes, choices))
        for top, edits in values.items():
            edited = self._with_values(parts[top], tuple(edits)) if top in parts else None
            if edited is None:
                return self.by_hydra(axes, point)
            parts[top] = edited
        return self._typed.config(parts)

    def by_hydra(self, axes: Axes, point: Point) -> RunConfig:
        """Return the configuration at `point` as Hydra alone composes it, slowly."""
        return from_hydra(self._load(axes.overrides(point)))

    def check(self, axes: Axes, point: Point) -> None:
        """Compare one configuration with what Hydra alone composes.

        Raises:
            ConfigError: they differ, which is a fault of ours.
        """
        if self(axes, point) != self.by_hydra(axes, point):
            raise ConfigError(
                f"this study composes otherwise than Hydra at {' '.join(axes.overrides(point))}, which is a fault of "
                "qlora_lab; run it with hydra/sweeper=basic, which is slower"
            )

    def _parts(self, axes: Axes, choices: Point) -> Parts:
        """Return what Hydra composes for a choice, by top key."""
        key = tuple(choices.items())
        if key not in self._chosen:
            free = [group for group in choices if self._is_free(axes, group)]
            first = choices | {group: axes.values[group][0] for group in free}
            parts = dict(self._compose(axes.overrides(first)))
            for group in free:
                if choices[group] != first[group]:
                    parts[group] = self._compose(axes.overrides(first | {group: choices[group]}))[group]
            self._chosen[key] = parts
        return self._chosen[key]

    def _is_free(self, axes: Axes, key: str) -> bool:
        if key not in self._independent:
            self._independent[key] = (
                key not in axes.prefixes and self._is_group(key) and self._is_independent(key, axes.values[key])
            )
        return self._independent[key]

    def _compose(self, overrides: list[str]) -> Parts:
        key = tuple(overrides)
        if key not in self._composed:
            try:
                node = self._load(overrides)
            except Exception as error:  # the next run of this choice is refused without composing again
                self._composed[key] = error
            else:
                own = OmegaConf.masked_copy(node, [str(name) for name in node if name != "hydra"])
                plain = OmegaConf.to_container(own)  # interpolations stay: they may name what goes on top
                assert isinstance(plain, dict)
                self._composed[key] = {str(name): Part(value) for name, value in plain.items()}
        composed = self._composed[key]
        if isinstance(composed, Exception):
            raise composed
        return composed

    def _with_values(self, part: Part, edits: tuple[tuple[str, str], ...]) -> Part | None:
        if (part, edits) not in self._edited:
            plain = {"": copy.deepcopy(part.value)}
            done = all(_set(plain, ["", *key.split(".")[1:]], self._value(key, text)) for key, text in edits)
            self._edited[part, edits] = Part(plain[""]) if done else None
        return self._edited[part, edits]

    def _in_each_others_way(self, choices: Point, values: dict[str, list[tuple[str, str]]]) -> bool:
        """Say whether a value that Hydra sets and one that goes on top are at the same place: their order counts."""
        by_hydra = [f"{key}." for key in choices if not self._is_group(key)]
        on_top = [f"{key}." for edits in values.values() for key, _ in edits] if by_hydra else []
        return any(a.startswith(b) or b.startswith(a) for a in by_hydra for b in on_top)

    def _value(self, key: str, text: str) -> Any:
        if (key, text) not in self._parsed:
            self._parsed[key, text] = self._parser.parse_override(f"{key}={text}").value()
        return self._parsed[key, text]


def _remembered(is_group: Callable[[str], bool]) -> Callable[[str], bool]:
    known: dict[str, bool] = {}

    def remembered(key: str) -> bool:
        if key not in known:
            known[key] = is_group(key)
        return known[key]

    return remembered


def _set(plain: dict[str, Any], path: list[str], value: Any) -> bool:
    """Set a nested value; say False for what takes more than that, such as a mapping to merge."""
    for name in path[:-1]:
        plain = plain.get(name)  # type: ignore[assignment]
        if not isinstance(plain, dict):
            return False
    if path[-1] not in plain or isinstance(value, dict):
        return False
    plain[path[-1]] = value
    return True
