"""How linear layers are quantized, in transformers' terms."""

from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_lab.errors import ConfigError, unknown_name
from qlora_lab.ops.blockwise.checks import DTYPES, check_block_size
from qlora_lab.ops.formats import format_named

METHOD = "qlora_lab"  # quant_method in a config.json


@register_quantization_config(METHOD)
class QloraLabConfig(QuantizationConfigMixin):
    """How the linear layers of a transformers model are quantized.

    Args:
        format: a name of `ops.formats.FORMATS`.
        block_size: weights that share one absmax.
        double_quant: whether absmax is kept in 8 bits.
        double_quant_block_size: absmax values that share one second-level absmax.
        compute_dtype: of the products, a torch dtype or its name; a name is what is kept (JSON has no dtypes).
        skip_modules: module paths, path endings or regular expressions left as they are, besides the output
            head, tied weights and what the model keeps in float32.
        as_held: whether a checkpoint holds the buffers of our layers themselves, as in the cache of quantized bases.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        format: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        double_quant_block_size: int = 256,
        compute_dtype: torch.dtype | str = "float32",
        skip_modules: list[str] | None = None,
        as_held: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        format_named(format)
        check_block_size("block_size", block_size)
        check_block_size("double_quant_block_size", double_quant_block_size)
        self.quant_method = quant_method  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.double_quant_block_size = double_quant_block_size
        self.compute_dtype = str(compute_dtype).removeprefix("torch.")
        self.skip_modules = list(skip_modules or [])
        self.as_held = as_held
        if self.compute_dtype not in DTYPES:
            raise ConfigError(unknown_name("compute_dtype", self.compute_dtype, DTYPES))

    def layer_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `QuantizedLinear.from_linear`."""
        return {
            "format": self.format,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "double_quant_block_size": self.double_quant_block_size,
            "compute_dtype": DTYPES[self.compute_dtype],
        }


def quantization_config(
    fmt: str, block_size: int, double_quant: bool, double_quant_block_size: int, compute_dtype: torch.dtype
) -> QloraLabConfig | None:
    """Return what `from_pretrained` takes as `quantization_config`; None for the format "none".

    Raises:
        ConfigError: a value out of range.
    """
    if fmt == "none":
        return None
    return QloraLabConfig(fmt, block_size, double_quant, double_quant_block_size, compute_dtype)
