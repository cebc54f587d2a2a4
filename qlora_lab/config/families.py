"""How each model type of transformers lays out its layers, and what it holds besides linear weights.

Names, shapes and order are those of transformers' models of the same numbers, which the tests compare.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, SEQ2SEQ, ArchitectureConfig

Linear = tuple[str, int, int]  # module path, out_features, in_features
# Widths of one attention head that a model type sets by itself; elsewhere it is hidden_size / num_heads.
HEAD_SIZES = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256, "t5": 64}
# OPT and RoBERTa keep two unused rows before the first of their learned positions.
POSITION_OFFSET = 2
T5_BUCKETS = 32  # of relative positions; their biases are kept once for each of the two stacks
CLASSES = 2  # that the head of a classifier is counted for


def no_linears(architecture: ArchitectureConfig) -> list[Linear]:
    return []


def nothing(architecture: ArchitectureConfig) -> int:
    return 0


@dataclass(frozen=True)
class Family:
    """A list of like layers with what belongs to it; an encoder-decoder is two of them."""

    layers: str  # path of the list of layers
    linears: Callable[[ArchitectureConfig], list[Linear]]  # of one layer
    outer_linears: Callable[[ArchitectureConfig], list[Linear]] = no_linears  # before the layers
    biased: tuple[str, ...] = ()  # last names of the linears that have a bias
    norms: int = 2  # in one layer, each hidden_size wide
    head_norms: int = 0  # in one layer, each as wide as an attention head
    norm_vectors: int = 1  # RMSNorm holds a weight, LayerNorm a weight and a bias
    outer_norms: int = 1  # outside the layers
    further: Callable[[ArchitectureConfig], int] = nothing  # parameters besides these and the token embeddings
    grouped_query: bool = True  # fewer key-value heads than heads are possible
    task: str = CAUSAL
    decoder: "Family | None" = None  # of an encoder-decoder


def head_size(architecture: ArchitectureConfig) -> int:
    """Return the width of one attention head."""
    of_its_type = HEAD_SIZES.get(architecture.model_type, architecture.hidden_size // architecture.num_heads)
    return architecture.head_size or of_its_type


def llama_linears(architecture: ArchitectureConfig) -> list[Linear]:
    """Return the linears of a layer with grouped-query attention and a gated feed-forward block."""
    hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
    query = architecture.num_heads * head_size(architecture)
    key_value = architecture.num_kv_heads * head_size(architecture)
    return [
        ("self_attn.q_proj", query, hidden),
        ("self_attn.k_proj", key_value, hidden),
        ("self_attn.v_proj", key_value, hidden),
        ("self_attn.o_proj", hidden, query),
        ("mlp.gate_proj", feed_forward, hidden),
        ("mlp.up_proj", feed_forward, hidden),
        ("mlp.down_proj", hidden, feed_forward),
    ]


def opt_linears(architecture: ArchitectureConfig) -> list[Linear]:
    hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
    attention = [(f"self_attn.{name}", hidden, hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    return [*attention, ("fc1", feed_forward, hidden), ("fc2", hidden, feed_forward)]


def opt_projections(architecture: ArchitectureConfig) -> list[Linear]:
    """Return what stands between narrower embeddings and the layers, in OPT-350m alone."""
    hidden, embedding = architecture.hidden_size, architecture.embedding_size
    if embedding is None or embedding == hidden:
        return []
    return [("model.decoder.project_out", embedding, hidden), ("model.decoder.project_in", hidden, embedding)]


def opt_further(architecture: ArchitectureConfig) -> int:
    """Return the learned positions, and the last norm, which a model that norms after each block does not have."""
    last_norm = 2 * architecture.hidden_size if architecture.norm_first else 0
    return learned_positions(architecture) + last_norm


def learned_positions(architecture: ArchitectureConfig) -> int:
    return (architecture.max_position + POSITION_OFFSET) * architecture.hidden_size


def fused_linears(
    query_key_value: str, attention_out: str, up: str, down: str
) -> Callable[[ArchitectureConfig], list[Linear]]:
    """Return the layout of a layer whose query, key and value are one linear (GPT-NeoX, BLOOM, MPT)."""

    def linears(architecture: ArchitectureConfig) -> list[Linear]:
        hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
        return [
            (query_key_value, 3 * hidden, hidden),
            (attention_out, hidden, hidden),
            (up, feed_forward, hidden),
            (down, hidden, feed_forward),
        ]

    return linears


def t5_linears(*attentions: str) -> Callable[[ArchitectureConfig], list[Linear]]:
    """Return the layout of a T5 v1.1 layer: its attentions, then a gated feed-forward block."""

    def linears(architecture: ArchitectureConfig) -> list[Linear]:
        hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
        width = architecture.num_heads * head_size(architecture)
        found: list[Linear] = []
        for number, attention in enumerate(attentions):
            path = f"layer.{number}.{attention}"
            found += [(f"{path}.{name}", width, hidden) for name in "qkv"]
            found.append((f"{path}.o", hidden, width))
        block = f"layer.{len(attentions)}.DenseReluDense"
        gates = [(f"{block}.{name}", feed_forward, hidden) for name in ("wi_0", "wi_1")]
        return [*found, *gates, (f"{block}.wo", hidden, feed_forward)]

    return linears


def t5_further(architecture: ArchitectureConfig) -> int:
    return T5_BUCKETS * architecture.num_heads


def roberta_linears(architecture: ArchitectureConfig) -> list[Linear]:
    hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
    return [
        *((f"attention.self.{name}", hidden, hidden) for name in ("query", "key", "value")),
        ("attention.output.dense", hidden, hidden),
        ("intermediate.dense", feed_forward, hidden),
        ("output.dense", hidden, feed_forward),
    ]


def roberta_further(architecture: ArchitectureConfig) -> int:
    """Return the positions, the one token type, and the classifier: a dense layer and the output."""
    hidden = architecture.hidden_size
    return learned_positions(architecture) + hidden + (hidden + 1) * hidden + (hidden + 1) * CLASSES


LLAMA = Family("model.layers", llama_linears)
NEOX_NAMES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
FAMILIES = {
    "llama": LLAMA,  # also SmolLM, SmolLM2, TinyLlama, Vicuna, ...
    "mistral": LLAMA,
    "smollm3": LLAMA,
    "qwen2": Family("model.layers", llama_linears, biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": Family("model.layers", llama_linears, head_norms=2),
    "gemma": LLAMA,
    "gemma2": Family("model.layers", llama_linears, norms=4),
    "gemma3_text": Family("model.layers", llama_linears, norms=4, head_norms=2),
    "opt": Family(
        "model.decoder.layers",
        opt_linears,
        outer_linears=opt_projections,
        biased=("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"),
        norm_vectors=2,
        outer_norms=0,  # see opt_further
        further=opt_further,
        grouped_query=False,
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        fused_linears("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        biased=NEOX_NAMES,
        norm_vectors=2,
        grouped_query=False,
    ),
    "bloom": Family(
        "transformer.h",
        fused_linears(
            "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
        ),
        biased=NEOX_NAMES,
        norm_vectors=2,
        outer_norms=2,
        grouped_query=False,
    ),
    "mpt": Family(
        "transformer.blocks",
        fused_linears("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
        grouped_query=False,
    ),
    "t5": Family(
        "encoder.block",
        t5_linears("SelfAttention"),
        further=t5_further,
        grouped_query=False,
        task=SEQ2SEQ,
        decoder=Family("decoder.block", t5_linears("SelfAttention", "EncDecAttention"), norms=3, further=t5_further),
    ),
    "roberta": Family(
        "roberta.encoder.layer",
        roberta_linears,
        biased=("query", "key", "value", "dense"),
        norm_vectors=2,
        further=roberta_further,
        grouped_query=False,
        task=CLASSIFICATION,
    ),
}
