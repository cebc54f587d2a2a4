"""A tiny quantized base, and adapters of it on disk."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.adapters.peft_format import save_adapter
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.evaluation.candidates import Base, alone, base_of
from qlora_lab.evaluation.run_model import RunModel, open_model
from qlora_lab.serving.shared_base import SharedBase
from tests.helpers import composed

LAPTOP = Hardware("some CPU", frozenset(), 2, ())
ADAPTERS = {
    "a": AdapterConfig(rank=4, alpha=8),
    "b": AdapterConfig(rank=2, alpha=3.5, placement="query_value"),
    "c": AdapterConfig(rank=7, alpha=5, rslora=True, placement="feed_forward"),
    "d": AdapterConfig(rank=4, alpha=8, last_k_layers=1),
}


@cache
def tiny_base(*overrides: str) -> Base:
    config = composed("model=tiny_random", "quant=nf4", "trainer.device=cpu", "tracking=none", *overrides)
    return base_of(resolve(config, LAPTOP, lambda source: None))


def opened_base(folder: Path, base: Base | None = None) -> RunModel:
    """Open a base whose random weights are large enough that what it writes depends on what it reads."""
    opened = open_model(alone(base or tiny_base(), folder), cache_dir=folder / "cache")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        embeddings: Any = opened.model.get_input_embeddings()
        embeddings.weight.normal_(0, 1.0, generator=generator)
    return opened


def saved_adapter(folder: Path, config: AdapterConfig, seed: int, base: Base | None = None) -> Path:
    """Write an adapter with values as after training, in PEFT's format."""
    base = base or tiny_base()
    model = opened_base(folder, base).model
    add_adapters(model, config, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    save_adapter(model, folder, config, base.model.name)
    return folder


def saved_adapters(folder: Path) -> dict[str, Path]:
    return {name: saved_adapter(folder / name, config, seed) for seed, (name, config) in enumerate(ADAPTERS.items(), 1)}


def shared_base(folder: Path, adapters: dict[str, Path], budget_bytes: int | None = None) -> SharedBase:
    shared = SharedBase(opened_base(folder), folder, budget_bytes=budget_bytes)
    for name, where in adapters.items():
        shared.register(name, where)
    return shared


def in_int4(base: Base) -> Base:
    return replace(base, quant=replace(base.quant, format="int4"))
