"""Axes that advance together: pairs, listed combinations, and what the command line leaves of them."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import Axes, axes_of, axis_override
from qlora_lab.sweep.together import combination_axes, disagrees, join

parse = OverridesParser.create().parse_overrides
PARAMS = {"model": "s,m,l", "seed": "range(2)", "lr": "3e-4,2e-4,1e-4"}
ZIP = [["model", "lr"]]
LISTED = [{"quant": "none", "adapter": "all"}, {"quant": "nf4", "adapter": ["all", "qv"]}]


def study(*arguments: str, params: dict[str, Any] = PARAMS, zips: Any = (), combinations: Any = ()) -> Axes:
    own = [axis_override(key, value) for key, value in params.items()]
    axes = axes_of(parse([*own, *combination_axes(list(combinations), params)]), parse(list(arguments)))
    return join(axes, list(zips), list(combinations))


def points(axes: Axes) -> list[str]:
    return [" ".join(point.values()) for point in axes.points()]


def test_zipped_axes_advance_together_and_multiply_with_the_others() -> None:
    axes = study(zips=ZIP)
    assert points(axes) == ["s 0 0.0003", "s 1 0.0003", "m 0 0.0002", "m 1 0.0002", "l 0 0.0001", "l 1 0.0001"]
    assert [list(point) for point in axes.points()] == [["model", "seed", "lr"]] * 6


def test_combinations_are_an_axis_of_several_keys() -> None:
    axes = study(params={"seed": "0,1"}, combinations=LISTED)
    assert list(axes.values) == ["seed", "quant", "adapter"]
    assert points(axes) == ["0 none all", "0 nf4 all", "0 nf4 qv", "1 none all", "1 nf4 all", "1 nf4 qv"]


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        (["model=m"], ["m 0.0002"]),
        (["model=l,s"], ["s 0.0003", "l 0.0001"]),
        (["lr=1e-4"], ["l 0.0001"]),
        (["model=x,y", "lr=1,2"], ["x 1", "y 2"]),
        (["model=s", "lr=5"], ["s 5"]),
    ],
)
def test_the_command_line_narrows_pairs(typed: list[str], left: list[str]) -> None:
    params = {"model": "s,m,l", "lr": "3e-4,2e-4,1e-4"}
    assert points(study(*typed, params=params, zips=ZIP)) == left


@pytest.mark.parametrize(("typed", "left"), [("adapter=all", ["none all", "nf4 all"]), ("quant=none", ["none all"])])
def test_the_command_line_narrows_combinations(typed: str, left: list[str]) -> None:
    assert points(study(typed, params={}, combinations=LISTED)) == left


def test_what_the_product_has_besides_is_known() -> None:
    axes = study(zips=ZIP)
    assert not disagrees({"model": "m", "seed": "0", "lr": "0.0002"}, axes)
    assert disagrees({"model": "m", "seed": "0", "lr": "0.0001"}, axes)
    assert not disagrees({"model": "m", "seed": "0"}, axes)


@pytest.mark.parametrize(
    ("typed", "given", "sentence"),
    [
        ((), {"zips": [["model", "seed"]]}, "pairs model and seed, .* as many values of each; model has 3, seed has 2"),
        (("lr=1,2", "model=x,y,z"), {"zips": ZIP}, "model has 3, lr has 2"),
        (("model=xl",), {"zips": ZIP}, "model there is one of s, m, l; got 'xl'; give all of them"),
        ((), {"zips": [["model", "lrr"]]}, "study.zip names 'lrr', which is no axis; the axes are model, seed, lr"),
        ((), {"zips": [["model"]]}, "must name two axes or more; got .model"),
        ((), {"zips": [["model", "lr"], ["lr", "seed"]]}, "names 'lr' twice"),
        ((), {"combinations": [{"model": "s"}]}, "model is set in study.combinations and in hydra.sweeper.params"),
        ((), {"combinations": [{"a": 1, "b": 2}, {"a": 2}]}, "must set the same keys .a, b.; number 2 sets a$"),
        ((), {"combinations": [{"a": 1, "b": [2, 3]}, {"a": 1, "b": 3}]}, "lists a=1 b=3 twice"),
        (("quant=int8",), {"combinations": LISTED}, "quant there is one of none, nf4; got 'int8'"),
        (("quant=none", "adapter=qv"), {"combinations": LISTED}, "no combination of the values given for quant and"),
    ],
)
def test_what_cannot_go_together_is_refused(typed: tuple[str, ...], given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        study(*typed, **given)
