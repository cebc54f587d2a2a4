"""The base model of a merge: its tensors, what each of them is in the model, and which are quantized in training."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_lab.config.placement import CLASSIFIER_HEADS
from qlora_lab.config.schema import CLASSIFICATION, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.evaluation.candidates import Base
from qlora_lab.merging.checkpoint import Checkpoint, FileCheckpoint, ModelCheckpoint, fetched
from qlora_lab.models.checksums import check_weight_files
from qlora_lab.models.find import find_checkpoint
from qlora_lab.models.load import empty_model, load_model, load_tokenizer
from qlora_lab.models.special_tokens import fill_new_rows, fit_vocabulary
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.quant.bitsandbytes_format import FORMAT_OF_KEY, PARTS, from_tensors
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.quant.prequantized import check_settings, settings_of_weight
from qlora_lab.quant.quantizer import linears_to_quantize
from qlora_lab.quant.settings import QloraLabConfig, quantization_config
from qlora_lab.runs.fingerprint import check_model_fingerprint


@dataclass(frozen=True)
class Stored:
    """What a model's parameter is stored as: one tensor, or the parts of a quantized weight, by their endings."""

    name: str  # in the checkpoint, and of what is written
    parts: dict[str, str]  # ending -> name in the checkpoint; empty where the tensor is plain


