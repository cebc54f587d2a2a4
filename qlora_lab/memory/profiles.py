"""What autograd keeps of one layer for its backward pass, by model type.

The counts are those of transformers' layers with our linears, found by recording every tensor that autograd saves
(tests/memory compares them). A frozen linear keeps nothing; an adapted one keeps its input, unless that is kept anyway,
and its product with lora_A; one that is trained itself keeps its input too.
"""

from dataclasses import dataclass, replace

HIDDEN, FEED_FORWARD, QUERY, KEY_VALUE = "hidden", "feed_forward", "query", "key_value"  # widths of vectors
# Attention as kernels of a GPU compute it keeps no weights, with dropout or a bias either; on a CPU those two do.
SCORE_BYTES_WITH_DROPOUT = (12, 12)
SCORE_BACKWARD_WITH_DROPOUT = (4, 4)  # the gradient of what dropout left
# ... and, beyond query, key and value as they are kept, these as they came (in 16 bits all three, and in float32 too),
# query before it is divided, and what attention gives
FORWARD_QUERY_WITH_DROPOUT = (16, 26)


@dataclass(frozen=True)
class Profile:
    """Vectors and matrices a layer keeps: of each token in the compute dtype, or, `exact`, in float32."""

    hidden: int = 0
    feed_forward: int = 0
    gated: bool = False  # a gated MLP: where down_proj is adapted and quantized, two of its four vectors are not kept
    query: int = 0
    exact_hidden: int = 0
    exact_query: int = 0
    exact_key_value: int = 0
    # inputs that are kept only for adapters: the linears that share each, by last name or path in the layer; its width
    inputs: tuple[tuple[tuple[str, ...], str], ...] = ()
    # in full fine-tuning also what the gradients of RMSNorm's weights need: vectors in float32, and, for norms of query
    # and key, once more what is `exact` of those
    trained_norms: int = 0
    head_norms: bool = False
    # in full fine-tuning that computes in 16 bits, by autocast from weights in float32, instead of all that: bytes for
    # each number of the width of hidden, feed-forward, query, and key or value, and of an attention weight
    autocast: tuple[int, int, int, int] = (0, 0, 0, 0)
    autocast_scores: int = 0
    autocast_on_gpu: int = 0  # bytes more for query's width, of the kernels of a GPU
    masked: bool = True  # a layer keeps the mask, tokens x tokens of each row
    # bytes of attention weights, heads x tokens x tokens of each row, in float32 and in 16 bits
    scores: tuple[int, int] = (0, 0)
    # attention with dropout: on a CPU it keeps `scores`, and query, key and value in float32; on a GPU neither
    dropout: bool = False
    cross_attention: bool = False  # to an encoder, of whose tokens it keeps key and value; the scores are there twice
    decoder: "Profile | None" = None  # of an encoder-decoder, whose encoder this is
    # what the backward pass of a feed-forward block takes at its peak beyond what was kept, in vectors of its width, in
    # float32 and in 16 bits
    workspace: tuple[float, float] = (2.0, 2.5)
    parallel: bool = False  # the block reads what attention reads, not what that gives
    # bytes of attention weights that are there at once beyond `scores`, while attention written out in Python computes,
    # and in the backward pass of any that keeps weights, in float32 also where it computes in 16 bits: what comes of
    # one step and of the next, and the gradients of both
    score_forward: tuple[int, int] = (0, 0)
    score_backward: tuple[int, int] = (0, 0)
    # bytes of a number of query width that are there beyond what is kept while attention computes that keeps weights
    forward_query: tuple[int, int] = (0, 0)
    position_bias: bool = False  # attention with dropout adds one to the scores of each row, as wide as these
    # a layer gives its attention weights to the model, which holds them until the next layer is done, also if no layer
    # keeps them
    returns_weights: bool = False
    # bytes of a place in the mask that attention written out in Python is given, in float32 and in 16 bits
    written_masks: tuple[int, int] = (0, 0)
    native_gate: bool = False  # a gated MLP's gate is SiLU, which a CPU has kernels for
    native_norms: bool = False  # on a CPU those of frozen weights keep in the compute dtype what is `exact`
    sees_all_every: int = 1  # so many layers; the others see a window, and have a mask of their own
    norm_workspace: float = 0.0  # of a norm, in vectors of hidden in float32
    logits_bytes: tuple[int, int] = (4, 6)  # of one logit in the chunk at hand


