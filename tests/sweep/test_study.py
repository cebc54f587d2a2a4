"""Studies: what is planned of their axes."""

from pathlib import Path

import pytest

from qlora_lab.errors import ConfigError
from qlora_lab.sweep.plan import make_plan
from tests.helpers import tiny


def test_equal_runs_are_planned_once(tmp_path: Path) -> None:
    none = [({"quant": "none", "quant.block_size": size}, tiny(tmp_path, "quant=none")) for size in ("32", "64")]
    nf4 = [
        ({"quant": "nf4", "quant.block_size": size}, tiny(tmp_path, f"quant.block_size={size}"))
        for size in ("32", "64")
    ]
    plan = make_plan("study", [*none, *nf4])
    assert len(plan.runs) == 3 and plan.repeated == 1
    assert "1 repeated combinations left out" in plan.text()
    with pytest.raises(ConfigError, match=r"no run can use quant.block_size=64: each of its runs is that of another"):
        make_plan("study", none)


def test_fixed_values_are_what_all_runs_share(tmp_path: Path) -> None:
    plan = make_plan("study", [({"seed": str(seed)}, tiny(tmp_path, f"seed={seed}")) for seed in (0, 1)])
    fixed = plan.fixed()
    assert "seed" not in fixed
    assert fixed["model.name"] == "tiny_random"


def test_an_adapter_that_matches_no_layer_is_refused_in_the_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_regex"):
        make_plan("study", [({}, tiny(tmp_path, "adapter=regex", "adapter.target_regex=qq_proj"))])
