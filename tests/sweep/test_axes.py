"""Axes: the study's own, narrowed and widened from the command line, and what no axis can be."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import Axes, axes_of, axis_override

parse = OverridesParser.create().parse_overrides


def test_axes_multiply_with_the_last_fastest() -> None:
    axes = axes_of(parse(["data=a,b", "seed=range(2)"]), [])
    assert axes.points() == [
        {"data": "a", "seed": "0"},
        {"data": "a", "seed": "1"},
        {"data": "b", "seed": "0"},
        {"data": "b", "seed": "1"},
    ]


def test_the_command_line_wins_narrows_and_widens() -> None:
    axes = axes_of(parse(["data=a,b", "seed=range(2)"]), parse(["seed=5", "adapter.rank=4,8", "quant=none"]))
    assert axes.values == {"data": ["a", "b"], "seed": ["5"], "adapter.rank": ["4", "8"]}
    assert axes.shared == ["quant=none"]


@pytest.mark.parametrize("typed", ["seed=5", "++seed=5"])
def test_an_axis_is_narrowed_however_it_is_typed(typed: str) -> None:
    axes = axes_of(parse(["seed=range(2)"]), parse([typed]))
    assert axes.values == {"seed": ["5"]} and not axes.shared
    assert axes.overrides(axes.points()[0]) == [typed]


def test_an_axis_over_a_new_key_is_composed_as_it_was_typed() -> None:
    axes = axes_of([], parse(["+evaluation.sets.x.template=a,b", "++seed=3", "~tracking"]))
    assert axes.points() == [{"evaluation.sets.x.template": "a"}, {"evaluation.sets.x.template": "b"}]
    assert axes.overrides(axes.points()[1]) == ["++seed=3", "~tracking", "+evaluation.sets.x.template=b"]


def test_an_axis_is_not_deleted() -> None:
    with pytest.raises(ConfigError, match=r"~seed would delete an axis of the study; give it one value"):
        axes_of(parse(["seed=range(2)"]), parse(["~seed"]))


@pytest.mark.parametrize("typed", ["+experiment=a,b", "+experiment=[a,b]"])
def test_a_command_answers_one_study(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"\+experiment names one study; got '\+experiment=.*'; start one"):
        axes_of([], parse([typed]))


@pytest.mark.parametrize(
    "override",
    [
        "sweep.action=plan,run",
        "launcher=local,in_process",
        "launcher.max_parallel=range(3)",
        "++study.metric=eval/loss,eval/exact_match",
        "paths.runs_dir=a,b",
        "tracking=none,wandb_offline",
        "trainer.threads=1,2",
    ],
)
def test_what_is_the_same_for_all_runs_is_no_axis(override: str) -> None:
    key = override.partition("=")[0].lstrip("+")
    for params, arguments in (([], [override]), ([override], [])):
        with pytest.raises(ConfigError, match=rf"^{key} cannot be an axis.*give it one value$"):
            axes_of(parse(params), parse(arguments))


@pytest.mark.parametrize(
    ("override", "twice"),
    [
        ("data=a,b,a", "a"),
        ("seed=0,1,0", "0"),
        ("optim.learning_rate=1e-4,2e-4,0.0001", "0.0001"),
        ("data.source.path='a b','a b'", "'a b'"),
        ("data.source.families=[a],[b],[a]", r"\[a\]"),
    ],
)
def test_a_value_listed_twice_is_refused(override: str, twice: str) -> None:
    with pytest.raises(ConfigError, match=rf"lists {twice} twice; got .*; remove one of them"):
        axes_of([], parse([override]))
    with pytest.raises(ConfigError, match="twice"):
        axes_of(parse([override]), [])


def test_only_lists_are_axes() -> None:
    with pytest.raises(ConfigError, match="learning_rate must be a list of values"):
        axes_of([], parse(["optim.learning_rate=interval(0,1)"]))


def test_no_axes_is_one_run() -> None:
    assert Axes({}, []).points() == [{}]


@pytest.mark.parametrize(
    ("in_yaml", "values"),
    [
        ("none,nf4", ["none", "nf4"]),
        ("range(2)", ["0", "1"]),
        (["none", "nf4"], ["none", "nf4"]),
        ([0, 1], ["0", "1"]),
        ([7], ["7"]),
        (None, ["null"]),
        ([128, None], ["128", "null"]),
        ([True, False], ["True", "False"]),
        (True, ["True"]),
        ([1e-4, 0.5], ["0.0001", "0.5"]),
        ([["add_numbers"], ["add_numbers", "nth_word"]], ["[add_numbers]", "[add_numbers,nth_word]"]),
        (["a, b", "", "it's"], ["'a, b'", "''", r"'it\'s'"]),
    ],
)
def test_axes_are_read_as_yaml_means_them(in_yaml: Any, values: list[str]) -> None:
    assert axes_of(parse([axis_override("key", in_yaml)]), []).values == {"key": values}


@pytest.mark.parametrize("in_yaml", [[], {"rank": [4, 8]}])
def test_an_axis_without_values_is_refused(in_yaml: Any) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.params\.adapter must be a list of values"):
        axis_override("adapter", in_yaml)


def left(axes: Axes, *exclude: dict[str, Any]) -> list[str]:
    return [" ".join(point.values()) for point in axes.without(list(exclude))]


def test_exclusions_leave_out_combinations() -> None:
    axes = axes_of([], parse(["quant=none,nf4", "data.rows=8,null,16", "optim.learning_rate=1e-4,2e-4"]))
    kept = left(axes, {"quant": "nf4", "data.rows": [8, None]}, {"optim.learning_rate": 2e-4, "data.rows": 16})
    assert kept == [
        "none 8 0.0001",
        "none 8 0.0002",
        "none null 0.0001",
        "none null 0.0002",
        "none 16 0.0001",
        "nf4 16 0.0001",
    ]
    assert len(left(axes, {"optim.learning_rate": "1e-4", "data.rows": [8, 16]})) == 8


def test_an_exclusion_that_can_leave_out_nothing_is_refused() -> None:
    axes = axes_of(parse(["quant=none,nf4", "seed=range(2)"]), parse(["quant=nf4", "data.rows=8,16"]))
    axes.without([{"quant": "none", "seed": [0, 1]}, {"data.rows": 8, "seed": 0}])  # none was narrowed away
    with pytest.raises(ConfigError, match=r"study\.exclude: quant must be one of nf4, none; got 'nf5'; did you mean"):
        axes.without([{"quant": ["nf4", "nf5"]}])
    with pytest.raises(ConfigError, match=r"study\.exclude names 'qant', which is no axis; the axes are quant, seed"):
        axes.without([{"qant": "nf4"}])


def test_an_axis_value_that_is_always_left_out_is_refused() -> None:
    whole = axes_of(parse(["quant=none,nf4", "adapter=a,b"]), [])
    exclude = {"quant": "nf4", "adapter": ["a", "b"]}
    with pytest.raises(ConfigError, match=r"no run can use quant=nf4, since study\.exclude leaves out each"):
        whole.without([exclude])
    with pytest.raises(ConfigError, match=r"study\.exclude leaves no run"):
        whole.without([{"quant": ["none", "nf4"]}])
    only_b = {"quant": "nf4", "adapter": "a"}
    # the study's own values go where the command line leaves them no run; those it names do not
    narrowed = axes_of(parse(["quant=none,nf4", "adapter=a,b"]), parse(["quant=nf4"]))
    assert left(narrowed, only_b) == ["nf4 b"]
    asked = axes_of(parse(["quant=none,nf4", "adapter=a,b,c"]), parse(["quant=nf4", "adapter=b,a"]))
    with pytest.raises(ConfigError, match="no run can use adapter=a"):
        asked.without([only_b])