# What a gated MLP that works two vectors out again takes beyond `workspace`, in vectors of feed-forward width.
GATED_WORKSPACE = (1.9, 1.4)
# What one takes instead of both where the gate's kernels run: the product and its gradient, then those of its factors.
NATIVE_GATED_WORKSPACE = 2.0
# What one takes beyond it that keeps them and is quantized, without an adapter at its end.
FROZEN_GATED_WORKSPACE = (0.75, 0.0)
# What one that is not gated takes beyond it where the input of its last layer is not kept, whose place its gradient
# takes otherwise; and where that layer has an adapter without being quantized, for two gradients that are added up.
UNGATED_WORKSPACE = 1.0

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
LLAMA = Profile(
    feed_forward=3,
    gated=True,
    query=4,
    exact_hidden=2,
    native_gate=True,
    native_norms=True,
    inputs=LLAMA_INPUTS,
    trained_norms=2,
    autocast=(26, 8, 4, 4),
    autocast_on_gpu=10,
    norm_workspace=5.0,
)
T5_BLOCK_INPUTS = ((("wi_0", "wi_1"), HIDDEN), (("wo",), FEED_FORWARD))
T5_SELF_INPUTS = (
    (tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"), HIDDEN),
    (("layer.0.SelfAttention.o",), QUERY),
)
T5_ENCODER = Profile(
    feed_forward=7,
    exact_hidden=4,
    exact_query=3,
    inputs=(*T5_SELF_INPUTS, *T5_BLOCK_INPUTS),
    trained_norms=2,
    masked=False,
    scores=SCORE_BYTES_WITH_DROPOUT,
    score_backward=SCORE_BACKWARD_WITH_DROPOUT,
    forward_query=FORWARD_QUERY_WITH_DROPOUT,
    position_bias=True,
    dropout=True,
    autocast=(30, 16, 14, 0),
    autocast_scores=12,
    workspace=(1.0, 1.0),
)
T5_DECODER = replace(
    T5_ENCODER,
    exact_hidden=6,
    exact_query=4,
    inputs=(
        *T5_SELF_INPUTS,
        (("layer.1.EncDecAttention.q",), HIDDEN),
        (("layer.1.EncDecAttention.o",), QUERY),
        *T5_BLOCK_INPUTS,
    ),
    trained_norms=3,
    autocast=(42, 16, 20, 0),
    cross_attention=True,
)
PROFILES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "qwen2": LLAMA,
    "gemma": replace(LLAMA, native_gate=False, native_norms=False),
    "qwen3": replace(LLAMA, exact_query=1, exact_key_value=1, head_norms=True, autocast=(26, 8, 10, 10)),
    "gemma2": Profile(
        feed_forward=3,
        gated=True,
        query=3,
        exact_hidden=4,
        trained_norms=4,
        autocast=(42, 8, 8, 0),
        autocast_scores=8,
        norm_workspace=5.0,
        inputs=(*LLAMA_INPUTS, (("o_proj",), QUERY)),
        masked=False,
        scores=(8, 8),
        score_forward=(4, 4),
        score_backward=(8, 6),
        written_masks=(4, 2),
        sees_all_every=2,
        logits_bytes=(12, 12),
    ),
    "gemma3_text": replace(
        LLAMA,
        native_gate=False,
        native_norms=False,
        exact_hidden=4,
        trained_norms=4,
        exact_query=1,
        exact_key_value=1,
        head_norms=True,
        autocast=(42, 8, 12, 12),
        sees_all_every=6,
    ),
    "opt": Profile(
        hidden=4,
        feed_forward=1,
        query=4,
        inputs=((("q_proj", "k_proj", "v_proj"), HIDDEN), (("fc1",), HIDDEN)),
        autocast=(36, 0, 0, 0),  # its feed-forward block is always four times as wide as hidden
        workspace=(2.0, 2.0),
    ),
    "gpt_neox": Profile(
        hidden=1,
        feed_forward=1,
        query=6,
        inputs=tuple(kind for kind in NEOX_INPUTS if kind[0] != ("dense",)),  # which attention gives, and keeps
        autocast=(36, 0, 0, 0),
        autocast_on_gpu=4,
        workspace=(1.0, 1.1),
        parallel=True,
    ),
    "bloom": Profile(
        hidden=2,
        feed_forward=1,
        query=3,
        inputs=NEOX_INPUTS,
        masked=False,
        scores=(4, 6),
        autocast=(36, 0, 0, 0),
        autocast_scores=6,
        workspace=(5.0, 5.1),
        score_forward=(8, 6),
        score_backward=(8, 6),
        forward_query=(12, 6),  # query, key and value in one, of which there are copies
        returns_weights=True,
        written_masks=(4, 2),
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
        autocast=(36, 0, 0, 0),
        autocast_scores=6,
        workspace=(1.0, 1.1),
        score_forward=(4, 4),
        score_backward=(8, 6),
        returns_weights=True,
        written_masks=(1, 1),  # of truth values
    ),
    "t5": replace(T5_ENCODER, decoder=T5_DECODER),
    "roberta": Profile(
        hidden=4,
        feed_forward=1,
        exact_query=3,
        inputs=(
            (("query", "key", "value"), HIDDEN),
            (("attention.output.dense",), HIDDEN),
            (("intermediate.dense",), HIDDEN),
            (("output.dense",), FEED_FORWARD),
        ),
        masked=False,
        scores=SCORE_BYTES_WITH_DROPOUT,
        score_backward=SCORE_BACKWARD_WITH_DROPOUT,
        forward_query=FORWARD_QUERY_WITH_DROPOUT,
        dropout=True,
        autocast=(34, 4, 0, 0),
        autocast_scores=12,
        norm_workspace=4.0,
        workspace=(1.0, 1.0),
    ),
}
