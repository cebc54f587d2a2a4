"""Between the numbers of `model.architecture` and transformers' configs."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from qlora_lab.config.architecture import check_heads
from qlora_lab.config.families import FAMILIES, POSITION_OFFSET, head_size
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.errors import ModelError, unknown_name

# Where a model type calls a number otherwise than LLaMA does, or, None, has none such: the feed-forward blocks of BLOOM
# are always 4 x hidden_size wide, and those of MPT a whole multiple.
NAMES: dict[str, dict[str, str | None]] = {
    "opt": {"intermediate_size": "ffn_dim"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "rms_norm_eps": "layer_norm_eps"},
    "bloom": {"intermediate_size": None, "rms_norm_eps": "layer_norm_epsilon"},
    "roberta": {"rms_norm_eps": "layer_norm_eps"},
    "t5": {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "d_ff",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    "mpt": {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": None,
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "layer_norm_epsilon",
    },
}
PAD_ID = 0  # of random models that take a pad id for granted; the byte-level tokenizer's


def to_transformers(architecture: ArchitectureConfig) -> PreTrainedConfig:
    """Build the transformers config of a model.

    Token ids are left out where a model does without: they are the tokenizer's to say.

    Raises:
        ConfigError: numbers of heads that cannot be.
        ModelError: a model type that these numbers do not describe, or numbers it cannot have.
    """
    model_type = architecture.model_type
    if model_type not in FAMILIES:
        raise ModelError(unknown_name("model.architecture.model_type", model_type, FAMILIES))
    check_heads(architecture)
    numbers: dict[str, Any] = {
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.feed_forward_size,
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tie_embeddings,
        "max_position_embeddings": architecture.max_position,
        "rope_theta": architecture.rope_theta,
        "rms_norm_eps": architecture.rms_norm_eps,
    }
    names = NAMES.get(model_type, {})
    renamed = {names.get(name, name): value for name, value in numbers.items()}
    values: dict[str, Any] = {name: value for name, value in renamed.items() if name is not None}
    values |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(model_type, **values | _own_values(architecture))
    check_architecture(config, architecture, f"a model of type '{model_type}'")
    return config


def _own_values(architecture: ArchitectureConfig) -> dict[str, Any]:
    """Return what only some model types have."""
    model_type, hidden = architecture.model_type, architecture.hidden_size
    if FAMILIES[model_type].grouped_query:
        return {"num_key_value_heads": architecture.num_kv_heads, "head_dim": head_size(architecture)}
    if model_type == "opt":
        return {
            "word_embed_proj_dim": architecture.embedding_size or hidden,
            "do_layer_norm_before": architecture.norm_first,
        }
    if model_type == "roberta":
        rows = architecture.max_position + POSITION_OFFSET
        return {"max_position_embeddings": rows, "type_vocab_size": 1, "pad_token_id": PAD_ID}
    if model_type == "t5":
        return {
            "num_decoder_layers": architecture.num_decoder_layers or architecture.num_layers,
            "d_kv": head_size(architecture),
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": PAD_ID,
            "decoder_start_token_id": PAD_ID,
        }
    return {"expansion_ratio": architecture.feed_forward_size // hidden} if model_type == "mpt" else {}


def check_architecture(config: PreTrainedConfig, architecture: ArchitectureConfig, what: str) -> None:
    """Refuse a model whose sizes are not those of `model.architecture`, which plans its runs.

    Raises:
        ModelError: naming the first number that differs.
    """
    config = config.get_text_config()  # of a model that also sees or hears
    heads = config.num_attention_heads
    layers = config.num_hidden_layers
    actual = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_layers": layers,
        "num_decoder_layers": getattr(config, "num_decoder_layers", None),
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "feed_forward_size": _feed_forward_size(config),
        "vocab_size": config.vocab_size,
        "tie_embeddings": tied_embeddings(config),
        "embedding_size": getattr(config, "word_embed_proj_dim", None),
        "norm_first": getattr(config, "do_layer_norm_before", None),
    }
    unsaid = {"num_decoder_layers": architecture.num_layers, "embedding_size": architecture.hidden_size}
    for name, value in actual.items():
        stated = getattr(architecture, name) or unsaid.get(name, getattr(architecture, name))
        if value is not None and stated != value:
            raise ModelError(
                f"model.architecture.{name} is {stated}, but {what} has {value}; "
                "correct it, or set model.architecture=null to take the model as it is"
            )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim != head_size(architecture):
        raise ModelError(
            f"model.architecture.head_size is {head_size(architecture)}, but {what} has {head_dim}; "
            "correct it, or set model.architecture=null to take the model as it is"
        )


def tied_embeddings(config: PreTrainedConfig) -> bool:
    """Say whether a model's head is its embeddings.

    transformers 5 calls T5 models tied whatever their files say, and keeps the truth in `scale_decoder_outputs`.
    """
    own = getattr(config, "scale_decoder_outputs", None)
    return bool(config.tie_word_embeddings if own is None else own)


def _feed_forward_size(config: PreTrainedConfig) -> int | None:
    """Return the width of the feed-forward block, or None for a model type that calls it by a name of its own."""
    if config.model_type == "bloom":
        return 4 * int(config.hidden_size)
    if config.model_type == "mpt":
        return int(config.expansion_ratio) * int(config.hidden_size)
    return getattr(config, NAMES.get(config.model_type, {}).get("intermediate_size") or "intermediate_size", None)
