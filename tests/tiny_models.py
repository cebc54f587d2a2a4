"""Numbers of models that are built in a moment: `LlamaConfig(**LLAMA | {"vocab_size": 96})`."""

from typing import Any

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDER_LLAMA = LLAMA | {"hidden_size": 64, "intermediate_size": 96}
T5: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
