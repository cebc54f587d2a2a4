"""What varies in a study: its own axes, narrowed and widened from the command line, in Hydra's sweep syntax."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Transformer

from qlora_lab.errors import ConfigError, unknown_name
from qlora_lab.runs.identity import NOT_IDENTITY, NOT_IDENTITY_KEYS
from qlora_lab.sweep.dotted import Point

EXPERIMENT = "experiment"
SPECIAL = " ,()[]{}'\"=:\\"  # what a value cannot hold without quotes, or only in some places


@dataclass(frozen=True)
class Axes:
    """What varies, and the other overrides that every run shares.

    Attributes:
        values: of each axis, by its key.
        shared: overrides as they were typed.
        prefixes: the `+` or `++` of an axis that was typed with one.
        narrowed: values of the study's own axes, also those that the command line took away.
        together: axes that advance together, with the rows of values they take; the others are multiplied.
    """

    values: dict[str, list[str]]
    shared: list[str]
    prefixes: dict[str, str] = field(default_factory=dict)
    narrowed: dict[str, list[str]] = field(default_factory=dict)
    together: dict[tuple[str, ...], list[tuple[str, ...]]] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """Return the product of all axes, the last varying fastest; those that go together stand at the first."""
        blocks: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for key, values in self.values.items():
            group = next((keys for keys in self.together if key in keys), None)
            if group is None:
                blocks[(key,)] = [(value,) for value in values]
            else:
                blocks[group] = self.together[group]
        keys = [key for group in blocks for key in group]
        order = [keys.index(key) for key in self.values]  # every run names its axes in the same order
        flat = (tuple(itertools.chain.from_iterable(rows)) for rows in itertools.product(*blocks.values()))
        return [dict(zip(self.values, (point[at] for at in order), strict=True)) for point in flat]

    def overrides(self, point: Point) -> list[str]:
        """Return what composes the run at a point."""
        return [*self.shared, *(f"{self.prefixes.get(key, '')}{key}={value}" for key, value in point.items())]

    def check_exclusions(self, exclude: list[dict[str, Any]]) -> None:
        """Refuse combinations that could never be left out.

        Raises:
            ConfigError: one names no axis, or a value that its axis has neither here nor in the study's file.
        """
        for key, value in ((key, value) for combination in exclude for key, value in combination.items()):
            if key not in self.values:
                raise ConfigError(unknown_axis(key, list(self.values)))
            known = [*self.values[key], *self.narrowed.get(key, [])]
            for given in point_values(value):
                if given not in known:
                    raise ConfigError(unknown_name(f"study.exclude: {key}", given, dict.fromkeys(known)))

    def without(self, exclude: list[dict[str, Any]]) -> list[Point]:
        """Return the points that no combination of `exclude` leaves out.

        Raises:
            ConfigError: it could never leave out anything, or it leaves out everything, or all of one value.
        """
        self.check_exclusions(exclude)
        left_out = _sets(exclude)
        points = self.points()
        kept = [point for point in points if not _is_left_out(point, left_out)]
        if not kept:
            raise ConfigError("study.exclude leaves no run; remove one of its combinations")
        for key, values in self.values.items():
            used = {point[key] for point in kept}
            unused = [value for value in values if value not in used]
            # Where the command line narrowed other axes, what is left of the study's own values goes without saying.
            asked_for = values != self.narrowed.get(key) or all(
                self.values[other] == own for other, own in self.narrowed.items()
            )
            if unused and asked_for:
                raise ConfigError(
                    f"no run can use {key}={unused[0]}, since study.exclude leaves out each combination with it; "
                    "remove the value from the axis, or the combination from study.exclude"
                )
        return kept


def is_left_out(point: Point, exclude: list[dict[str, Any]]) -> bool:
    """Say whether one of the combinations leaves out a single point, as `Axes.without` does for all.

    Raises:
        ConfigError: a combination names what is no key of the point.
    """
    for key in (key for combination in exclude for key in combination if key not in point):
        raise ConfigError(unknown_axis(key, list(point)))
    return _is_left_out(point, _sets(exclude))


def _sets(exclude: list[dict[str, Any]]) -> list[dict[str, set[str]]]:
    return [{key: set(point_values(value)) for key, value in combination.items()} for combination in exclude]


def _is_left_out(point: Point, left_out: list[dict[str, set[str]]]) -> bool:
    return any(all(point[key] in values for key, values in combination.items()) for combination in left_out)


def unknown_axis(key: str, axes: list[str]) -> str:
    return f"study.exclude names '{key}', which is no axis; the axes are {', '.join(axes)}"


def axes_of(params: list[Override], arguments: list[Override]) -> Axes:
    """Join a study's axes with the command line: for the same key, the command line wins.

    Raises:
        ConfigError: a sweep that is not a list of values, such as interval(), one over what is the same for all runs
            of a study, or `~` on an axis.
    """
    own = {_key(override): override for override in params}
    chosen = own | {_key(override): override for override in arguments}
    values: dict[str, list[str]] = {}
    shared: list[str] = []
    for key, override in chosen.items():
        if key in own and override.is_delete():
            raise ConfigError(f"~{key} would delete an axis of the study; give it one value instead: {key}=...")
        if key == EXPERIMENT:
            _check_one_study(override)
        if key in own or override.is_sweep_override():
            if override.is_sweep_override():
                _check_can_vary(key, override)
            values[key] = _values(key, override)
        else:
            shared.append(override.input_line or "")
    prefixes = {key: _prefix(chosen[key]) for key in values if _prefix(chosen[key])}
    return Axes(values, shared, prefixes, {key: _values(key, override) for key, override in own.items()})


def axis_override(key: str, value: object) -> str:
    """Return an axis of a study's file as an override: Hydra's sweep syntax, or a YAML list of its values.

    Raises:
        ConfigError: a list without values, or a mapping.

    Example:
        >>> axis_override("data.rows", [128, None])
        'data.rows=128,null'
    """
    if isinstance(value, Mapping) or value == []:
        raise ConfigError(
            f"hydra.sweeper.params.{key} must be a list of values, such as [0, 1] or range(2); got {value}; "
            "axes have dotted keys, such as adapter.rank"
        )
    if isinstance(value, str):
        return f"{key}={value}"
    return f"{key}={','.join(texts(value))}"


def point_values(value: object) -> list[str]:
    """Return a YAML value, or each of a list of them, as the points of the axes write it: the text 1e-4 as 0.0001."""
    return [_as_in_a_point(text) for text in texts(value)]


@cache
def _as_in_a_point(text: str) -> str:
    return OverridesParser.create().parse_override(f"value={text}").get_value_element_as_str()


def texts(value: object) -> list[str]:
    """Return a YAML value, or each of a list of them, as Hydra writes the value of an override."""
    return [_text(item) for item in value] if isinstance(value, list | tuple) else [_text(value)]


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(item) for item in value)}]"
    if isinstance(value, str) and (not value or any(character in value for character in SPECIAL)):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def _key(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _prefix(override: Override) -> str:
    return override.get_key_element().removesuffix(_key(override))


def _check_one_study(override: Override) -> None:
    if override.is_sweep_override() or isinstance(override.value(), list):
        raise ConfigError(f"+experiment names one study; got '{override.input_line}'; start one command per study")


def _check_can_vary(key: str, override: Override) -> None:
    """Refuse an axis over what is no part of a run's identity: all its values would be the same run."""
    group, _, name = key.partition(".")
    if group in NOT_IDENTITY or name in NOT_IDENTITY_KEYS.get(group, ()):
        raise ConfigError(
            f"{key} cannot be an axis, since it does not change a run's result; got '{override.input_line}'; "
            "give it one value"
        )


def _values(key: str, override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{key} must be a list of values, range() or choice(); got '{override.input_line}'")
    values: dict[tuple[type, object], str] = {}
    for value in override.sweep_iterator():
        text = Transformer.str(value)
        plain = value.text if isinstance(value, QuotedString) else value
        same = type(plain), str(plain)  # 1e-4 and 0.0001 are one number; 1 and '1' are two values
        if same in values:
            raise ConfigError(f"{key} lists {text} twice; got '{override.input_line}'; remove one of them")
        values[same] = text
    return list(values.values())
