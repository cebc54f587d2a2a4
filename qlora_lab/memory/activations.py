"""What autograd keeps of a layer for its backward pass, by model type.

The counts are those of transformers' layers with our linears, found by recording every tensor that autograd saves
(tests/memory compares them). A frozen linear keeps nothing; an adapted one keeps its input, unless that is kept anyway,
and its product with lora_A.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from qlora_lab.config.families import head_size
from qlora_lab.config.schema import ArchitectureConfig

FLOAT32_BYTES = 4
HIDDEN, FEED_FORWARD, QUERY = "hidden", "feed_forward", "query"  # widths of a layer's vectors


@dataclass(frozen=True)
class Profile:
    """Vectors and matrices a layer keeps: of each token in the compute dtype, or, `exact`, always in float32."""

    hidden: int = 0
    feed_forward: int = 0
    gated: bool = False  # a gated MLP: where down_proj is adapted and quantized, two of its four vectors are not kept
    query: int = 0
    exact_hidden: int = 0
    exact_query: int = 0
    exact_key_value: int = 0
    # inputs that are kept only for adapters: the linears that share each, by last names, and its width
    inputs: tuple[tuple[tuple[str, ...], str], ...] = ()
    masked: bool = True  # a layer keeps the mask, tokens x tokens of each row
    # bytes of attention weights, heads x tokens x tokens of each row, in float32 and in 16 bits
    scores: tuple[int, int] = (0, 0)
    # what the backward pass of one layer takes at its peak beyond what was kept, in vectors of feed-forward width, and
    # in bytes of attention weights; each in float32 and in 16 bits
    workspace: tuple[float, float] = (2.0, 2.5)
    score_workspace: tuple[float, float] = (0.0, 0.0)
    logits_bytes: tuple[int, int] = (4, 6)  # of one logit in the chunk at hand


# What a gated MLP that works two vectors out again takes beyond `workspace`, in vectors of feed-forward width.
GATED_WORKSPACE = (1.9, 1.4)
# Where a CPU emulates 16 bits, attention's backward pass runs in float32: vectors of query width that it makes.
WIDENED_ATTENTION = 5.2

LLAMA_INPUTS = (
    (("q_proj", "k_proj", "v_proj"), HIDDEN),
    (("gate_proj", "up_proj"), HIDDEN),
    (("down_proj",), FEED_FORWARD),
)
NEOX_INPUTS = (
    (("query_key_value",), HIDDEN),
    (("dense",), HIDDEN),
    (("dense_h_to_4h",), HIDDEN),
    (("dense_4h_to_h",), FEED_FORWARD),
)
LLAMA = Profile(feed_forward=3, gated=True, query=4, exact_hidden=2, inputs=LLAMA_INPUTS)
PROFILES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": Profile(
        feed_forward=3, gated=True, query=4, exact_hidden=2, exact_query=1, exact_key_value=1, inputs=LLAMA_INPUTS
    ),
    "gemma2": Profile(
        feed_forward=3,
        gated=True,
        query=3,
        exact_hidden=4,
        inputs=(*LLAMA_INPUTS, (("o_proj",), QUERY)),
        masked=False,
        scores=(8, 8),
        score_workspace=(5.7, 4.3),
        logits_bytes=(12, 12),
    ),
    "gemma3_text": Profile(
        feed_forward=3, gated=True, query=4, exact_hidden=4, exact_query=1, exact_key_value=1, inputs=LLAMA_INPUTS
    ),
    "opt": Profile(
        hidden=4,
        feed_forward=1,
        query=4,
        inputs=((("q_proj", "k_proj", "v_proj"), HIDDEN), (("fc1",), HIDDEN)),
        workspace=(1.8, 1.8),
    ),
    "gpt_neox": Profile(hidden=1, feed_forward=1, query=6, inputs=NEOX_INPUTS, workspace=(1.0, 1.1)),
    "bloom": Profile(
        hidden=2,
        feed_forward=1,
        query=3,
        inputs=NEOX_INPUTS,
        masked=False,
        scores=(4, 6),
        workspace=(5.0, 5.1),
        score_workspace=(7.5, 5.3),
    ),
    "mpt": Profile(
        hidden=2,
        feed_forward=1,
        query=3,
        inputs=(
            (("Wqkv",), HIDDEN),
            (("out_proj",), HIDDEN),
            (("up_proj",), HIDDEN),
            (("down_proj",), FEED_FORWARD),
        ),
        masked=False,
        scores=(4, 6),
        workspace=(1.0, 1.1),
        score_workspace=(5.2, 4.6),
    ),
}


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    rows: int
    tokens: int  # of the longest row, to which the others are padded

    @property
    def positions(self) -> int:
        return self.rows * self.tokens


def saved_bytes(
    architecture: ArchitectureConfig,
    shape: Shape,
    compute_bytes: int,
    adapted: Collection[str],
    rank: int,
    *,
    quantized: bool = True,
    from_attention: bool = True,
) -> int:
    """Return the bytes that one layer keeps.

    Args:
        compute_bytes: of a number in the compute dtype.
        adapted: last names of the linears with an adapter, as often as they occur in the layer.
        rank: of the adapters.
        quantized: whether the linears are.
        from_attention: whether a gradient goes through the layer's attention, or only through its feed-forward block,
            as in the lowest layer with adapters where those are in the block alone.
    """
    profile = PROFILES[architecture.model_type]
    if not from_attention:
        profile = without_attention(profile)
    width = {
        HIDDEN: architecture.hidden_size,
        FEED_FORWARD: architecture.feed_forward_size,
        QUERY: architecture.num_heads * head_size(architecture),
    }
    key_value = architecture.num_kv_heads * head_size(architecture)
    inputs = [kind for names, kind in profile.inputs if not set(names).isdisjoint(adapted)]
    vectors = profile.hidden * width[HIDDEN] + profile.feed_forward * width[FEED_FORWARD] + profile.query * width[QUERY]
    vectors += sum(width[kind] for kind in inputs)
    if works_out_again(profile, adapted, quantized):
        vectors -= 2 * width[FEED_FORWARD]
    exact = profile.exact_hidden * width[HIDDEN] + profile.exact_query * width[QUERY]
    exact += profile.exact_key_value * key_value + len(adapted) * rank + architecture.num_heads
    # batches of one row have no padding, so transformers leaves the mask out
    mask = shape.tokens if profile.masked and shape.rows > 1 else 0
    scores = profile.scores[compute_bytes < FLOAT32_BYTES] * architecture.num_heads * shape.tokens
    return shape.positions * ((vectors + mask) * compute_bytes + exact * FLOAT32_BYTES + scores)


def works_out_again(profile: Profile, adapted: Collection[str], quantized: bool) -> bool:
    """Say whether the layer's MLP keeps its gate and its other half only (adapters/gated_mlp.py)."""
    return profile.gated and quantized and "down_proj" in adapted


def without_attention(profile: Profile) -> Profile:
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
    architecture: ArchitectureConfig, shape: Shape, compute_bytes: int, *, again: bool, emulated: bool
) -> int:
    """Return what the backward pass of one layer takes at its peak beyond what its forward pass kept.

    Args:
        again: what `works_out_again` says of the layer.
        emulated: whether the machine computes in float32 where the compute dtype has 16 bits.
    """
    profile, short = PROFILES[architecture.model_type], compute_bytes < FLOAT32_BYTES
    vectors = profile.workspace[short] + (GATED_WORKSPACE[short] if again else 0.0)
    blocks = vectors * architecture.feed_forward_size * compute_bytes
    scores = profile.score_workspace[short] * architecture.num_heads * shape.tokens
    widened = WIDENED_ATTENTION * architecture.num_heads * head_size(architecture) * FLOAT32_BYTES
    attention = widened if emulated and not any(profile.score_workspace) else scores
    return round(shape.positions * max(blocks, attention))
