"""Tiny bases saved as users' models are, and adapters with values as after training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.adapters.peft_format import save_adapter
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.schema import AdapterConfig, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.evaluation.candidates import Base
from qlora_lab.merging.merge import Request
from qlora_lab.models.load import load_model
from tests.adapters.conftest import randomize_adapters

PLAIN = QuantConfig(format="none", double_quant=False)
NF4 = QuantConfig()
ADAPTER = AdapterConfig(rank=4, alpha=12)


def architecture(model_type: str, **changes: Any) -> ArchitectureConfig:
    """Matrices are oblong wherever the architecture allows it, so that one that is turned does not fit."""
    own_heads = not FAMILIES[model_type].grouped_query
    numbers = {
        "model_type": model_type,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4 if own_heads else 2,
        "feed_forward_size": 128 if own_heads else 48,
        "vocab_size": 384,
        "head_size": 16 if FAMILIES[model_type].grouped_query or model_type == "t5" else None,
        "tie_embeddings": False,
        "max_position": 512,
    }
    return ArchitectureConfig(**{**numbers, **changes})


def random_model(numbers: ArchitectureConfig, task: str, quant: QuantConfig = PLAIN) -> PreTrainedModel:
    config = ModelConfig(
        "r", "random", task, tokenizer="byte_level", architecture=numbers, max_length_tokens=512, prompt_format="plain"
    )
    return load_model(config, quant, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=4)


def saved_base(
    folder: Path,
    model_type: str = "llama",
    *,
    quant: QuantConfig = NF4,
    save: Callable[[PreTrainedModel, Path], object] = lambda model, folder: model.save_pretrained(folder),
    **changes: Any,
) -> Base:
    """Save a model with random weights, and return it as a run would name it."""
    task = FAMILIES[model_type].task
    model = random_model(architecture(model_type, **changes), task)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # so that logits differ visibly
    save(model, folder)
    config = ModelConfig(
        folder.name,
        "folder",
        task,
        path=str(folder),
        tokenizer="byte_level",
        max_length_tokens=512,
        prompt_format="encoder" if task != "causal" else "plain",
    )
    return Base(config, quant, config.prompt_format, "float32", "cpu")


def trained(base: Base, adapter: Path | None = None, config: AdapterConfig = ADAPTER) -> PreTrainedModel:
    """Return base and adapter as after training, and save the adapter."""
    model = load_model(base.model, base.quant, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=0)
    add_adapters(model, config, torch.Generator().manual_seed(1))
    randomize_adapters(model)
    if adapter is not None:
        save_adapter(model, adapter, config, base.model.name)
    return model.eval()


def request(base: Base, adapter: Path, out: Path, **changes: Any) -> Request:
    values: dict[str, Any] = {"into": "dequantized", "dtype": "float32", "check_rows": 0}
    return Request(adapter=adapter, base=base, out=out, **(values | changes))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return what a model says of a few tokens."""
    ids = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(5))
    further = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False, **further).logits
    return result
