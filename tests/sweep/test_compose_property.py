"""Random studies: each planned configuration is what Hydra composes for the same overrides."""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.load import from_hydra
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep.axes import Axes
from qlora_lab.sweep.command import axes_of_study
from qlora_lab.sweep.compose import Composer
from qlora_lab.sweep.independence import independent_groups
from tests.helpers import hydra_on_conf

# Values of each key, any of which go with any other: group choices, nested values, lists, mappings, references.
VALUES = {
    "adapter": ["attention", "query_value", "last_8_layers", "qlora_paper"],
    "quant": ["nf4", "int8", "fp4_e2m1", "none"],
    "data": ["procedural_clean_128", "procedural_half_wrong_2048"],
    "optim": ["adamw", "qlora_paper"],
    "adapter.rank": ["2", "4", "${data.rows}"],
    "adapter.last_k_layers": ["null", "1"],
    "optim.learning_rate": ["1e-4", "0.5", "3"],
    "data.rows": ["16", "32", "${trainer.batch_size}"],
    "data.source.families": ["[]", "[add_numbers]", "[add_numbers,nth_word]"],
    "model.architecture.num_layers": ["1", "3"],
    "model.architecture": ["{num_heads:2}", "{tie_embeddings:true,max_position:4096}"],
    "++launcher.slurm.extra": ["{}", "{nice:5}"],
    "study.question": ["'why, and how?'", "null"],
    "seed": ["0", "7", "08", "${evaluation.rows}"],
}
# Set, that many other studies are drawn each time; a failure prints what draws its study again.
EXAMPLES = int(os.environ["QLORA_LAB_EXAMPLES"]) if "QLORA_LAB_EXAMPLES" in os.environ else None
REFUSALS = (ConfigError, HydraException, OmegaConfBaseException)
NO_AXES = ("study.question", "++launcher.slurm.extra")


@st.composite
def studies(draw: st.DrawFn) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Draw a study's axes, a command line, and its zip, combinations and exclusions."""
    keys = draw(st.lists(st.sampled_from(list(VALUES)), unique=True, max_size=5))
    some = {key: draw(st.lists(st.sampled_from(VALUES[key]), unique=True, min_size=1, max_size=3)) for key in keys}
    axes = {key: values for key, values in some.items() if key not in NO_AXES}
    arguments = [f"{key}={some[key][0]}" for key in some if key in NO_AXES]
    asked: dict[str, Any] = {"zip": [], "combinations": [], "exclude": []}
    pairs = [[a, b] for a in axes for b in axes if a < b and len(axes[a]) == len(axes[b])]
    if pairs and draw(st.booleans()):
        asked["zip"] = [draw(st.sampled_from(pairs))]
    rest = [key for key in axes if not any(key in group for group in asked["zip"])]
    for key in draw(st.lists(st.sampled_from(rest), unique=True)) if rest else []:
        values = axes.pop(key)  # this axis comes from the command line, or the study lists combinations of it
        if "{" in "".join(values) or draw(st.booleans()):
            arguments.append(f"{key}={','.join(values)}")
        elif not asked["combinations"]:
            asked["combinations"] = [{key: values}]
        else:
            axes[key] = values
    # points hold Hydra's text of a value (0.0001 for 1e-4): `kept_by` compares only values that are their own text
    plain = {key: words for key, values in axes.items() if (words := [v for v in values if re.fullmatch(r"\w+", v)])}
    for _ in range(draw(st.integers(0, 2)) if plain else 0):
        left_out = draw(st.lists(st.sampled_from(list(plain)), unique=True, min_size=1, max_size=2))
        asked["exclude"].append({key: draw(st.sampled_from(plain[key])) for key in left_out})
    return {key: ",".join(values) for key, values in axes.items()}, arguments, asked


@pytest.fixture(scope="module", autouse=True)
def hydra_is_ready() -> Any:
    with hydra_on_conf():
        yield


def composer_of(axes: Axes) -> Composer:
    loader = GlobalHydra.instance().config_loader()
    master = compose("sweep", ["model=tiny_random"], return_hydra_config=True)
    return Composer(
        lambda overrides: compose("sweep", overrides, return_hydra_config=True),
        lambda key: "@" in key or bool(loader.get_group_options(key)),
        independent_groups(loader, master),
    )


def composed_by_hydra(overrides: list[str]) -> RunConfig:
    return from_hydra(compose("sweep", overrides))


def or_refused(composed: Callable[[], RunConfig]) -> RunConfig | str:
    """Return the configuration, or that it was refused: Hydra and our schema each have errors of their own."""
    try:
        return composed()
    except REFUSALS:
        return "refused"


def kept_by(axes: Axes, exclude: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the points that are planned: an exclusion that leaves a value without any run is refused."""
    points = axes.points()
    kept = [point for point in points if not any(out.items() <= point.items() for out in exclude)]
    lost = any({point[key] for point in kept} != {point[key] for point in points} for key in axes.values)
    if lost or not kept:
        with pytest.raises(ConfigError, match=r"study\.exclude"):
            axes.without(exclude)
    else:
        assert axes.without(exclude) == kept
    return kept


@settings(
    max_examples=EXAMPLES or 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES is None,
    database=None,
    print_blob=True,
)
@given(studies())
def test_a_plan_is_what_hydra_composes(study: tuple[dict[str, Any], list[str], dict[str, Any]]) -> None:
    params, arguments, asked = study
    loader = GlobalHydra.instance().config_loader()
    axes = axes_of_study(loader, params, ["model=tiny_random", *arguments], asked)
    points = kept_by(axes, asked["exclude"])
    composer = composer_of(axes)
    for point in points[:: max(1, len(points) // 3)]:
        by_hydra = or_refused(partial(composed_by_hydra, axes.overrides(point)))
        assert or_refused(partial(composer, axes, point)) == by_hydra, point
