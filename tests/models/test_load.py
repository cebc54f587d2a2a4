"""Loading from folders and GGUF files, and random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.quant.linear import QuantizedLinear
from tests.models.loading import NF4, PLAIN, architecture, loaded, of_folder, random_config
from tests.models.tiny_gguf import write_gguf


def random_model(seed: int = 0, quant: QuantConfig = PLAIN, **changes: Any) -> PreTrainedModel:
    numbers = architecture(**{"vocab_size": 384, **changes})
    return loaded(random_config(numbers), quant, seed=seed)


def test_a_folder_loads_ready_for_training(make_folder) -> None:
    folder = make_folder()
    model = loaded(of_folder(folder, architecture=architecture()))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)  # attention is our own
    assert not model.training and not model.config.use_cache
    assert loaded(of_folder(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_training_a_loaded_model_leaves_its_file_alone(make_folder) -> None:
    """Weights in the dtype of the file are views of it, mapped into memory."""
    folder = make_folder()
    before = (folder / "model.safetensors").read_bytes()
    model = loaded(of_folder(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    del model
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_log_gets_no_progress_bars(make_folder, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_folder()
    capfd.readouterr()
    loaded(of_folder(folder))
    assert "Loading weights" not in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # other code's bars are its own affair


def test_linear_layers_are_quantized_while_loading(make_folder) -> None:
    model = loaded(of_folder(make_folder()), NF4, dtype=torch.bfloat16)
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 14
    assert {(layer.format, layer.block_size, layer.compute_dtype) for layer in quantized} == {
        ("nf4", 64, torch.bfloat16)
    }
    assert type(model.lm_head) is torch.nn.Linear


def test_a_gguf_file_loads_through_the_cache(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    model_config = ModelConfig("tiny", "gguf", path=str(tmp_path / "tiny.gguf"), max_length_tokens=128)
    model = load_model(model_config, NF4, compute_dtype=torch.float32, device="cpu", cache_dir=tmp_path / "c", seed=0)
    tokenizer = load_tokenizer(model_config, tmp_path / "c")
    assert model.config.vocab_size == len(tokenizer)
    assert model(torch.tensor([tokenizer("the")["input_ids"]])).logits.isfinite().all()


# random weights


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_model(seed=5).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = random_model(seed=5).state_dict(), random_model(seed=6).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_random_models_have_the_numbers_asked_for() -> None:
    model = random_model(tie_embeddings=True, rope_theta=5000.0, rms_norm_eps=1e-3, max_position=77)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert (model.model.norm.variance_epsilon, model.config.max_position_embeddings) == (1e-3, 77)
    neox = random_model(model_type="gpt_neox", num_kv_heads=4, rope_theta=5000.0, rms_norm_eps=1e-3)
    assert (neox.config.rope_parameters["rope_theta"], neox.config.layer_norm_eps) == (5000.0, 1e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "lama"}, ModelError, r"model\.architecture\.model_type must be one of .*mean 'llama'"),
        ({"num_heads": 5}, ConfigError, r"num_heads must divide hidden_size \(32\); got 5"),
        ({"model_type": "bloom", "num_kv_heads": 4}, ModelError, "feed_forward_size is 48, but .*'bloom' has 128"),
        ({"model_type": "opt"}, ModelError, "num_kv_heads is 2, but .*'opt' has 4"),
    ],
)
def test_random_models_that_cannot_be_are_refused(changes: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        random_model(**changes)
