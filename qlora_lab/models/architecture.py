"""Between the numbers of `model.architecture` and transformers' configs."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qlora_lab.config.architecture import FAMILIES, check_heads, head_size
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.errors import ModelError, unknown_name

# Where a model type calls a number otherwise than LLaMA does. BLOOM's feed-forward block is always 4 x hidden_size.
FEED_FORWARD_NAMES = {"opt": "ffn_dim"}
ROPE_THETA_NAMES = {"gpt_neox": "rotary_emb_base"}
NORM_EPS_NAMES = {"gpt_neox": "layer_norm_eps", "bloom": "layer_norm_epsilon"}


def to_transformers(architecture: ArchitectureConfig) -> PreTrainedConfig:
    """Build the transformers config of a causal language model.

    Token ids are left out: they are the tokenizer's to say.

    Raises:
        ConfigError: numbers of heads that cannot be.
        ModelError: a model type that these numbers do not describe, or numbers it cannot have.
    """
    model_type = architecture.model_type
    if model_type not in FAMILIES:
        raise ModelError(unknown_name("model.architecture.model_type", model_type, FAMILIES))
    check_heads(architecture)
    values: dict[str, Any] = {
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        FEED_FORWARD_NAMES.get(model_type, "intermediate_size"): architecture.feed_forward_size,
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tie_embeddings,
        "max_position_embeddings": architecture.max_position,
        ROPE_THETA_NAMES.get(model_type, "rope_theta"): architecture.rope_theta,
        NORM_EPS_NAMES.get(model_type, "rms_norm_eps"): architecture.rms_norm_eps,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if FAMILIES[model_type].grouped_query:
        values |= {"num_key_value_heads": architecture.num_kv_heads, "head_dim": head_size(architecture)}
    if model_type == "opt":
        values["word_embed_proj_dim"] = architecture.hidden_size
    config = AutoConfig.for_model(model_type, **values)
    check_architecture(config, architecture, f"a model of type '{model_type}'")
    return config


def check_architecture(config: PreTrainedConfig, architecture: ArchitectureConfig, what: str) -> None:
    """Refuse a model whose sizes are not those of `model.architecture`, which plans its runs.

    Raises:
        ModelError: naming the first number that differs.
    """
    config = config.get_text_config()  # of a model that also sees or hears
    heads = config.num_attention_heads
    actual = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "feed_forward_size": _feed_forward_size(config),
        "vocab_size": config.vocab_size,
        "tie_embeddings": config.tie_word_embeddings,
    }
    for name, value in actual.items():
        stated = getattr(architecture, name)
        if value is not None and stated != value:
            raise ModelError(
                f"model.architecture.{name} is {stated}, but {what} has {value}; "
                "correct it, or set model.architecture=null to take the model as it is"
            )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim != head_size(architecture):
        raise ModelError(
            f"{what} has attention heads of width {head_dim}, but model.architecture can only say "
            f"{head_size(architecture)}; set model.architecture=null to take the model as it is"
        )


def _feed_forward_size(config: PreTrainedConfig) -> int | None:
    """Return the width of the feed-forward block, or None for a model type that calls it by a name of its own."""
    if config.model_type == "bloom":
        return 4 * int(config.hidden_size)
    return getattr(config, FEED_FORWARD_NAMES.get(config.model_type, "intermediate_size"), None)
