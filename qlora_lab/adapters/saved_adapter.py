"""A saved adapter in PEFT's format: what its folder holds, and whether it fits a model."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_lab.adapters.lora import scaling_of
from qlora_lab.errors import ModelError, nearest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<matrix>lora_[AB])\.weight")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
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
    def dropout(self) -> float:
        return float(self.settings.get("lora_dropout") or 0.0)

    @property
    def base_name(self) -> str | None:
        """What it says that it was trained on."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def trained_modules(self) -> list[str]:
        """The modules they belong to; PEFT may list others, which the model does not have."""
        listed = self.settings.get("modules_to_save") or []
        return [name for name in listed if any(f".{name}." in f".{key}" for key in self.further)]


def read_adapter(folder: Path) -> SavedAdapter:
    """Read the adapter in a folder.

    Raises:
        ModelError: it is missing, damaged, or of a kind that is not plain LoRA.
    """
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


def check_base_name(adapter: str, saved: SavedAdapter, names: Sequence[str]) -> None:
    """Refuse an adapter that says it was trained on another base, whose layers may well have the same shapes.

    Args:
        adapter: how it is called in the refusal.
        names: what the base at hand is called, its usual name first. Folders that names lie in do not count, and
            owners only where both are known: ORG/NAME may be a copy in a folder NAME, but not OTHER/NAME of the hub.
            A relative FOLDER/NAME that is not here reads as one of the hub.

    Raises:
        ModelError: names both.
    """
    told = saved.base_name
    if not told:
        return
    alike = [name for name in names if Path(name).name.casefold() == Path(told).name.casefold()]
    owned = [name for name in alike if _has_owner(name)]
    if not alike or (owned and _has_owner(told) and told.casefold() not in [name.casefold() for name in owned]):
        ours = owned[0] if owned else names[0]
        raise ModelError(
            f"{adapter} is for the base '{told}', and this one is '{ours}'; take its own base, or if they are the "
            f"same model, write '{ours}' as base_model_name_or_path into its {CONFIG}"
        )


def _has_owner(name: str) -> bool:
    """Whether a name is one of the hub, ORG/NAME; a folder that is there is a folder."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)  # noqa: PTH110  # no error for any text


def check_fits(model: nn.Module, folder: Path, saved: SavedAdapter, linears: Sequence[str]) -> None:
    """Refuse an adapter that does not fit a model without adapters; the model may lie on the meta device.

    Args:
        linears: the paths of the model's linear layers.

    Raises:
        ModelError: it adapts layers that the model does not have, or has matrices or modules of another shape.
    """
    _check_known(folder, saved.weights, linears)
    check_shapes(model, folder, saved)


def check_shapes(model: nn.Module, folder: Path, saved: SavedAdapter) -> None:
    """Refuse matrices and whole modules of another shape than the model's; all layers they belong to are there."""
    _check_matrices(model, folder, saved)
    _check_further(model, folder, saved)


def _check_known(folder: Path, weights: Weights, linears: Sequence[str]) -> None:
    for name in weights:
        if name not in linears:
            raise ModelError(
                f"{folder} adapts '{name}', which is no linear layer of this model (heads are not adapted)"
                f"{nearest(name, linears)}"
            )


def _check_matrices(model: nn.Module, folder: Path, saved: SavedAdapter) -> None:
    rank = saved.rank
    for name, matrices in saved.weights.items():
        layer: Any = model.get_submodule(name)
        expected = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
        for matrix, shape in expected.items():
            found = tuple(matrices[matrix].shape) if matrix in matrices else "nothing"
            if found != shape:
                raise ModelError(
                    f"{folder} must hold {matrix} of shape {shape} for '{name}', by r={rank} in its {CONFIG}; "
                    f"got {found}; is it an adapter of another model?"
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


def check_whole(model: nn.Module, folder: Path, saved: SavedAdapter, modules: list[str]) -> None:
    """Refuse an adapter that lacks values of the modules that are trained as a whole: they would stay as drawn."""
    given = {id(model.get_parameter(name)) for name in saved.further}  # one file may name a shared weight once
    for path in modules:
        for name, parameter in model.get_submodule(path).named_parameters():
            if id(parameter) not in given:
                raise ModelError(
                    f"{folder} holds no values of '{path}.{name}', which the model trains besides its adapters; "
                    "is it an adapter of another task, or of a run with other adapter.trained_modules?"
                )
