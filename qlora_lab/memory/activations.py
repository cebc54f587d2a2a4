"""The bytes that autograd keeps of one layer, from the counts of profiles.py; workspace.py has what else it takes."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from qlora_lab.config.families import head_size
from qlora_lab.config.hardware import SHORT_ROW_TOKENS
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.memory.profiles import (
    FEED_FORWARD,
    HIDDEN,
    KEY_VALUE,
    PROFILES,
    QUERY,
    Profile,
)

FLOAT32_BYTES = 4
CROSS_INPUTS = ("EncDecAttention.k", "EncDecAttention.v")  # these read what the encoder wrote


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

    def attends_in_float32(self, tokens: int) -> bool:
        """Return whether attention without dropout or bias does, given 16 bits, where layers are not trained.

        Args:
            tokens: of a row.
        """
        return self.emulated or (self.short and not self.on_gpu and tokens < SHORT_ROW_TOKENS)

    @property
    def stream_bytes(self) -> int:
        """Return the bytes of a number between layers: 4 also with autocast, which adds to float32 what is shorter."""
        return FLOAT32_BYTES if self.trained else self.compute_bytes


def saved_bytes(
    architecture: ArchitectureConfig,
    profile: Profile,
    shape: Shape,
    numbers: Numbers,
    adapted: Collection[str],
    *,
    from_attention: bool = True,
    source_tokens: int = 0,
) -> int:
    """Return the bytes that one layer keeps.

    Args:
        adapted: the linears of the layer with an adapter, by their paths in it.
        from_attention: whether a gradient goes through the layer's attention, or only through its feed-forward block,
            as in the lowest layer with adapters where those are in the block alone.
        source_tokens: of a row that an encoder has read, for the layers of a decoder.
    """
    biases = _bias_bytes(architecture, profile, shape, numbers, source_tokens) if from_attention else 0
    if numbers.trained and numbers.short:
        return _autocast_bytes(architecture, profile, shape, numbers, source_tokens) + biases
    if numbers.trained:
        profile = _trained(profile)
    elif not from_attention:
        profile = without_attention(profile)
    if profile.dropout and numbers.on_gpu:
        profile = replace(profile, query=profile.query + profile.exact_query, exact_query=0, scores=(0, 0))
    width = widths(architecture)
    inputs = [kind for names, kind in profile.inputs if numbers.trained or any_of(names, adapted)]
    vectors = profile.hidden * width[HIDDEN] + profile.feed_forward * width[FEED_FORWARD] + profile.query * width[QUERY]
    vectors += sum(width[kind] for kind in inputs)
    if works_out_again(profile, numbers, adapted):
        vectors -= 2 * width[FEED_FORWARD]
    widened = numbers.attends_in_float32(shape.tokens)
    # heads of keys are not repeated where there is no mask, and a single one is without a copy
    if profile.masked and not widened and (shape.rows == 1 or architecture.num_kv_heads == 1):
        vectors -= 2 * (width[QUERY] - width[KEY_VALUE])
    if widened and profile.masked:  # attention in float32 has a mask in it, and shares its output
        vectors -= width[QUERY]
    exact = profile.exact_hidden * width[HIDDEN] + profile.exact_query * width[QUERY]
    of_source = [name for name in adapted if profile.cross_attention and name.endswith(CROSS_INPUTS)]
    exact += profile.exact_key_value * width[KEY_VALUE]
    exact += 0 if profile.dropout else architecture.num_heads  # what attention of another kind sums for each token
    mask = _mask_places(profile, shape)
    seen = (shape.tokens if from_attention else 0) + (source_tokens if profile.cross_attention else 0)
    scores = profile.scores[numbers.short] * architecture.num_heads * seen
    low = (len(adapted) - len(of_source)) * numbers.rank * numbers.adapter_bytes
    mask *= FLOAT32_BYTES if widened else numbers.compute_bytes
    kept = shape.positions * (vectors * numbers.compute_bytes + mask + exact * FLOAT32_BYTES + low + scores)
    kept += biases
    if profile.cross_attention:
        pair = 2 * width[QUERY] * (numbers.compute_bytes if numbers.on_gpu else FLOAT32_BYTES)
        kept += shape.rows * source_tokens * (pair + len(of_source) * numbers.rank * numbers.adapter_bytes)
    return kept


def _bias_bytes(
    architecture: ArchitectureConfig, profile: Profile, shape: Shape, numbers: Numbers, source_tokens: int
) -> int:
    """Return what kernels of a GPU keep instead of attention weights where positions have a bias: a layer's copy of it.

    They give it a gradient where it wants one, and take it as it is read otherwise; a copy is made in each layer, with
    the mask of each row in it (transformers' create_position_bias_mask).
    """
    if not (profile.position_bias and numbers.on_gpu):
        return 0
    padded = shape.rows > 1
    # of a decoder, which sees no padding, one for all rows
    seen = shape.tokens // shape.rows if profile.cross_attention else shape.tokens
    seen += source_tokens if padded else 0  # zeros, which are there without a copy where nothing is masked
    return shape.positions * architecture.num_heads * seen * numbers.compute_bytes


def widths(architecture: ArchitectureConfig) -> dict[str, int]:
    """Return the numbers in a vector of each kind of a profile."""
    return {
        HIDDEN: architecture.hidden_size,
        FEED_FORWARD: architecture.feed_forward_size,
        QUERY: architecture.num_heads * head_size(architecture),
        KEY_VALUE: architecture.num_kv_heads * head_size(architecture),
    }


def _autocast_bytes(
    architecture: ArchitectureConfig, profile: Profile, shape: Shape, numbers: Numbers, source_tokens: int
) -> int:
    """Return what a layer keeps that is trained in 16 bits; autocast's copies of its weights are counted with them."""
    width = widths(architecture)
    of_token = sum(size * number for size, number in zip(profile.autocast, width.values(), strict=True))
    seen = shape.tokens + (source_tokens if profile.cross_attention else 0)
    scores = 0 if profile.dropout and numbers.on_gpu else profile.autocast_scores * seen
    of_token += architecture.num_heads * (FLOAT32_BYTES + scores)
    mask = _mask_places(profile, shape)
    if numbers.on_gpu or numbers.emulated:
        of_token += FLOAT32_BYTES * mask
    else:
        of_token += numbers.compute_bytes * mask - profile.autocast_of_emulation * width[QUERY]
    # key and value of the encoder's tokens, and two copies of those
    pair = 2 * (width[QUERY] * FLOAT32_BYTES + width[HIDDEN] * numbers.compute_bytes) if profile.cross_attention else 0
    return shape.positions * of_token + shape.rows * source_tokens * pair


def shared_bytes(
    profile: Profile, shape: Shape, numbers: Numbers, *, layers: int, checkpointing: bool, source_tokens: int = 0
) -> int:
    """Return what `layers` of a stack keep together: a mask, where each is given it again.

    That is with gradient checkpointing, and with autocast on a CPU that multiplies 16 bits. The mask is one of truth
    values, of batches with padding; attention written out in Python has one of numbers to add, of every batch.
    """
    kinds = 2 if 1 < profile.sees_all_every <= layers else 1
    if checkpointing and any(profile.written_masks):
        return shape.positions * kinds * written_mask_bytes(profile, shape, numbers)
    if checkpointing and profile.dropout and shape.rows > 1:
        return shape.positions * (source_tokens if profile.cross_attention else shape.tokens)
    autocast = numbers.trained and numbers.short and not numbers.on_gpu and not numbers.emulated
    if checkpointing or autocast:
        return shape.positions * kinds * _mask_places(profile, shape)
    return 0


def written_mask_bytes(profile: Profile, shape: Shape, numbers: Numbers) -> int:
    """Return the bytes of a token's row of the mask that attention written out in Python is given."""
    return profile.written_masks[numbers.stream_bytes < FLOAT32_BYTES] * shape.tokens


def _mask_places(profile: Profile, shape: Shape) -> int:
    """Return the places of a token's row of the mask, which batches of one row have none of: they have no padding."""
    return shape.tokens if profile.masked and shape.rows > 1 else 0


def any_of(names: tuple[str, ...], adapted: Collection[str]) -> bool:
    """Say whether a linear with an adapter has one of these names: its path in the layer, or its last part."""
    return any(path in names or path.rpartition(".")[2] in names for path in adapted)


def _trained(profile: Profile) -> Profile:
    again = 2 if profile.head_norms else 1
    return replace(
        profile,
        exact_hidden=profile.exact_hidden + profile.trained_norms,
        exact_query=again * profile.exact_query,
        exact_key_value=again * profile.exact_key_value,
    )


def works_out_again(profile: Profile, numbers: Numbers, adapted: Collection[str]) -> bool:
    """Say whether the layer's MLP keeps its gate and its other half only (adapters/gated_mlp.py)."""
    return profile.gated and numbers.quantized and any_of(("down_proj",), adapted)


def without_attention(profile: Profile) -> Profile:
    """Return what a layer keeps without its attention, or, in a decoder of two, without the one to itself."""
    if profile.cross_attention:
        return replace(profile, exact_hidden=profile.exact_hidden - 2, exact_query=profile.exact_query - 3)
    return replace(
        profile,
        hidden=profile.hidden // 2,
        exact_hidden=profile.exact_hidden // 2,
        query=0,
        exact_query=0,
        exact_key_value=0,
        masked=False,
        scores=(0, 0),
    )


def block_bytes(
    architecture: ArchitectureConfig,
    profile: Profile,
    shape: Shape,
    numbers: Numbers,
    adapted: Collection[str],
    block: Collection[str],
) -> int:
    """Return what of `saved_bytes` a layer keeps for its feed-forward block.

    Args:
        adapted: the linears of the layer with an adapter, by their paths in it.
        block: the linears of such blocks, likewise.
    """
    blocks = 3 if profile.cross_attention else 2
    only = replace(
        profile,
        hidden=profile.hidden // blocks,
        exact_hidden=profile.exact_hidden // blocks,
        trained_norms=profile.trained_norms // blocks,
        query=0,
        exact_query=0,
        exact_key_value=0,
        inputs=tuple((names, kind) for names, kind in profile.inputs if any_of(names, block)),
        # of the bytes that autocast keeps, those of vectors of hidden width are taken to be shared alike
        autocast=(profile.autocast[0] // blocks, profile.autocast[1], 0, 0),
        autocast_scores=0,
        autocast_of_emulation=0,
        masked=False,
        scores=(0, 0),
        position_bias=False,
        cross_attention=False,
    )
    return saved_bytes(architecture, only, shape, numbers, [name for name in adapted if name in set(block)])


def cross_bytes(
    architecture: ArchitectureConfig,
    profile: Profile,
    shape: Shape,
    numbers: Numbers,
    adapted: Collection[str],
    source_tokens: int,
) -> int:
    """Return what of `saved_bytes` a layer of a decoder keeps for its attention to the encoder."""
    if not profile.cross_attention:
        return 0
    without = [name for name in adapted if "EncDecAttention" not in name]
    own = saved_bytes(architecture, PROFILES[architecture.model_type], shape, numbers, without)
    return saved_bytes(architecture, profile, shape, numbers, adapted, source_tokens=source_tokens) - own
