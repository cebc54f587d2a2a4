"""The bytes of a model's weights as a run holds them, from the numbers of its architecture."""

from dataclasses import dataclass

from qlora_lab.config.architecture import linear_layers, total_parameters
from qlora_lab.config.schema import ArchitectureConfig, QuantConfig

CODE_BITS = {"int8": 8}  # of one weight; every other format packs two codes into a byte
FLOAT32_BYTES = 4
OFFSET_BYTES = 4  # of a layer whose absmax is quantized: their mean, in float32


@dataclass(frozen=True)
class WeightBytes:
    """Bytes by what they hold."""

    packed: int  # codes of the quantized weights
    absmax: int  # first level: one of each block, 8 or 32 bits
    nested_absmax: int  # second level, and the offset of each layer
    dense: int  # everything that is not quantized: embeddings, head, norms, biases

    @property
    def total(self) -> int:
        return self.packed + self.absmax + self.nested_absmax + self.dense


def weight_bytes(architecture: ArchitectureConfig, quant: QuantConfig, dense_bytes: int) -> WeightBytes | None:
    """Return the bytes of a model, its linear layers below the head quantized.

    Args:
        dense_bytes: of one number that is not quantized: 2 in bfloat16, 4 in float32.

    Returns:
        None for a model type whose layers are not known.
    """
    layers, total = linear_layers(architecture), total_parameters(architecture)
    if layers is None or total is None:
        return None
    if quant.format == "none":
        return WeightBytes(0, 0, 0, total * dense_bytes)
    sizes = [out_features * in_features for _, out_features, in_features in layers]
    blocks = [-(-size // quant.block_size) for size in sizes]
    packed = sum((size * CODE_BITS.get(quant.format, 4) + 7) // 8 for size in sizes)
    dense = (total - sum(sizes)) * dense_bytes
    if not quant.double_quant:
        return WeightBytes(packed, FLOAT32_BYTES * sum(blocks), 0, dense)
    nested = [-(-count // quant.double_quant_block_size) * FLOAT32_BYTES + OFFSET_BYTES for count in blocks]
    return WeightBytes(packed, sum(blocks), sum(nested), dense)
