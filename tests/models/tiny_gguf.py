"""A llama of two layers as a GGUF file, written the way llama.cpp's converter writes SmolLM2."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS, POSITIONS = 64, 4, 2, 96, 2, 128
HEAD_SIZE = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "1 2"]  # the last one only so that digit splitting is seen to matter
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"


def vocabulary() -> list[str]:
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def rope_permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp wants q and k: the two halves of a head interleaved."""
    halves = weight.reshape(heads, 2, HEAD_SIZE // 2, HIDDEN)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(seed: int) -> dict[str, np.ndarray]:
    """Return the weights by GGUF name, as transformers holds them (q and k not permuted)."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    weights = {"token_embd.weight": normal(len(vocabulary()), HIDDEN), "output_norm.weight": normal(HIDDEN)}
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
        }
        weights |= {f"blk.{layer}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
    return weights


def write_gguf(path: Path, *, seed: int = 0, pre_tokenizer: str = "smollm") -> dict[str, np.ndarray]:
    """Write the file and return the float32 values it stands for, by GGUF name, q and k in transformers' order."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary())
    control = int(gguf.TokenType.CONTROL)
    writer.add_token_types([control] * len(SPECIAL) + [int(gguf.TokenType.NORMAL)] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    stored = {}
    for name, weight in tensors(seed).items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        ordered = weight if heads is None else rope_permuted(weight, heads)
        kind = gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quantize(ordered, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        values = gguf.dequantize(packed, kind).reshape(weight.shape)
        if heads is not None:
            values = values.reshape(heads, HEAD_SIZE // 2, 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        stored[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
