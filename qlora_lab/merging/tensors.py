"""The tensors of a merged model, made one at a time from those of the base and the adapter."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qlora_lab.adapters.placement import linear_names
from qlora_lab.adapters.saved_adapter import SavedAdapter, check_fits, check_whole
from qlora_lab.adapters.trained_modules import heads_of_a_classifier
from qlora_lab.config.schema import ORIGINAL, QUANTIZED
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.merging.base import OpenedBase
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.bitsandbytes_format import to_tensors

DOUBLED_BYTES = 1.1  # of a quantized weight's codes: with its absmax and tables


@dataclass(frozen=True)
class MergedTensors:
    """What is written, by the name of the parameter that it is.

    Args:
        folder: of the adapter, for what is said of it.
        into: the form of the base, see MergeConfig.
        dtype: of everything that is not quantized.
    """

    base: OpenedBase
    adapter: SavedAdapter
    folder: Path
    into: str
    dtype: torch.dtype

    def check(self) -> None:
        """Refuse what cannot be merged.

        Raises:
            ModelError: the adapter does not fit the base, or trains a tied weight to two different values.
            ConfigError: there is no such form of this base.
        """
        base, model = self.base, self.base.model
        check_fits(model, self.folder, self.adapter, linear_names(model))
        check_whole(model, self.folder, self.adapter, heads_of_a_classifier(model))
        if self.into == QUANTIZED and base.quantization is None:
            raise ConfigError(
                "into=quantized is for adapters whose base was quantized while they were trained, and this one's was "
                "not; take into=dequantized, which then is the base as it is"
            )
        if self.into == ORIGINAL and any(stored.parts for stored in base.stored.values()):
            raise ConfigError(
                f"the base {base.base.model.name} is a quantized checkpoint itself, and what it was made from is not "
                "at hand; take into=dequantized"
            )
        seen: dict[int, Tensor] = {}
        for name, values in self.adapter.further.items():
            other = seen.setdefault(id(base.parameters[name]), values)
            if not torch.equal(other, values):
                raise ModelError(f"{self.folder} holds two different values of '{name}', which is tied in this model")

    @cached_property
    def names(self) -> list[str]:
        """Every tensor, in the order of the checkpoint, what only the adapter has at the end."""
        stored, parameters = self.base.stored, self.base.parameters
        given = {id(parameters[name]) for name in stored if name in parameters}
        new: dict[int, str] = {}
        for name in self.adapter.further:
            if id(parameters[name]) not in given:
                new.setdefault(id(parameters[name]), name)
        return [*stored, *new.values()]

    @cached_property
    def _trained(self) -> dict[int, Tensor]:
        return {id(self.base.parameters[name]): values for name, values in self.adapter.further.items()}

    def planned_bytes(self, name: str) -> int:
        """Return about how much a tensor takes on the disk."""
        parameter = self.base.parameters.get(name)
        count = parameter.numel() if parameter is not None else self._stored_numbers(name)
        if self.into == QUANTIZED and self.base.quantization is not None and self.base.is_quantized(name):
            return int(DOUBLED_BYTES * FORMATS[self.base.quantization.format].packed_bytes(count))
        return count * self.dtype.itemsize

    def _stored_numbers(self, name: str) -> int:
        return torch.Size(self.base.checkpoint.shape(self.base.stored[name].name)).numel()

    @torch.no_grad()
    def make(self, name: str) -> dict[str, Tensor]:
        """Return what is written for one of `names`, by the names in the file.

        Raises:
            ModelError: a weight of the base is damaged.
        """
        base, parameter = self.base, self.base.parameters.get(name)
        written = base.stored[name].name if name in base.stored else name
        if parameter is not None and id(parameter) in self._trained:
            return {written: self._trained[id(parameter)].to(self.dtype)}
        change = self._change(name)
        if base.is_quantized(name) and self.into == QUANTIZED:
            packed = base.quantized_layer(name, change).packed_weight
            parts = to_tensors(packed, base.compute_dtype)
            return {f"{written.removesuffix('.weight')}.{end}": tensor for end, tensor in parts.items()}
        if base.is_quantized(name) and self.into != ORIGINAL:
            layer = base.quantized_layer(name)
            weight = layer.dequantize(torch.float32 if change is not None else base.compute_dtype)
        else:
            # as it was before training came to it, or as it was in memory then
            weight = base.dense(name, torch.float32 if self.into == ORIGINAL else base.compute_dtype)
        if change is not None:
            weight = weight.float() + change
        return {written: weight.to(self.dtype) if weight.is_floating_point() else weight}

    def _change(self, name: str) -> Tensor | None:
        """Return what the adapter adds to a weight: (out_features, in_features) float32, or None."""
        matrices = self.adapter.weights.get(name.removesuffix(".weight"))
        if matrices is None or not name.endswith(".weight"):
            return None
        change = matrices["lora_B"].float() @ matrices["lora_A"].float()
        return change.mul_(self.adapter.scaling)
