"""Which modules of a loaded model get an adapter."""

from torch import nn
from transformers import PreTrainedModel

from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.quant.linear import QuantizedLinear

Linear = nn.Linear | QuantizedLinear


def linear_names(model: nn.Module) -> list[str]:
    """Return the paths of the model's linear layers, quantized or not, in its order; the output head is left out."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and module is not head]


def target_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the paths of the layers that `config` places adapters on.

    Raises:
        ConfigError: the placement matches no layer.
    """
    return match_linears(linear_names(model), config.placement, config.target_regex, config.last_k_layers)