@dataclass(frozen=True)
class OpenedBase:
    """A base model before anything of it is read.

    Attributes:
        config: of the merged model: with the rows of new tokens, and without a quantization.
        model: on the meta device, with the rows of new tokens.
        stored: what is in the checkpoint, by its name in the model, or where the model has no such, by its own.
        quantization: what training quantized the layers `quantized` to; None: nothing.
        compute_dtype: of everything else in training.
        generation_config: its file; None where the base has none.
    """

    base: Base
    config: PreTrainedConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    stored: dict[str, Stored]
    quantization: QloraLabConfig | None
    quantized: frozenset[str]
    compute_dtype: torch.dtype
    generation_config: Path | None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by each of its names; tied ones are the same object."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @property
    def _by_token(self) -> list[nn.Parameter]:
        """The weights with a row for each token; some bases have rows to spare, which new tokens take."""
        layers: list[Any] = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        return [layer.weight for layer in layers if layer is not None]

    def is_quantized(self, name: str) -> bool:
        """Say whether a parameter was quantized in training."""
        path, _, last = name.rpartition(".")
        return last == "weight" and path in self.quantized

    def quantized_layer(self, name: str, change: Tensor | None = None) -> QuantizedLinear:
        """Return the layer that training had for the weight `name`, bit for bit; or with a change, quantized anew.

        A change of less than half a step is lost where a weight lies on the grid already. It is added to what was
        never rounded, which lies anywhere between two steps, so that on average it stays; only a base that comes
        quantized has nothing else than its grid.

        Args:
            change: (out_features, in_features) float32.

        Raises:
            ModelError: the weight is damaged, or quantized otherwise than the run says.
        """
        stored, quantization = self.stored[name], self.quantization
        assert quantization is not None  # or nothing is quantized
        try:
            if stored.parts:
                weight = from_tensors({end: self.checkpoint.read(part) for end, part in stored.parts.items()})
                check_settings(settings_of_weight(weight), quantization)
                layer = QuantizedLinear.from_packed(weight, compute_dtype=self.compute_dtype)
                if change is None:
                    return layer
                return quantized(layer.dequantize(torch.float32).add_(change), quantization)
            plain = self.checkpoint.read(stored.name)
            return quantized(plain.to(self.compute_dtype) if change is None else plain.float() + change, quantization)
        except ModelError as error:
            raise ModelError(f"{name.removesuffix('.weight')}: {error}") from error

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor that training left as it is, in `dtype`, with the rows of new tokens."""
        tensor = self.checkpoint.read(self.stored[name].name)
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(dtype)
        parameter, new_tokens = self.parameters.get(name), self.base.model.new_tokens
        if parameter is None or not new_tokens or not any(parameter is weight for weight in self._by_token):
            return tensor
        grown = tensor.new_empty(parameter.shape)
        grown[: len(tensor)] = tensor
        places: Any = self.tokenizer.convert_tokens_to_ids(new_tokens)
        fill_new_rows(grown, len(self.tokenizer) - len(new_tokens), places)
        return grown


def quantized(weight: Tensor, quantization: QloraLabConfig) -> QuantizedLinear:
    """Quantize (out_features, in_features) as it is done while a model is loaded."""
    out_features, in_features = weight.shape
    layer = QuantizedLinear(in_features, out_features, bias=False, device="meta", **quantization.layer_arguments())
    layer.load_weight(weight)
    return layer


def open_base(base: Base, cache_dir: Path) -> OpenedBase:
    """Find a base model's files and describe what they hold.

    Raises:
        ModelError: it is gone, has changed, is damaged, or lacks weights.
    """
    check_model_fingerprint(base.model)
    compute_dtype = DTYPES[base.compute_dtype]
    tokenizer = load_tokenizer(base.model, cache_dir)
    quant = base.quant
    quantization = quantization_config(
        quant.format, quant.block_size, quant.double_quant, quant.double_quant_block_size, compute_dtype
    )
    if base.model.source == "random":
        plain = QuantConfig(format="none", double_quant=False)
        drawn = load_model(
            base.model,
            plain,
            compute_dtype=compute_dtype,
            device="cpu",
            cache_dir=cache_dir,
            seed=base.seed,
            labels=base.labels,
        )
        config, generation_config = drawn.config, None
        opened: Checkpoint = ModelCheckpoint(drawn)
    else:
        location, config = find_checkpoint(base.model, quant, base.labels, cache_dir)
        generation_config = fetched(location, "generation_config.json")
        opened = FileCheckpoint(location)
        check_weight_files(location)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model = empty_model(config, base.model.task)
    fit_vocabulary(model, tokenizer, base.model.new_tokens)
    if quantization is not None and base.model.task == CLASSIFICATION:
        quantization.skip_modules += CLASSIFIER_HEADS
    stored = _stored(model, opened)
    layers = [name.removesuffix(".weight") for name, its in stored.items() if its.parts]
    if quantization is not None and not layers:  # otherwise the checkpoint says which
        layers = linears_to_quantize(model, quantization)
    found = OpenedBase(
        base=base,
        config=model.config,
        model=model,
        tokenizer=tokenizer,
        checkpoint=opened,
        stored=stored,
        quantization=quantization,
        quantized=frozenset(layers),
        compute_dtype=compute_dtype,
        generation_config=generation_config,
    )
    _check_complete(found)
    return found


def _stored(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Stored]:
    """Return what each tensor of a checkpoint is in the model, by the names that transformers gives them on loading.

    Raises:
        ModelError: it makes one parameter of several tensors, or several of one.
    """
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    names = dict.fromkeys(checkpoint.names)
    packed = {name.removesuffix(f".{key}") for name in names for key in FORMAT_OF_KEY if name.endswith(f".{key}")}
    found: dict[str, Stored] = {}
    for name in names:
        stem, part = _split(name)
        if stem in packed and part != "weight":
            continue
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if converted is not None and name not in known:
            raise ModelError(
                f"{type(model).__name__} stores '{name}' otherwise than it computes with it, as mixtures of experts "
                "do; such models cannot be merged yet, but their adapters can be loaded beside the base"
            )
        parts = {end: f"{stem}.{end}" for end in PARTS if f"{stem}.{end}" in names} if stem in packed else {}
        found[renamed if renamed in known else name] = Stored(name, parts)
    return found


def _check_complete(base: OpenedBase) -> None:
    new = CLASSIFIER_HEADS if base.base.model.task == CLASSIFICATION else ()
    given = {id(base.parameters[name]) for name in base.stored if name in base.parameters}
    absent = [
        name
        for name, parameter in base.parameters.items()
        if id(parameter) not in given and name.partition(".")[0] not in new
    ]
    if absent:
        raise ModelError(
            f"the base model {base.base.model.name} lacks {len(absent)} of its weights, such as {absent[0]}; "
            "copy or download it again"
        )


def _split(name: str) -> tuple[str, str]:
    """Split a tensor's name into its layer and its part of it, as bitsandbytes calls the parts."""
    for part in sorted(PARTS, key=len, reverse=True):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""
