"""Quantized layers on disk as they are in memory: their buffers in one file beside the plain weights.

Faster to load than a checkpoint of `bitsandbytes_format`, because transformers, which takes its time for every tensor,
sees the plain weights alone. For the cache of quantized bases, not for exchange.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_lab.quant.linear import BUFFERS, QuantizedLinear

HELD_FILE = "quantized.safetensors"


class AwaitedLinear(nn.Module):
    """Stands for a quantized layer while plain weights are loaded: a bias at most, which is one of them."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:
        """On the meta device: models may initialise it by name."""
        return torch.empty(self.out_features, self.in_features, device="meta")


def write_held(model: nn.Module, folder: Path) -> None:
    """Write the buffers of a model's quantized layers."""
    tensors = {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
        for name in BUFFERS
        if getattr(layer, name) is not None
    }
    save_file(tensors, folder / HELD_FILE)


def await_held(model: nn.Module, folder: Path) -> None:
    """Put an AwaitedLinear in the place of every layer whose buffers are in `folder`."""
    with safe_open(folder / HELD_FILE, framework="pt") as file:
        paths = dict.fromkeys(name.rpartition(".")[0] for name in file.keys())  # noqa: SIM118  # no mapping
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, AwaitedLinear(linear).train(linear.training))


def take_held(model: nn.Module, folder: Path, device: str, arguments: dict[str, Any]) -> None:
    """Put the quantized layers in the place of those awaited, their buffers mapped from `folder`.

    Args:
        device: where the buffers go; on the CPU they are views of the file.
        arguments: of `QuantizedLinear`, besides its sizes.
    """
    awaited = [(path, module) for path, module in model.named_modules() if isinstance(module, AwaitedLinear)]
    with safe_open(folder / HELD_FILE, framework="pt", device=device) as file:
        tensors = file.get_tensors()
    for path, place in awaited:
        layer = QuantizedLinear(place.in_features, place.out_features, bias=False, device="meta", **arguments)
        for name in BUFFERS:
            setattr(layer, name, tensors.get(f"{path}.{name}"))
        layer.bias = place.bias
        model.set_submodule(path, layer.train(place.training))
