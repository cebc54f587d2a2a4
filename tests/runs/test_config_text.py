"""config.yaml is the same to every reader of YAML."""

import random
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from qlora_lab.runs.config_text import config_text

AWKWARD = [
    *("", " ", "~", "null", "Yes", "off", "n", "1", "010", "1e-4", "2.", "-", "- a", "a: b", "a #b", "#", "{a}", "["),
    *("*x", "2020-01-01", "12:30", ".inf", "nan", "0x1f", "=", "<<", "!x", "%", "@", "`", "'", '"', "\\", "a\nb"),
    *("\t", "é", "😀", "\u2028", "\x7f", "\ufeff", "nf4", "qlora_lab/x-1.y", "true", "_1"),
    *(0, -3, 2**40, True, False, None, 1e-5, 2e-4, 1e20, -1.5, 0.1, 3.0, 5e-324, float("inf"), float("-inf")),
]


def drawn(draw: random.Random, depth: int) -> Any:
    kind = draw.choice(["leaf", "leaf", "list", "dict"]) if depth else "leaf"
    if kind == "list":
        return [drawn(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == "dict":
        keys = draw.sample([each for each in AWKWARD if isinstance(each, str)], draw.randrange(4))
        return {key: drawn(draw, depth - 1) for key in keys}
    return draw.choice(AWKWARD)


def test_every_value_is_read_back() -> None:
    values = {f"key_{number}": value for number, value in enumerate(AWKWARD)}
    text = config_text(values)
    assert yaml.safe_load(text) == values == OmegaConf.to_container(OmegaConf.create(text))
    assert text.splitlines()[AWKWARD.index("nf4")] == f"key_{AWKWARD.index('nf4')}: nf4", "plain words stay plain"


@pytest.mark.parametrize("seed", range(20))
def test_nested_values_are_read_back(seed: int) -> None:
    draw = random.Random(seed)
    values = {"run_id": "0" * 12, **{f"group_{number}": drawn(draw, 3) for number in range(4)}}
    assert yaml.safe_load(config_text(values)) == values


def test_what_no_configuration_holds_is_refused() -> None:
    with pytest.raises(TypeError, match="got object"):
        config_text({"key": object()})
