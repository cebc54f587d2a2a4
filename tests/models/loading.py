"""Short ways to load the tiny model of conftest.py, and random ones of its size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_lab.config.schema import ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.models.load import load_model

PLAIN = QuantConfig(format="none", double_quant=False)
NF4 = QuantConfig()
UP = "model.layers.0.mlp.up_proj.weight"


def architecture(**changes: Any) -> ArchitectureConfig:
    """The numbers of the model in conftest.py."""
    numbers: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "feed_forward_size": 48,
        "vocab_size": 64,
        "max_position": 128,
    }
    return ArchitectureConfig(**{**numbers, **changes})


def of_folder(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": "tiny", "source": "folder", "path": str(folder), "max_length_tokens": 128, **changes})


def random_config(numbers: ArchitectureConfig) -> ModelConfig:
    return ModelConfig(
        "r", "random", tokenizer="byte_level", architecture=numbers, max_length_tokens=numbers.max_position
    )


def loaded(
    model: ModelConfig, quant: QuantConfig = PLAIN, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    cache_dir = Path("/nonexistent")  # nothing here needs one
    return load_model(model, quant, compute_dtype=dtype, device="cpu", cache_dir=cache_dir, seed=seed)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
