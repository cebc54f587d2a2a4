"""The bytes that autograd keeps of one layer, and that its backward pass takes, from the counts of profiles.py."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from qlora_lab.config.families import head_size
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.memory.profiles import (
    FEED_FORWARD,
    FROZEN_GATED_WORKSPACE,
    GATED_WORKSPACE,
    HIDDEN,
    KEY_VALUE,
    QUERY,
    WIDENED_ATTENTION,
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
    if numbers.trained and numbers.short:
        return _autocast_bytes(architecture, profile, shape, numbers, source_tokens)
    if numbers.trained:
        profile = _trained(profile)
    elif not from_attention:
        profile = without_attention(profile)
    if profile.dropout and numbers.on_gpu:
        profile = replace(profile, query=profile.query + profile.exact_query, exact_query=0, scores=(0, 0))
    width = _widths(architecture)
    inputs = [kind for names, kind in profile.inputs if numbers.trained or _any_of(names, adapted)]
    vectors = profile.hidden * width[HIDDEN] + profile.feed_forward * width[FEED_FORWARD] + profile.query * width[QUERY]
    vectors += sum(width[kind] for kind in inputs)
    if works_out_again(profile, numbers, adapted):
        vectors -= 2 * width[FEED_FORWARD]
    if numbers.emulated and profile.masked:  # attention in float32 has a mask in it, and shares its output
        vectors -= width[QUERY]
    exact = profile.exact_hidden * width[HIDDEN] + profile.exact_query * width[QUERY]
    of_source = [name for name in adapted if profile.cross_attention and name.endswith(CROSS_INPUTS)]
    exact += profile.exact_key_value * width[KEY_VALUE]
    exact += 0 if profile.dropout else architecture.num_heads  # what attention of another kind sums for each token
    mask = _mask_places(profile, shape)
    seen = (shape.tokens if from_attention else 0) + (source_tokens if profile.cross_attention else 0)
    scores = profile.scores[numbers.short] * architecture.num_heads * seen
    low = (len(adapted) - len(of_source)) * numbers.rank * numbers.adapter_bytes
    mask *= FLOAT32_BYTES if numbers.emulated else numbers.compute_bytes
    kept = shape.positions * (vectors * numbers.compute_bytes + mask + exact * FLOAT32_BYTES + low + scores)
    if profile.cross_attention:
        pair = 2 * width[QUERY] * (numbers.compute_bytes if numbers.on_gpu else FLOAT32_BYTES)
        kept += shape.rows * source_tokens * (pair + len(of_source) * numbers.rank * numbers.adapter_bytes)
    return kept


def _widths(architecture: ArchitectureConfig) -> dict[str, int]:
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
    width = _widths(architecture)
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


def shared_bytes(profile: Profile, shape: Shape, numbers: Numbers, *, checkpointing: bool) -> int:
    """Return what the layers of a stack keep together: a mask of truth values, where each is given it again.

    That is with gradient checkpointing, and with autocast on a CPU that multiplies 16 bits.
    """
    autocast = numbers.trained and numbers.short and not numbers.on_gpu and not numbers.emulated
    return shape.positions * _mask_places(profile, shape) if checkpointing or autocast else 0


def _mask_places(profile: Profile, shape: Shape) -> int:
    """Return the places of a token's row of the mask, which batches of one row have none of: they have no padding."""
    return shape.tokens if profile.masked and shape.rows > 1 else 0


def _any_of(names: tuple[str, ...], adapted: Collection[str]) -> bool:
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
    return profile.gated and numbers.quantized and _any_of(("down_proj",), adapted)


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


def workspace_bytes(
    architecture: ArchitectureConfig, profile: Profile, shape: Shape, numbers: Numbers, *, again: bool
) -> int:
    """Return what the backward pass of one layer takes at its peak beyond what its forward pass kept, gradients too.

    Args:
        again: what `works_out_again` says of the layer.
    """
    vectors = profile.workspace[numbers.short]
    if again:
        vectors += GATED_WORKSPACE[numbers.short]
    elif profile.gated and numbers.quantized:
        vectors += FROZEN_GATED_WORKSPACE[numbers.short]
    hidden = architecture.hidden_size
    blocks = vectors * architecture.feed_forward_size * numbers.compute_bytes
    scores = profile.score_workspace[numbers.short] * architecture.num_heads * shape.tokens
    widened = WIDENED_ATTENTION * architecture.num_heads * head_size(architecture) * FLOAT32_BYTES
    of_its_own = numbers.emulated and not any(profile.score_workspace) and not profile.dropout
    of_block = max(blocks, widened if of_its_own else scores) + hidden * numbers.compute_bytes  # with its input's
    return round(shape.positions * max(of_block, profile.norm_workspace * hidden * FLOAT32_BYTES))
