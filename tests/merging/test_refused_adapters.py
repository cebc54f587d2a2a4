"""Adapters and bases that do not belong together, or are damaged or gone, get one sentence each."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab.config.schema import MergeConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ConfigError, QloraLabError
from qlora_lab.merging.merge import Request
from tests.command_line import call
from tests.merging.bases import PLAIN
from tests.merging.conftest import merged

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.0.mlp.up_proj"


def edit_settings(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    save_file(load_file(folder / WEIGHTS) | changes, folder / WEIGHTS)


REFUSED = {
    "another base": (
        lambda adapter, base: edit_settings(adapter, base_model_name_or_path="meta/llama-9b"),
        "is for the base 'meta/llama-9b', and this one is 'base'; take its own base",
    ),
    "a rank that does not fit": (
        lambda adapter, base: edit_settings(adapter, r=8),
        r"must hold lora_A of shape \(8, \d+\) for '.*', by r=8 in its adapter_config.json; got \(4, \d+\)",
    ),
    "a target that is not there": (
        lambda adapter, base: edit_weights(adapter, {f"{LAYER}z.lora_A.weight": torch.zeros(4, 32)}),
        "adapts 'model.layers.0.mlp.up_projz', which is no linear layer of this model .*did you mean",
    ),
    "a matrix that is turned": (
        lambda adapter, base: edit_weights(adapter, {f"{LAYER}.lora_B.weight": torch.zeros(4, 48)}),
        r"must hold lora_B of shape \(48, 4\) for 'model.layers.0.mlp.up_proj'.*got \(4, 48\)",
    ),
    "weights stored the other way round": (
        lambda adapter, base: edit_settings(adapter, fan_in_fan_out=True),
        "must hold a plain LoRA adapter; got fan_in_fan_out true",
    ),
    "a damaged file": (
        lambda adapter, base: (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:500]),
        "the adapter in .* is damaged .*; save or copy it again",
    ),
    "no adapter": (lambda adapter, base: shutil.rmtree(adapter), f"must hold {CONFIG} and {WEIGHTS}; it has no"),
    "a base that is gone": (
        lambda adapter, base: shutil.rmtree(base),
        "model.path must be a folder with a config.json; got",
    ),
    "a base without weights": (
        lambda adapter, base: (base / "model.safetensors").unlink(),
        "has no weights: none of model.safetensors.index.json, model.safetensors, .* is there",
    ),
    "a damaged base": (
        lambda adapter, base: (base / "model.safetensors").write_bytes(b"no weights"),
        "the model in .*base cannot be loaded",
    ),
    "a base that lacks a weight": (
        lambda adapter, base: save_file(
            {n: t for n, t in load_file(base / "model.safetensors").items() if "up_proj" not in n},
            base / "model.safetensors",
        ),
        "the base model base lacks 2 of its weights, such as model.layers.0.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(name: str, asked: Request, tmp_path: Path) -> None:
    change, sentence = REFUSED[name]
    change(asked.adapter, Path(str(asked.base.model.path)))
    with pytest.raises(QloraLabError, match=sentence):
        merged(asked)
    assert not asked.out.exists() and not (tmp_path / ".out.partial").exists()


def test_forms_that_a_base_does_not_have(asked: Request) -> None:
    with pytest.raises(ConfigError, match="into=quantized is for adapters whose base was quantized"):
        merged(replace(asked, base=replace(asked.base, quant=PLAIN), into="quantized"))


def test_what_a_command_line_must_say(tmp_path: Path) -> None:
    def refusal(*arguments: str) -> str:
        done = call("qlora_lab.merge", "out=out", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        return done.stderr

    assert "give either run=ID (or a run's folder), or adapter_folder=FOLDER" in refusal()
    assert "is no run in" in refusal("run=0123456789ab", "paths.runs_dir=runs")
    assert "adapter_folder needs the base it was trained on: model=NAME, and quant=nf4" in refusal("adapter_folder=a")
    assert "did you mean 'quantized'?" in refusal("run=0123456789ab", "into=quantised")
    tiny = ModelConfig("m", "folder", path="m")
    with pytest.raises(ConfigError, match="model can be given with adapter_folder only"):
        MergeConfig(out="o", run="0123456789ab", model=tiny)
    assert MergeConfig(out="o", adapter_folder="a", model=tiny, quant=QuantConfig()).into == "dequantized"
