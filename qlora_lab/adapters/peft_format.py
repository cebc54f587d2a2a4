"""Adapters on disk, in PEFT's format: what we save loads in PEFT, and what PEFT saved loads here."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import LoraLinear, adapt_layers, adapted_layers, scaling_of
from qlora_lab.adapters.new_folder import new_folder
from qlora_lab.adapters.placement import linear_names
from qlora_lab.adapters.trained_modules import heads_of_a_classifier, train_modules, trained_modules
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.errors import ModelError, nearest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<matrix>lora_[AB])\.weight")
# Settings of PEFT that change what an adapter computes, or which other weights it brings, in ways we do not have.
UNSUPPORTED = (
    *("use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "bias"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora"),
)
OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# Other ways to initialise change the base weights as well.
PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")

Weights = dict[str, dict[str, Tensor]]  # layer path -> lora_A and lora_B


@dataclass(frozen=True)
class SavedAdapter:
    """What lies in a folder."""

    settings: dict[str, Any]
    weights: Weights
    further: dict[str, Tensor]  # parameters trained as a whole, by their name in the model

    @property
    def rank(self) -> int:
        return int(self.settings["r"])

    @property
    def scaling(self) -> float:
        return scaling_of(self.rank, float(self.settings["lora_alpha"]), bool(self.settings.get("use_rslora")))

    @property
    def trained_modules(self) -> list[str]:
        """The modules they belong to; PEFT may list others, which the model does not have."""
        listed = self.settings.get("modules_to_save") or []
        return [name for name in listed if any(f".{name}." in f".{key}" for key in self.further)]


def save_adapter(model: nn.Module, folder: Path, config: AdapterConfig, base_model_name: str) -> None:
    """Write the model's adapters to `folder`; an adapter that is there already survives a failure.

    Args:
        base_model_name: what PEFT should load the base model from: a hub id, or a name.

    Raises:
        ModelError: the model has no adapters.
        OSError: the disk is full or not writable.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ModelError("the model has no adapters to save; add_adapters places them")
    weights = {
        f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix).detach().cpu().contiguous()
        for name, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
    }
    whole = trained_modules(model)
    for path, module in whole.items():
        for name, parameter in module.named_parameters():
            weights[f"{PREFIX}{path}.{name}"] = parameter.detach().cpu().clone()  # shared ones cannot be saved as such
    settings = {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base_model_name,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": _target_modules(model, list(layers)),
        "modules_to_save": list(whole) or None,
        "ensure_weight_tying": _is_tied(model) and not whole.keys() <= set(heads_of_a_classifier(model)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(folder) as fresh:
        save_file(weights, fresh / WEIGHTS, metadata={"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _task_type(model: nn.Module) -> str:
    if heads_of_a_classifier(model):
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder else "CAUSAL_LM"


def _is_tied(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel):
        return False
    head: Any = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Return the layers' last names where no other module has them, else their whole paths; PEFT takes either."""
    last_names = {name.rpartition(".")[2] for name in names}
    inside = tuple(f"{name}." for name in names)  # parts of an adapter, which PEFT's model does not have
    alike = [
        name
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in last_names and not name.startswith(inside)
    ]
    return sorted(last_names) if alike == names else names


def load_adapter(model: nn.Module, folder: Path) -> list[str]:
    """Put a saved adapter on a model, or its values into the same adapters where the model has them.

    Returns:
        The paths of the adapted layers, in the model's order.

    Raises:
        ModelError: the adapter is missing, damaged, of another model, or of a kind that is not plain LoRA; the
            model is unchanged.
    """
    saved = _read(folder)
    weights, rank, scaling = saved.weights, saved.rank, saved.scaling
    dropout = float(saved.settings.get("lora_dropout") or 0.0)
    present = adapted_layers(model)
    if present:
        _check_same(folder, present, weights, rank, scaling)
        names = list(present)
    else:
        linears = linear_names(model)
        _check_known(folder, weights, linears)
        names = [name for name in linears if name in weights]
    _check_shapes(model, folder, weights, rank)
    _check_further(model, folder, saved)
    _check_whole(model, folder, saved, list(trained_modules(model)) if present else heads_of_a_classifier(model))
    if not present:
        adapt_layers(model, names, rank=rank, scaling=scaling, dropout=dropout, generator=torch.Generator())
        train_modules(model, [name for name in saved.trained_modules if name not in heads_of_a_classifier(model)])
    with torch.no_grad():
        for name, values in saved.further.items():
            model.get_parameter(name).copy_(values)
        for name, layer in adapted_layers(model).items():
            layer.lora_A.copy_(weights[name]["lora_A"])
            layer.lora_B.copy_(weights[name]["lora_B"])
    return names


def read_adapter(model: nn.Module, folder: Path, linears: list[str]) -> SavedAdapter:
    """Read a saved adapter that fits a model, which is left as it is; its tensors stay on the host.

    Args:
        linears: the paths of the model's linear layers.

    Raises:
        ModelError: as `load_adapter`.
    """
    saved = _read(folder)
    _check_known(folder, saved.weights, linears)
    _check_shapes(model, folder, saved.weights, saved.rank)
    return saved


def _read(folder: Path) -> SavedAdapter:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} must hold {CONFIG} and {WEIGHTS}; it has no {name}")
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} is damaged ({error}); save or copy it again") from error
    _check_settings(folder, settings)
    whole = settings.get("modules_to_save") or []
    weights: Weights = {}
    further: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found, name = KEY.fullmatch(key), key.removeprefix(PREFIX)
        if found is not None:
            weights.setdefault(found["layer"], {})[found["matrix"]] = tensor
        elif any(f".{module}." in f".{name}" for module in whole):
            further[name] = tensor
        else:
            raise ModelError(
                f"{folder} must hold only lora_A and lora_B weights of linear layers, and modules_to_save; got '{key}'"
            )
    return SavedAdapter(settings, weights, further)


def _check_settings(folder: Path, settings: Any) -> None:
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ModelError(f"{folder} must hold an adapter with peft_type 'LORA'; got {json.dumps(settings)[:60]}")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float):
            raise ModelError(f"{folder / CONFIG} must say {key} as a number; got {json.dumps(settings.get(key))}")
    for key in UNSUPPORTED:
        if settings.get(key) not in OFF:
            raise ModelError(f"{folder} must hold a plain LoRA adapter; got {key} {json.dumps(settings[key])}")
    if settings.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise ModelError(
            f"{folder} was initialised with '{settings['init_lora_weights']}', which changes the base model too; "
            "convert it to plain LoRA with PEFT first"
        )


def _check_known(folder: Path, weights: Weights, linears: list[str]) -> None:
    for name in weights:
        if name not in linears:
            raise ModelError(
                f"{folder} adapts '{name}', which is no linear layer of this model (heads are not adapted)"
                f"{nearest(name, linears)}"
            )


def _check_same(folder: Path, present: dict[str, LoraLinear], weights: Weights, rank: int, scaling: float) -> None:
    odd = sorted(present.keys() ^ weights.keys())
    if odd:
        where = "the model" if odd[0] in present else folder
        raise ModelError(
            f"{folder} adapts {len(weights)} layers and the model {len(present)}; only {where} adapts '{odd[0]}'"
        )
    for layer in present.values():
        if (layer.rank, layer.scaling) != (rank, scaling):
            raise ModelError(
                f"{folder} has adapters of rank {rank} and scaling {scaling:g}, but the model's have rank "
                f"{layer.rank} and scaling {layer.scaling:g}; adapter.rank, alpha and rslora must be the same"
            )


def _check_shapes(model: nn.Module, folder: Path, weights: Weights, rank: int) -> None:
    for name, matrices in weights.items():
        layer: Any = model.get_submodule(name)
        expected = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
        for matrix, shape in expected.items():
            found = tuple(matrices[matrix].shape) if matrix in matrices else "nothing"
            if found != shape:
                raise ModelError(
                    f"{folder} must hold {matrix} of shape {shape} for '{name}'; got {found}; "
                    "is it an adapter of another model?"
                )


def _check_further(model: nn.Module, folder: Path, saved: SavedAdapter) -> None:
    """Refuse modules that the model does not have, or has in another size."""
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    for name, values in saved.further.items():
        if shapes.get(name) != tuple(values.shape):
            raise ModelError(
                f"{folder} holds '{name}' of shape {tuple(values.shape)}, but the model's is "
                f"{shapes.get(name, 'not there')}; is it an adapter of another model, or without model.new_tokens?"
            )


def _check_whole(model: nn.Module, folder: Path, saved: SavedAdapter, modules: list[str]) -> None:
    """Refuse an adapter that lacks values of the modules that are trained as a whole: they would stay as drawn."""
    given = {id(model.get_parameter(name)) for name in saved.further}  # one file may name a shared weight once
    for path in modules:
        for name, parameter in model.get_submodule(path).named_parameters():
            if id(parameter) not in given:
                raise ModelError(
                    f"{folder} holds no values of '{path}.{name}', which the model trains besides its adapters; "
                    "is it an adapter of another task, or of a run with other adapter.trained_modules?"
                )


def save_full(model: PreTrainedModel, folder: Path) -> None:
    """Write a fully fine-tuned model to `folder`, which then loads as model.source=folder (without a tokenizer).

    Tied weights are written once. A model that is there already survives a failure.

    Raises:
        OSError: the disk is full or not writable.
    """
    with new_folder(folder) as fresh:
        model.save_pretrained(fresh, max_shard_size="1TB")  # one file: model.safetensors
