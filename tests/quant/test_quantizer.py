"""Loading and quantizing transformers models through transformers' own hooks."""

import json
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
)

from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.quant.quantizer import QloraLabQuantizer, count_quantized, linears_to_quantize, quantize_model
from qlora_lab.quant.settings import QloraLabConfig, quantization_config
from tests.tiny_models import T5, WIDER_LLAMA

LLAMA = LlamaConfig(**WIDER_LLAMA | {"vocab_size": 128}, tie_word_embeddings=True)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def built(config: Any = LLAMA, model_class: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(0)
    return model_class.from_config(config).eval()


def loaded(folder: Path, config: QloraLabConfig, model_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return model_class.from_pretrained(folder, quantization_config=config, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built().save_pretrained(tmp_path)
    return tmp_path


def ids() -> Tensor:
    return torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(2))


def quantized_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_from_pretrained_computes_with_the_dequantized_weights(folder: Path, format: str, double_quant: bool) -> None:
    config = quantization_config(format, 64, double_quant, 256, torch.float32)
    assert config is not None
    model = loaded(folder, config, dtype=torch.float32)
    reference = built()
    for path in quantized_paths(model):
        layer = model.get_submodule(path)
        assert (layer.format, layer.double_quant) == (format, double_quant)
        reference.get_submodule(path).weight.data = layer.dequantize()
    assert len(quantized_paths(model)) == 2 * len(PROJECTIONS)
    assert torch.equal(model(ids()).logits, reference(ids()).logits)
    assert not torch.equal(model(ids()).logits, built()(ids()).logits)


def test_head_and_embeddings_stay_tied_and_as_they_were(folder: Path) -> None:
    model = loaded(folder, QloraLabConfig())
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, built().lm_head.weight)
    assert not any(part.is_meta for part in (*model.parameters(), *model.buffers()))
    assert not model.training and not any(module.training for module in model.modules())


def test_gradient_reaches_the_embedding_through_every_quantized_layer(folder: Path) -> None:
    model = loaded(folder, QloraLabConfig())
    model(ids(), labels=ids()).loss.backward()
    reference = built()
    for path in quantized_paths(model):
        reference.get_submodule(path).weight.data = model.get_submodule(path).dequantize()
    reference(ids(), labels=ids()).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, reference.lm_head.weight.grad)


def test_weights_are_quantized_one_by_one_as_they_stream_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[weakref.ref[Tensor]] = []
    paths: list[str] = []
    original = QloraLabQuantizer.quantize

    def watch(self: QloraLabQuantizer, path: str, linear: nn.Linear, weight: Tensor) -> None:
        assert all(reference() is None for reference in arrived), "an earlier full weight is still alive"
        assert linear.weight.is_meta, "the plain layer holds a full weight"
        arrived.append(weakref.ref(weight))
        paths.append(path)
        original(self, path, linear, weight)

    monkeypatch.setattr(QloraLabQuantizer, "quantize", watch)
    model = loaded(folder, QloraLabConfig())
    assert sorted(paths) == sorted(quantized_paths(model))
    assert len(paths) == 2 * len(PROJECTIONS)


def test_quantize_model_equals_from_pretrained(folder: Path) -> None:
    config = QloraLabConfig("fp4_e2m1", block_size=32)
    streamed = loaded(folder, config)
    in_memory = quantize_model(built(), config)
    expected = streamed.state_dict()
    actual = in_memory.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(in_memory(ids()).logits, streamed(ids()).logits)


def test_quantize_model_leaves_a_shared_configuration_alone() -> None:
    before = LLAMA.to_dict()
    quantize_model(built(), QloraLabConfig())
    assert LLAMA.to_dict() == before


