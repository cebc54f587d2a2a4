"""Which linear layers get an adapter, decided by module path alone.

A path's segments tell its block: `self_attn` (LLaMA, OPT), `attention` (Pythia, RoBERTa), `self_attention` (BLOOM),
`attn` (MPT), `SelfAttention` and `EncDecAttention` (T5) are attention; every other linear inside a numbered layer is
feed-forward (`mlp`, OPT's bare `fc1`, T5's `DenseReluDense`, RoBERTa's `intermediate` and `output`). Linears outside
the numbered layers, such as OPT-350m's projections around its embeddings or RoBERTa's pooler, are neither; only
`all_linear` and `regex` reach them.
"""

import re
from collections.abc import Sequence

from qlora_lab.errors import ConfigError, nearest

ATTENTION_SEGMENT = re.compile(r"attn|attention", re.IGNORECASE)
QUERY_VALUE = {"q_proj", "v_proj", "q", "v", "query", "value", "q_lin", "v_lin"}
# One linear for query, key and value: an adapter on query and value has to take in the key as well.
FUSED_QUERY_VALUE = {"query_key_value", "qkv_proj", "Wqkv", "qkv", "c_attn"}
# The new head of a classifier, as transformers calls it; it is never quantized, and always trained as a whole.
CLASSIFIER_HEADS = ("classifier", "score")
HEADS_AND_EMBEDDINGS = {
    *("lm_head", "embed_out", "output_projection", "qa_outputs", *CLASSIFIER_HEADS),
    *("embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "word_embeddings", "embeddings", "shared"),
}
SHOWN_NAMES = 7  # the linears of one LLaMA layer


def match_linears(
    names: Sequence[str], placement: str, target_regex: str | None, last_k_layers: int | None
) -> list[str]:
    """Return the paths among `names` that get an adapter, in the order of `names`.

    Args:
        names: paths of a model's linear layers; output heads and embeddings are never matched.
        placement: all_linear, attention, feed_forward, query_value (a layer that fuses query, key and value counts),
            or regex.
        target_regex: for placement regex; it must match the whole path.
        last_k_layers: keep only the last k layers of every stack of numbered layers (T5 has two); None keeps all.

    Raises:
        ConfigError: nothing matches, the expression is none, or there are fewer than k layers.
    """
    candidates = [name for name in names if HEADS_AND_EMBEDDINGS.isdisjoint(name.split("."))]
    pattern = _compiled(target_regex) if placement == "regex" else None
    chosen = [name for name in candidates if _placed(name, placement, pattern)]
    if not chosen:
        raise ConfigError(_nothing_matches(candidates, placement, target_regex))
    if last_k_layers is None:
        return chosen
    last = _in_last_layers(candidates, last_k_layers)
    kept = [name for name in chosen if name in last]
    if not kept:
        asked = f"adapter.target_regex '{target_regex}'" if pattern else f"adapter.placement '{placement}'"
        raise ConfigError(
            f"adapter.last_k_layers {last_k_layers} leaves none of the {len(chosen)} layers that {asked} matches; "
            f"the last of them is {chosen[-1]}"
        )
    return kept


def layer_index(name: str) -> int | None:
    """Return the number of the layer that a path belongs to, or None outside the numbered layers."""
    return _stack_and_index(name)[1]


def _stack_and_index(name: str) -> tuple[str, int | None]:
    """Return the path of the list of layers, and the number within it: `model.layers`, 3."""
    segments = name.split(".")
    for position, segment in enumerate(segments[:-1]):
        if segment.isdigit():
            return ".".join(segments[:position]), int(segment)
    return "", None


def _placed(name: str, placement: str, pattern: re.Pattern[str] | None) -> bool:
    if pattern is not None:
        return pattern.fullmatch(name) is not None
    block, _, last = name.rpartition(".")
    attention = ATTENTION_SEGMENT.search(block) is not None
    if placement == "attention":
        return attention
    if placement == "feed_forward":
        return not attention and layer_index(name) is not None
    if placement == "query_value":
        return attention and last in QUERY_VALUE | FUSED_QUERY_VALUE
    return True


def _compiled(pattern: str | None) -> re.Pattern[str]:
    try:
        return re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f"adapter.target_regex must be a regular expression; got '{pattern}' ({error})") from error


def _in_last_layers(names: Sequence[str], count: int) -> set[str]:
    """Return the names in the last `count` layers of their stack."""
    stacks: dict[str, int] = {}
    for name in names:
        stack, index = _stack_and_index(name)
        if index is not None:
            stacks[stack] = max(stacks.get(stack, 0), index + 1)
    most = max(stacks.values(), default=0)
    if count > most:
        raise ConfigError(f"adapter.last_k_layers must be at most {most}, the layers of the model; got {count}")
    last = set()
    for name in names:
        stack, index = _stack_and_index(name)
        if index is not None and index >= stacks[stack] - count:
            last.add(name)
    return last


def _nothing_matches(names: Sequence[str], placement: str, target_regex: str | None) -> str:
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))
    shown = ", ".join(kinds[:SHOWN_NAMES]) + (", ..." if len(kinds) > SHOWN_NAMES else "")
    there = f"its linear layers are {shown} (N: the layer)" if kinds else "the model has no linear layers"
    if placement != "regex":
        return f"adapter.placement '{placement}' matches no linear layer of the model; {there}"
    words = re.findall(r"\w+", target_regex or "")
    guess = nearest(words[-1], {name.rpartition(".")[2] for name in names}) if words else ""
    return (
        f"adapter.target_regex must match the whole path of at least one linear layer; got '{target_regex}'; "
        f"{there}{guess}"
    )
