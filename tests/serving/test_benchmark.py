"""What is measured of PEFT is PEFT as it loads adapters itself, which takes too long for 64 of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.serving import Theirs, write_adapter
from tests.tiny_models import LLAMA

PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
NAMES = ["a0", "a1", "a2"]
RANK = 4
OF_ADAPTERS = ("r", "scaling", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "lora_variant")
OF_LAYERS = ("active_adapters", "merged_adapters", "disable_adapters")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers so
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def theirs(folder: Path) -> Theirs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        plain = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.5)).eval()
    return Theirs(plain, folder, PROMPTS, RANK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    plain = LlamaForCausalLM(LlamaConfig(**LLAMA))
    linears = {name: layer for name, layer in plain.named_modules() if name.endswith("_proj")}
    for number, name in enumerate(NAMES):
        write_adapter(folder / name, linears, RANK, number, spread=0.5)
    return folder


def told(model: Any) -> dict[str, Any]:
    """Everything of a model that could make its steps faster or slower."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, one.shape, one.dtype, one.requires_grad) for name, one in model.named_parameters()],
        "layers": {name: [getattr(layer, key) for key in OF_ADAPTERS + OF_LAYERS] for name, layer in layers.items()},
        "adapters": {name: (its.r, its.lora_alpha, its.inference_mode) for name, its in model.peft_config.items()},
        "active": model.active_adapters,
    }


def test_adapters_that_are_added_quickly_are_those_that_peft_loads(folder: Path) -> None:
    ours, loaded = theirs(folder), theirs(folder)
    ours.load(1)
    ours.load(3)
    for name in NAMES:
        loaded.model.load_adapter(str(folder / name), adapter_name=name, low_cpu_mem_usage=True)
    found, expected = told(ours.model), told(loaded.model)
    assert len(found["layers"]) == 14
    for what, its in expected.items():
        assert found[what] == its, what
    values = loaded.model.state_dict()
    for name, tensor in ours.model.state_dict().items():
        assert ".unused." in name or torch.equal(tensor, values[name]), name
    written = ours.write(NAMES, 6)
    assert torch.equal(written, loaded.write(NAMES, 6))
    assert not torch.equal(written, ours.write(["a1", "a2", "a0"], 6)), "the adapters change what is written"
