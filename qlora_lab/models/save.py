"""A quantized base model on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.adapters.lora import adapted_layers
from qlora_lab.adapters.new_folder import new_folder
from qlora_lab.errors import ModelError
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.quant.bitsandbytes_format import QUANT_TYPES
from qlora_lab.quant.quantizer import QloraLabQuantizer
from qlora_lab.quant.settings import QloraLabConfig


def save_quantized(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write a quantized model to `folder`, from where `load_model` gives the same logits bit for bit.

    Models in nf4 and fp4_e2m1 are written as bitsandbytes' 4-bit checkpoints, which transformers loads with
    bitsandbytes too (on a CPU, bitsandbytes 0.50 decodes them right where the block size divides in_features). Other
    formats have the same layout under names of our own and load only here; see `quant.bitsandbytes_format`.

    Args:
        model: quantized while it was loaded, without adapters.
        tokenizer: written beside it, so that `folder` is complete as model.path.

    Raises:
        ModelError: the model is not quantized, or has adapters.
        OSError: the disk is full or not writable; what was in `folder` before is still there.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QloraLabQuantizer):
        raise ModelError("the model is not quantized by qlora_lab; its own save_pretrained writes it")
    if adapted_layers(model):
        raise ModelError(
            "the model has adapters, which are saved apart from it with save_adapter; "
            "save the quantized base before add_adapters"
        )
    with new_folder(folder) as fresh:
        with quantizer.saving("parts"):
            model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        file = fresh / "config.json"
        kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["quantization_config"] = written_quantization(quantizer.quantization_config, kept)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def written_quantization(config: QloraLabConfig, kept: Sequence[str]) -> dict[str, object]:
    """Return what a config.json says of the quantization.

    Args:
        kept: paths of the linear layers that are not quantized.
    """
    if config.format not in QUANT_TYPES:
        return config.to_dict()
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPES[config.format],
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=DTYPES[config.compute_dtype],
        llm_int8_skip_modules=list(kept),
    )
    return {**theirs.to_dict(), "quant_method": "bitsandbytes"}
