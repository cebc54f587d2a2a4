"""Quantization through transformers' own hooks: `from_pretrained(..., quantization_config=QloraLabConfig(...))`.

Importing this module registers the quantizer under "qlora_lab". While a checkpoint streams in, transformers hands
over each linear weight as it is read; it is quantized at once and released, so the peak of loading is the
quantized model plus one weight. A checkpoint that is quantized already (prequantized.py) is taken as it is. Layers are
exchanged when everything is loaded, because models initialise missing weights through their plain linear layers.

On a GPU (device_map) each weight is moved there as it is read, and quantized there.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_lab.errors import ConfigError, ModelError, QloraLabError
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.bitsandbytes_format import PARTS, to_tensors
from qlora_lab.quant.damage import file_of_weight
from qlora_lab.quant.held import await_held, take_held
from qlora_lab.quant.linear import BUFFERS, QuantizedLinear
from qlora_lab.quant.prequantized import TakeQuantized, first_of, leave_on_meta, takes_quantized
from qlora_lab.quant.settings import METHOD, QloraLabConfig

Layout = Literal["parts", "held"]
PAIR = 2  # weights, the fewest that fill whole bytes in every format
logger = logging.getLogger(__name__)


@register_quantizer(METHOD)
class QloraLabQuantizer(HfQuantizer):
    """Called by transformers around and during loading; `quantize_model` drives it over a model in memory."""

    requires_calibration = False
    quantization_config: QloraLabConfig
    serialized_names = {"weight": list(PARTS)}  # noqa: RUF012  # of transformers' base class

    def __init__(self, quantization_config: QloraLabConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()  # paths of the linear layers to quantize
        self.quantized: dict[str, QuantizedLinear] = {}  # those whose weight has come in
        self.refusal: ModelError | None = None  # transformers would log it as a report, so it is raised at the end
        self._likely: set[str] = set()  # paths of the linear layers that will be quantized, as far as it is known
        self._held: Path | None = None  # the folder of a checkpoint that holds our layers' buffers
        self._files: list[str] = []  # of the checkpoint
        self._device = "cpu"
        self._saving: Layout | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            raise ConfigError(
                f"device_map must name one device for the whole model; got {sorted(map(str, device_map.values()))}"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        paths = linears_to_quantize(model, self.quantization_config)
        self._files = list(kwargs.get("checkpoint_files") or [])
        self._likely = set(paths)
        if not self.pre_quantized:  # otherwise the checkpoint says which
            self.targets = set(paths)
        elif self.quantization_config.as_held:
            self._held = Path(kwargs["checkpoint_files"][0]).parent
            self._device = str(next(iter((kwargs["device_map"] or {}).values()), "cpu"))
            await_held(model, self._held)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.targets

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes of one number; transformers reserves them on a GPU before it reads, in one piece."""
        path, _, name = param_name.rpartition(".")
        if name == "weight" and path in self._likely and param.is_floating_point():
            return FORMATS[self.quantization_config.format].packed_bytes(PAIR) / PAIR
        return param.element_size()

    def get_quantize_ops(self) -> "QuantizeOnArrival":
        return QuantizeOnArrival(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {} if self.quantization_config.as_held else {"deserialize": TakeQuantized}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, TakeQuantized):
                operation.dtype = dtype
        return super().get_new_dtype(converter, param, dtype)

    def quantize(self, path: str, linear: nn.Linear, weight: Tensor) -> None:
        """Quantize a weight that belongs to the layer at `path`; the layer itself is exchanged later."""
        sizes, arguments = (linear.in_features, linear.out_features), self.quantization_config.layer_arguments()
        layer = QuantizedLinear(*sizes, bias=False, device="meta", **arguments)
        try:
            layer.load_weight(weight)
        except QloraLabError as error:
            file = file_of_weight(self._files, f"{path}.weight")
            raise ModelError(f"{path}{f' in {file}' if file else ''}: {error}") from error
        self.quantized[path] = layer

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.refusal is not None:
            raise self.refusal
        if self._held is not None:
            take_held(model, self._held, self._device, self.quantization_config.layer_arguments())
            return model
        if self.pre_quantized:
            if not self.quantized:
                raise ModelError("its config.json says that it is quantized, but none of its weights is")
            self.targets = set(self.quantized)
            # transformers would undo how the checkpoint was read when it is saved; we write the same again
            loader: Any = model
            loader._weight_conversions = [one for one in loader._weight_conversions if not takes_quantized(one)]
        for path in sorted(self.targets):
            linear = linear_at(model, path)
            if path not in self.quantized:  # not in the checkpoint, so just initialised; or already in memory
                self.quantize(path, linear, linear.weight)
            layer = self.quantized.pop(path)
            layer.bias = linear.bias
            model.set_submodule(path, layer.train(linear.training))
        return model

    def is_serializable(self) -> bool:
        if self._saving is None:
            logger.warning(
                "a model quantized by qlora_lab is saved by qlora_lab.models.save.save_quantized; mostly it is enough "
                "to save its adapters, for the original checkpoint and this quantization give it back exactly"
            )
        return self._saving is not None

    @contextmanager
    def saving(self, layout: Layout) -> Iterator[None]:
        """Let the model's save_pretrained write quantized weights while inside.

        Args:
            layout: "parts" as `bitsandbytes_format` has them, or "held": all but our layers' buffers (held.py).
        """
        self._saving = layout
        try:
            yield
        finally:
            self._saving = None

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all weights as a checkpoint holds them; called by save_pretrained."""
        state = model.state_dict()
        for path, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                for name in BUFFERS:
                    state.pop(f"{path}.{name}", None)
                if self._saving == "held":  # written apart
                    continue
                tensors = to_tensors(layer.packed_weight, layer.compute_dtype)
                state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
        return state, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeOnArrival(ConversionOps):
    """The loading step of one weight: quantize it, and leave nothing to store in the plain layer."""

    def __init__(self, quantizer: QloraLabQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        assert model is not None and missing_keys is not None  # given whenever a checkpoint is loaded
        for name, weights in input_dict.items():
            path = name.removesuffix(".weight")
            if self.quantizer.refusal is None:
                try:
                    self.quantizer.quantize(path, linear_at(model, path), first_of(weights))
                except ModelError as error:
                    self.quantizer.refusal = error
            leave_on_meta(name, model, missing_keys)
        return {}


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at a path of `linears_to_quantize`."""
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def linears_to_quantize(model: PreTrainedModel, config: QloraLabConfig) -> list[str]:
    """Return the paths of the linear layers that quantization replaces, in the model's order.

    Left out are the output head, tied weights, `config.skip_modules`, and what the model wants in float32: some
    of it always, some only against overflow in float16.

    Raises:
        ModelError: there is none, so that the model would stay as it is.
    """
    kept = set(model._keep_in_fp32_modules_strict or ())
    if torch.float16 in (model.dtype, DTYPES[config.compute_dtype]):
        kept |= set(model._keep_in_fp32_modules or ())
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.skip_modules, sorted(kept), add_default_skips=True)
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(path, skipped)
    ]
    if not paths:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to quantize: its weights are in layers of other kinds, as "
            "those of GPT-2 are; set quant=none, or take another model"
        )
    return paths


