"""Values on top of a choice of groups give what Hydra gives for the whole list of overrides."""

from collections.abc import Callable

import pytest
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from qlora_lab.config.load import from_hydra
from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import axes_of
from qlora_lab.sweep.compose import Composer
from tests.helpers import hydra_on_conf

GROUPS = ("model", "data", "quant", "adapter", "launcher")
parse = OverridesParser.create().parse_overrides


@pytest.fixture
def loads() -> list[list[str]]:
    return []


@pytest.fixture
def composer(loads: list[list[str]]) -> Callable[..., object]:
    def load(overrides: list[str]) -> DictConfig:
        loads.append(overrides)
        return compose("sweep", overrides, return_hydra_config=True)

    return Composer(load, lambda key: key in GROUPS)


@pytest.mark.parametrize(
    ("overrides", "times"),
    [
        (["seed=range(3)", "adapter.rank=4,8"], 1),
        (["data=procedural_clean_128,procedural_half_wrong_2048", "seed=range(2)", "adapter.last_k_layers=1,null"], 2),
        (["quant.block_size=32,64", "quant=none,nf4", "adapter=attention"], 2),
        (["data.source.families=[add_numbers],[add_numbers,nth_word]", "optim.learning_rate=1e-4,2e-4"], 1),
        (["model.architecture=null,{num_layers:3}", "seed=1"], 4),  # to merge is Hydra's work
        (["+evaluation.sets={}", "+data.source.families=[add_numbers],[nth_word]"], 2),
        (["paths.data_dir=/d", "+experiment=instruction_data", "data=alpaca_slice,hh_rlhf_slice", "seed=0,1"], 2),
    ],
)
def test_runs_are_composed_as_hydra_would(
    composer: Composer, loads: list[list[str]], overrides: list[str], times: int
) -> None:
    axes = axes_of([], parse(overrides))
    with hydra_on_conf():
        composed = [composer(axes, point) for point in axes.points()]
        assert len(loads) <= times
        expected = [from_hydra(compose("sweep", axes.overrides(point))) for point in axes.points()]
    assert composed == expected


@pytest.mark.parametrize("override", ["adapter.rnk=4,8", "adapter.rank=4,x", "adapter.rank.deep=1,2", "foo.bar=1,2"])
def test_bad_axes_are_refused(composer: Composer, override: str) -> None:
    axes = axes_of([], parse([override]))
    with hydra_on_conf(), pytest.raises((ConfigError, ConfigCompositionException)):
        [composer(axes, point) for point in axes.points()]
