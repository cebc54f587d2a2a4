"""One layer as memory is planned for it: the micro-batch, how it computes, and which of its linears have adapters."""

from collections.abc import Collection
from dataclasses import dataclass

from qlora_lab.config.families import head_size
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.memory.profiles import FEED_FORWARD, HIDDEN, KEY_VALUE, QUERY, Profile

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    rows: int
    tokens: int  # of the longest row, to which the others are padded; of an encoder-decoder, source and target together

    @property
    def positions(self) -> int:
        return self.rows * self.tokens


@dataclass(frozen=True)
class Numbers:
    """How a layer computes.

    Attributes:
        compute_bytes: of a number in the compute dtype.
        rank: of the adapters.
        quantized: whether the linears are.
        trained: whether the layer itself is, in full fine-tuning.
        on_gpu: whether attention runs in kernels of a GPU.
        emulated: whether the machine computes in float32 where the compute dtype has 16 bits.
    """

    compute_bytes: int
    rank: int
    quantized: bool
    trained: bool
    on_gpu: bool
    emulated: bool

    @property
    def adapter_bytes(self) -> int:
        """Return the bytes of a number between lora_A and lora_B: 4 in the kernels of quantized linears."""
        return FLOAT32_BYTES if self.quantized else self.compute_bytes

    @property
    def short(self) -> bool:
        return self.compute_bytes < FLOAT32_BYTES

    @property
    def stream_bytes(self) -> int:
        """Return the bytes of a number between layers: 4 also with autocast, which adds to float32 what is shorter."""
        return FLOAT32_BYTES if self.trained else self.compute_bytes


@dataclass(frozen=True)
class Layer:
    """A layer with what it reads.

    Attributes:
        adapted: the linears with an adapter, by their paths in the layer.
        source_tokens: of a row that an encoder has read, for the layers of a decoder.
    """

    architecture: ArchitectureConfig
    numbers: Numbers
    profile: Profile
    shape: Shape
    adapted: tuple[str, ...] = ()
    source_tokens: int = 0

    @property
    def widths(self) -> dict[str, int]:
        """Return the numbers in a vector of each kind of a profile."""
        architecture = self.architecture
        return {
            HIDDEN: architecture.hidden_size,
            FEED_FORWARD: architecture.feed_forward_size,
            QUERY: architecture.num_heads * head_size(architecture),
            KEY_VALUE: architecture.num_kv_heads * head_size(architecture),
        }

    @property
    def works_out_again(self) -> bool:
        """Say whether its MLP keeps its gate and its other half only (adapters/gated_mlp.py)."""
        return self.profile.gated and self.numbers.quantized and any_of(("down_proj",), self.adapted)

    @property
    def gates_natively(self) -> bool:
        """Say whether native kernels work out what that MLP does not keep (ops/lora/gated.py)."""
        return self.works_out_again and self.profile.native_gate and not self.numbers.on_gpu

    @property
    def attends_natively(self) -> bool:
        """Say whether its attention is our own (models/attention.py): on a CPU, without dropout, biases or caps."""
        return self.profile.masked and not self.numbers.on_gpu

    @property
    def norms_natively(self) -> bool:
        """Say whether its norms are our own (models/norms.py)."""
        return self.profile.native_norms and not self.numbers.on_gpu and not self.numbers.trained

    @property
    def mask_places(self) -> int:
        """Return the places of a token's row of the mask, which batches of one row have none of: they need none."""
        return self.shape.tokens if self.profile.masked and self.shape.rows > 1 else 0

    @property
    def written_mask_bytes(self) -> int:
        """Return the bytes of a token's row of the mask that attention written out in Python is given."""
        return self.profile.written_masks[self.numbers.stream_bytes < FLOAT32_BYTES] * self.shape.tokens


def any_of(names: tuple[str, ...], adapted: Collection[str]) -> bool:
    """Say whether a linear with an adapter has one of these names: its path in the layer, or its last part."""
    return any(path in names or path.rpartition(".")[2] in names for path in adapted)
