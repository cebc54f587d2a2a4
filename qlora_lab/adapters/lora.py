"""LoRA: a frozen linear layer plus a trained product of two thin matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lab.adapters.gated_mlp import GatedMlp, is_gated_mlp
from qlora_lab.adapters.placement import Linear, target_modules
from qlora_lab.adapters.trained_modules import train_modules
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.errors import ModelError
from qlora_lab.ops.lora.gated import Activation, gated_lora_linear
from qlora_lab.quant.linear import QuantizedLinear

MAX_SEED = 2**62  # of a layer's dropout, drawn on the CPU for each forward


def scaling_of(rank: int, alpha: float, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class LoraSettings:
    """What the layers of one adapter have in common.

    Attributes:
        rank: rows of lora_A, columns of lora_B.
        scaling: factor of the adapter's output.
        dropout: share of the adapter's inputs that are zeroed while training.
        dtype: of the parameters, whatever the base's: float32, so that small steps are not lost, or bfloat16.
    """

    rank: int
    scaling: float
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, config: AdapterConfig) -> Self:
        """Return what a configuration asks for."""
        scaling = scaling_of(config.rank, config.alpha, config.rslora)
        return cls(config.rank, scaling, config.dropout, getattr(torch, config.dtype))


class LoraLinear(nn.Module):
    """y = base(x) + scaling * (dropout(x) @ lora_A^T) @ lora_B^T.

    Args:
        base: the layer to adapt; it is not trained.
        generator: draws lora_A, on the CPU so that it is the same on every device; lora_B starts at zero.

    Parameters are `lora_A` (rank, in_features) and `lora_B` (out_features, rank). They are used in the dtype of x.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    def __init__(self, base: Linear, settings: LoraSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scaling = settings.scaling
        self.dropout = settings.dropout
        self.in_features = base.in_features
        self.out_features = base.out_features
        device = next(iter([*base.parameters(), *base.buffers()])).device
        # As PEFT does: kaiming_uniform_ with a = sqrt(5) is a uniform of this bound.
        bound = 1 / math.sqrt(base.in_features)
        drawn = torch.empty(settings.rank, base.in_features, dtype=torch.float32, device="cpu")
        self.lora_A = nn.Parameter(drawn.uniform_(-bound, bound, generator=generator).to(device, settings.dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, dtype=settings.dtype, device=device))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which model code of transformers asks for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out_features) in the dtype of x, (..., in_features)."""
        if isinstance(self.base, QuantizedLinear) and not self.base.is_expanded:
            return self.base.with_adapter(x, self.lora_A, self.lora_B, **self._draw_adapter())
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))
        return self.base(x) + self.scaling * F.linear(low, self.lora_B.to(x.dtype))

    @property
    def can_take_gated_product(self) -> bool:
        """Whether `of_gated_product` can be called, and spares memory."""
        base = self.base
        frozen = isinstance(base, QuantizedLinear) and (base.bias is None or not base.bias.requires_grad)
        return frozen and not base.is_expanded

    def of_gated_product(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """Return `self(activation(gate) * up)`, keeping of its inputs only gate and up, (..., in_features).

        What it differs by, where native kernels work out the product, `gated_lora_linear` says.
        """
        base = self.base
        assert isinstance(base, QuantizedLinear)
        return gated_lora_linear(
            activation,
            gate,
            up,
            base.packed_weight,
            base.bias,
            self.lora_A,
            self.lora_B,
            compute_dtype=base.compute_dtype,
            **self._draw_adapter(),
        )

    def _draw_adapter(self) -> dict[str, Any]:
        """Return scaling, dropout and a seed of it for one forward."""
        dropout = self.dropout if self.training else 0.0
        return {
            "scaling": self.scaling,
            "dropout": dropout,
            "seed": int(torch.randint(MAX_SEED, ())) if dropout else 0,
        }

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def add_adapters(model: nn.Module, config: AdapterConfig, generator: torch.Generator) -> list[str]:
    """Freeze the model, adapt the layers that `config` places adapters on, and train what it trains as a whole.

    Args:
        generator: on the CPU; draws every lora_A in the model's order.

    Returns:
        The paths of the adapted layers.

    Raises:
        ConfigError: the placement matches no layer, or config.trained_modules no module.
        ModelError: the model has adapters already.
    """
    if adapted_layers(model):
        raise ModelError("the model has adapters already; load it afresh to place others")
    names = target_modules(model, config)
    adapt_layers(model, names, LoraSettings.of(config), generator)
    train_modules(model, config.trained_modules)
    return names


def adapt_layers(model: nn.Module, names: Sequence[str], settings: LoraSettings, generator: torch.Generator) -> None:
    """Freeze the model and put a LoraLinear around each of the linear layers `names`, drawing in their order.

    Gated MLPs with such a layer at their end become GatedMlps, whose paths and values are the same.
    """
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, Linear)
        model.set_submodule(name, LoraLinear(base, settings, generator).train(base.training))
        mlp = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".down_proj") and isinstance(base, QuantizedLinear) and is_gated_mlp(mlp):
            model.set_submodule(name.rpartition(".")[0], GatedMlp(mlp))


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by their path, which is the path of the plain layer in the model without adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def train_everything(model: nn.Module) -> None:
    """Full fine-tuning: every parameter is trained, in float32 (small steps vanish in 16 bits).

    Raises:
        ModelError: the model is quantized, so that most of its weights could not move.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError("a quantized model cannot be trained as a whole; load it with quant.format=none")
    model.float().requires_grad_(True)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name, in the model's order; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trained, all) parameters; packed weights count as weights, and tied ones once."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    packed = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, QuantizedLinear)
    )
    return trained, packed + sum(parameter.numel() for parameter in model.parameters())
