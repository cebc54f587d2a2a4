"""A model's linear layers and parameter counts from the numbers in its config: no download, no torch.

Names, shapes and order are those of transformers' models of the same numbers, which the tests compare.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.errors import ConfigError

Linear = tuple[str, int, int]  # module path, out_features, in_features
# Widths of one attention head that a model type sets by itself; elsewhere it is hidden_size / num_heads.
HEAD_SIZES = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
OPT_POSITION_OFFSET = 2  # OPT keeps two unused rows before its first position embedding


@dataclass(frozen=True)
class Family:
    """How a model type of transformers lays out one layer, and what it holds besides linear weights."""

    layers: str  # path of the list of layers
    linears: Callable[[ArchitectureConfig], list[Linear]]  # of one layer
    biased: tuple[str, ...] = ()  # last names of the linears that have a bias
    norms: int = 2  # in one layer, each hidden_size wide
    head_norms: int = 0  # in one layer, each as wide as an attention head
    norm_vectors: int = 1  # RMSNorm holds a weight, LayerNorm a weight and a bias
    outer_norms: int = 1  # outside the layers
    position_offset: int | None = None  # learned position embeddings: rows besides max_position
    grouped_query: bool = True  # fewer key-value heads than heads are possible


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


def fused_linears(attention: str) -> Callable[[ArchitectureConfig], list[Linear]]:
    """Return the layout of a layer whose query, key and value are one linear (GPT-NeoX, BLOOM)."""

    def linears(architecture: ArchitectureConfig) -> list[Linear]:
        hidden, feed_forward = architecture.hidden_size, architecture.feed_forward_size
        return [
            (f"{attention}.query_key_value", 3 * hidden, hidden),
            (f"{attention}.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", feed_forward, hidden),
            ("mlp.dense_4h_to_h", hidden, feed_forward),
        ]

    return linears


LLAMA = Family("model.layers", llama_linears)
OPT_BIASED = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")
FUSED_BIASED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
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
        biased=OPT_BIASED,
        norm_vectors=2,
        position_offset=OPT_POSITION_OFFSET,
        grouped_query=False,
    ),
    "gpt_neox": Family(
        "gpt_neox.layers",
        fused_linears("attention"),
        biased=FUSED_BIASED,
        norm_vectors=2,
        grouped_query=False,
    ),
    "bloom": Family(
        "transformer.h",
        fused_linears("self_attention"),
        biased=FUSED_BIASED,
        norm_vectors=2,
        outer_norms=2,
        grouped_query=False,
    ),
}


def linear_layers(architecture: ArchitectureConfig) -> list[Linear] | None:
    """Return every linear layer below the head, in the order transformers holds them.

    Returns:
        (module path, out_features, in_features) each; None for a model type that is not in `FAMILIES`.

    Raises:
        ConfigError: numbers of heads that cannot be.
    """
    family = FAMILIES.get(architecture.model_type)
    if family is None:
        return None
    check_heads(architecture)
    return [
        (f"{family.layers}.{layer}.{name}", out_features, in_features)
        for layer in range(architecture.num_layers)
        for name, out_features, in_features in family.linears(architecture)
    ]


def total_parameters(architecture: ArchitectureConfig) -> int | None:
    """Return the number of parameters, tied embeddings counted once; None where `linear_layers` is None."""
    family, layers = FAMILIES.get(architecture.model_type), linear_layers(architecture)
    if family is None or layers is None:
        return None
    hidden = architecture.hidden_size
    weights = sum(out_features * in_features for _, out_features, in_features in layers)
    biases = sum(out_features for path, out_features, _ in layers if path.rpartition(".")[2] in family.biased)
    norm_width = family.norms * hidden + family.head_norms * head_size(architecture)
    norms = family.norm_vectors * (architecture.num_layers * norm_width + family.outer_norms * hidden)
    embeddings = architecture.vocab_size * hidden * (1 if architecture.tie_embeddings else 2)
    positions = 0
    if family.position_offset is not None:
        positions = (architecture.max_position + family.position_offset) * hidden
    return weights + biases + norms + embeddings + positions


def head_size(architecture: ArchitectureConfig) -> int:
    """Return the width of one attention head."""
    return HEAD_SIZES.get(architecture.model_type, architecture.hidden_size // architecture.num_heads)


def check_heads(architecture: ArchitectureConfig) -> None:
    """Refuse numbers of attention heads that cannot be.

    Raises:
        ConfigError: they do not divide the hidden size, or the key-value heads do not divide the heads.
    """
    hidden, heads, kv_heads = architecture.hidden_size, architecture.num_heads, architecture.num_kv_heads
    if architecture.model_type not in HEAD_SIZES and (heads < 1 or hidden % heads != 0):
        raise ConfigError(f"model.architecture.num_heads must divide hidden_size ({hidden}); got {heads}")
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ConfigError(f"model.architecture.num_kv_heads must divide num_heads ({heads}); got {kv_heads}")


def adapter_parameters(layers: list[Linear], rank: int) -> int:
    """Return how many parameters LoRA of `rank` adds to `layers`: rank x (in + out) each."""
    return sum(rank * (out_features + in_features) for _, out_features, in_features in layers)