@dataclass(frozen=True)
class QuantizedShare:
    """How much of a model is quantized."""

    quantized: int  # weights
    matrices: int  # weights of all matrices outside embeddings and output head, the quantized among them

    @property
    def share(self) -> float:
        return self.quantized / self.matrices if self.matrices else 0.0


def count_quantized(model: PreTrainedModel) -> QuantizedShare:
    """Count a model's quantized weights; what mixture-of-experts models fuse into one tensor stays dense, for example.

    Args:
        model: before it gets adapters.
    """
    quantized = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, QuantizedLinear)
    )
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside |= {id(parameter) for parameter in getattr(model.get_output_embeddings(), "parameters", list)()}
    dense = sum(weight.numel() for weight in model.parameters() if weight.ndim >= 2 and id(weight) not in outside)
    return QuantizedShare(quantized, quantized + dense)


def quantize_model(model: PreTrainedModel, config: QloraLabConfig) -> PreTrainedModel:
    """Replace the linear layers of a model in memory by quantized ones, in place, one after the other.

    The same layers are replaced, and the same bytes result, as with `from_pretrained`; for models built from a
    configuration with random weights.

    Raises:
        ModelError: a weight holds NaN or infinite values; the model is then quantized up to that layer.
    """
    quantizer = QloraLabQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantizer._process_model_after_weight_loading(model)
    # So that save_pretrained refuses. The model's config may be shared with other models and says nothing of it.
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model