def test_quantize_model_releases_each_weight() -> None:
    model = built()
    weights = [weakref.ref(model.get_submodule(path).weight) for path in linears_to_quantize(model, QloraLabConfig())]
    quantize_model(model, QloraLabConfig())
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compute_dtype_is_separate_from_the_dtype_of_the_model(folder: Path, dtype: torch.dtype) -> None:
    config = QloraLabConfig(compute_dtype=torch.bfloat16)
    model = loaded(folder, config, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.bfloat16
    assert layer.nested_absmax.dtype == torch.float32
    assert model(ids()).logits.dtype == dtype


def test_biases_are_kept(tmp_path: Path) -> None:
    config = Qwen2Config(**WIDER_LLAMA | {"vocab_size": 128})
    original = built(config)
    nn.init.normal_(original.model.layers[0].self_attn.q_proj.bias)
    original.save_pretrained(tmp_path)
    model = loaded(tmp_path, QloraLabConfig())
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias is not None and torch.equal(layer.bias, original.model.layers[0].self_attn.q_proj.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_t5_loads_and_keeps_its_output_projections_when_float16_could_overflow(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = T5Config(**T5 | {"vocab_size": 128, "num_layers": 1}, tie_word_embeddings=False)  # type: ignore[arg-type]
    built(config, AutoModelForSeq2SeqLM).save_pretrained(tmp_path)
    model = loaded(tmp_path, QloraLabConfig(), AutoModelForSeq2SeqLM, dtype=dtype)
    in_feed_forward = ("wi_0", "wi_1") if dtype == torch.float16 else ("wi_0", "wi_1", "wo")
    quantized = quantized_paths(model)
    assert {path.rpartition(".")[2] for path in quantized} == {"q", "k", "v", "o", *in_feed_forward}
    assert len(quantized) == 3 * 4 + 2 * len(in_feed_forward)
    assert model(input_ids=ids(), labels=ids()).loss.isfinite()


def test_skipped_modules_stay_plain(folder: Path) -> None:
    config = QloraLabConfig(skip_modules=["down_proj", r"model\.layers\.0\.self_attn"])
    model = loaded(folder, config)
    expected = [f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]
    expected += [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    expected += [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj")]
    assert quantized_paths(model) == expected


def test_a_layer_missing_from_the_checkpoint_is_initialised_and_then_quantized(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    missing = "model.layers.1.mlp.up_proj"
    weights = load_file(folder / "model.safetensors")
    del weights[f"{missing}.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = loaded(folder, QloraLabConfig(), output_loading_info=True)
    assert info["missing_keys"] == {f"{missing}.weight"}
    layer = model.get_submodule(missing)
    assert isinstance(layer, QuantizedLinear)
    assert 0.01 < layer.dequantize().std() < 0.03  # Llama initialises with 0.02


def test_format_none_is_no_configuration() -> None:
    assert quantization_config("none", 64, False, 256, torch.float32) is None


def test_configuration_survives_json() -> None:
    config = QloraLabConfig("int4", 128, False, 64, torch.bfloat16, ["gate"])
    assert QloraLabConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert config.layer_arguments()["compute_dtype"] == torch.bfloat16


def test_configuration_refuses_what_means_nothing() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        QloraLabConfig("nf5")
    with pytest.raises(ConfigError, match="got 48"):
        QloraLabConfig(block_size=48)
    with pytest.raises(ConfigError, match=r"compute_dtype must be one of .*did you mean 'float16'"):
        QloraLabConfig(compute_dtype="flaot16")


def test_plain_saving_is_refused_and_says_what_to_do(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for model in (loaded(folder, QloraLabConfig()), quantize_model(built(), QloraLabConfig())):
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(folder / "saved")
        assert "saved by qlora_lab.models.save.save_quantized" in caplog.text
        caplog.clear()
    assert not (folder / "saved").exists()


def test_a_damaged_weight_is_named(folder: Path) -> None:
    model = built()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinite"):
        quantize_model(model, QloraLabConfig())
    model = built()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj in model\.safetensors: the weight holds NaN"):
        loaded(folder, QloraLabConfig())


def test_several_devices_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="one device for the whole model"):
        loaded(folder, QloraLabConfig(), device_map={"model": "cpu", "lm_head": "disk"})


def test_a_checkpoint_that_claims_to_be_quantized_and_is_not_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    claimed = json.loads(path.read_text()) | {"quantization_config": QloraLabConfig().to_dict()}
    path.write_text(json.dumps(claimed))
    with pytest.raises(ModelError, match="says that it is quantized, but none of its weights is"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_without_linear_layers_is_refused_and_not_left_dense(tmp_path: Path) -> None:
    gpt2 = GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=100)  # its matrices are in transformers' Conv1D
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layer to quantize"):
        quantize_model(built(gpt2), QloraLabConfig())
    built(gpt2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear layer to quantize"):
        loaded(tmp_path, QloraLabConfig())


def test_the_quantized_share_counts_matrices_outside_embeddings_and_head() -> None:
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    dense = count_quantized(built())
    assert (dense.quantized, dense.matrices, dense.share) == (0, matrices, 0.0)
    whole = count_quantized(quantize_model(built(), QloraLabConfig()))
    assert (whole.quantized, whole.matrices, whole.share) == (matrices, matrices, 1.0)


def test_fused_experts_are_seen_to_stay_dense() -> None:
    config = Qwen3MoeConfig(
        num_hidden_layers=1,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=100,
    )
    share = count_quantized(quantize_model(built(config), QloraLabConfig()))
    experts, router = 4 * 3 * 64 * 128, 4 * 64
    assert share.quantized <= 4 * 64 * 64 + router
    assert share.matrices == 4 * 64 * 64 + router + experts
    assert share.share < 0.2
