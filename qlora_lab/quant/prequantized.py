"""Loading a checkpoint that is quantized already: what it holds is taken as it is, if it is what was asked for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from qlora_lab.errors import ModelError
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.quant.bitsandbytes_format import from_tensors
from qlora_lab.quant.linear import QuantizedLinear


class TakeQuantized(ConversionOps):
    """The loading step of everything named weight in a quantized checkpoint, whether it is quantized or not.

    Args:
        quantizer: the `QloraLabQuantizer`, which keeps the layers and the first refusal.

    Attributes:
        dtype: of a weight that is not quantized; transformers says it while it reads.
    """

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer  # by this name transformers knows that the parts keep their dtypes
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TakeQuantized":
        return TakeQuantized(self.hf_quantizer)  # there is one for each weight, and one quantizer for all

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert model is not None and missing_keys is not None  # given whenever a checkpoint is loaded
        tensors = {name: first_of(parts) for name, parts in input_dict.items()}
        path = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(path)
        if set(tensors) == {"weight"} and (tensors["weight"].is_floating_point() or type(module) is not nn.Linear):
            return {full_layer_name: tensors["weight"].to(self.dtype)}
        if self.hf_quantizer.refusal is None:
            try:
                layer = quantized_layer(module, tensors, self.hf_quantizer.quantization_config)
                self.hf_quantizer.quantized[path] = layer
            except ModelError as error:
                self.hf_quantizer.refusal = ModelError(f"{path}: {error}")
        leave_on_meta(full_layer_name, model, missing_keys)
        return {}


def leave_on_meta(name: str, model: nn.Module, missing_keys: set[str]) -> None:
    """Let transformers make up nothing for a plain weight whose quantized layer takes its place later."""
    missing_keys.discard(name)
    path, _, last = name.rpartition(".")
    parameter: Any = model.get_submodule(path)._parameters.get(last)
    if parameter is not None:
        parameter._is_hf_initialized = True  # drawing numbers for it costs time even without memory


def quantized_layer(module: nn.Module, tensors: Mapping[str, Tensor], config: Any) -> QuantizedLinear:
    """Return the layer that takes the place of `module`, from its tensors in a checkpoint.

    Args:
        config: the `QloraLabConfig` that the weight must have.

    Raises:
        ModelError: the tensors are damaged, or make another layer than the model and `config` say.
    """
    if type(module) is not nn.Linear:
        raise ModelError(f"it is quantized in the checkpoint, but {type(module).__name__} cannot be")
    weight = from_tensors(tensors)
    found, wanted = (weight.out_features, weight.in_features), (module.out_features, module.in_features)
    if found != wanted:
        raise ModelError(f"the weight must have shape {wanted}; in the checkpoint it has {found}")
    check_settings(settings_of_weight(weight), config)
    return QuantizedLinear.from_packed(weight, compute_dtype=DTYPES[config.compute_dtype])


def settings_of_weight(weight: PackedWeight) -> dict[str, Any]:
    """Return a quantized weight's settings, by their names in `QuantConfig`."""
    nested = weight.nested_absmax is not None
    settings = {"format": weight.format, "double_quant": nested, "block_size": weight.block_size}
    return settings | ({"double_quant_block_size": weight.nested_block_size} if nested else {})


def check_settings(found: Mapping[str, Any], wanted: Any) -> None:
    """Raise ModelError unless a checkpoint quantized with the settings `found` is what `wanted` says.

    Args:
        wanted: a `QuantConfig` or a `QloraLabConfig`.
    """
    for key, value in found.items():
        asked = getattr(wanted, key)
        if value != asked:
            raise ModelError(
                f"quant.{key} is {plainly(asked)}, but the checkpoint is quantized with {plainly(value)}; "
                f"set quant.{key}={plainly(value)}, or give the original model, which is quantized as it is loaded"
            )


def plainly(value: object) -> str:
    """Return a value as configurations write it."""
    return str(value).lower()


def takes_quantized(conversion: Any) -> bool:
    """Whether one of transformers' weight conversions is that of `TakeQuantized`."""
    return any(isinstance(operation, TakeQuantized) for operation in getattr(conversion, "operations", ()))


def first_of(tensors: Tensor | list[Tensor]) -> Tensor:
    """Return the one tensor that transformers hands over by itself or in a list."""
    return tensors[0] if isinstance(tensors, list) else tensors
