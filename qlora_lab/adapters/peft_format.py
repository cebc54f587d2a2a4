"""Adapters on disk, in PEFT's format: what we save loads in PEFT, and what PEFT saved loads here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import LoraLinear, LoraSettings, adapt_layers, adapted_layers
from qlora_lab.adapters.new_folder import new_folder
from qlora_lab.adapters.placement import linear_names
from qlora_lab.adapters.saved_adapter import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    SavedAdapter,
    check_fits,
    check_shapes,
    check_whole,
    read_adapter,
)
from qlora_lab.adapters.trained_modules import heads_of_a_classifier, train_modules, trained_modules
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.errors import ModelError


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
    saved = read_adapter(folder)
    present = adapted_layers(model)
    if present:
        _check_same(folder, present, saved)
        check_shapes(model, folder, saved)
        names = list(present)
    else:
        linears = linear_names(model)
        check_fits(model, folder, saved, linears)
        names = [name for name in linears if name in saved.weights]
    check_whole(model, folder, saved, list(trained_modules(model)) if present else heads_of_a_classifier(model))
    if not present:
        adapt_layers(model, names, LoraSettings(saved.rank, saved.scaling, saved.dropout), torch.Generator())
        train_modules(model, [name for name in saved.trained_modules if name not in heads_of_a_classifier(model)])
    with torch.no_grad():
        for name, values in saved.further.items():
            model.get_parameter(name).copy_(values)
        for name, layer in adapted_layers(model).items():
            layer.lora_A.copy_(saved.weights[name]["lora_A"])
            layer.lora_B.copy_(saved.weights[name]["lora_B"])
    return names


def _check_same(folder: Path, present: dict[str, LoraLinear], saved: SavedAdapter) -> None:
    weights, rank, scaling = saved.weights, saved.rank, saved.scaling
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


def save_full(model: PreTrainedModel, folder: Path) -> None:
    """Write a fully fine-tuned model to `folder`, which then loads as model.source=folder (without a tokenizer).

    Tied weights are written once. A model that is there already survives a failure.

    Raises:
        OSError: the disk is full or not writable.
    """
    with new_folder(folder) as fresh:
        model.save_pretrained(fresh, max_shard_size="1TB")  # one file: model.safetensors
