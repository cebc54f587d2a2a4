"""Quantized models on disk: bitsandbytes' checkpoints load here, ours load there, and both come back as they were."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora_lab.adapters.lora import add_adapters
from qlora_lab.config.schema import AdapterConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.models.save import save_quantized
from qlora_lab.ops.formats import FORMATS
from qlora_lab.quant.bitsandbytes_format import QUANT_TYPES
from qlora_lab.quant.linear import QuantizedLinear

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
UP = "model.layers.0.mlp.up_proj.weight"
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
shared = pytest.mark.parametrize("fmt", QUANT_TYPES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A plain model: tied head, and biases on some of its linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def loaded(folder: Path, quant: QuantConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = ModelConfig(name="tiny", source="folder", path=str(folder), max_length_tokens=128)
    return load_model(config, quant, compute_dtype=dtype, device="cpu", cache_dir=Path("/nonexistent"), seed=0)


def by_bitsandbytes(folder: Path, fmt: str, nested: bool, **options: Any) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=QUANT_TYPES[fmt], bnb_4bit_use_double_quant=nested, **options
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def quantized_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the expanded weight of every quantized layer, ours or bitsandbytes'."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights[name] = module.dequantize(torch.float32)
        if isinstance(module, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return weights


def assert_same_weights(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    found, right = quantized_weights(actual), quantized_weights(expected)
    assert len(right) == 14 and found.keys() == right.keys()
    for name, weight in right.items():
        assert torch.equal(found[name], weight), name


@shared
@nested_or_not
def test_a_checkpoint_of_bitsandbytes_loads_with_our_kernels(
    fmt: str, nested: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = by_bitsandbytes(source, fmt, nested)
    theirs.save_pretrained(tmp_path / "theirs")
    with monkeypatch.context() as absent:
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
            absent.setitem(sys.modules, name, None)  # importing it fails
        ours = loaded(tmp_path / "theirs", QuantConfig(format=fmt, double_quant=nested))
    assert_same_weights(ours, theirs)
    theirs.train()  # in inference, bitsandbytes rounds to bfloat16 on CPUs that have units for it
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)  # summed in another order


@shared
@nested_or_not
def test_what_we_save_loads_with_bitsandbytes(fmt: str, nested: bool, source: Path, tmp_path: Path) -> None:
    ours = loaded(source, QuantConfig(format=fmt, double_quant=nested))
    save_quantized(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.config.quantization_config.quant_method == "bitsandbytes"
    assert type(theirs.lm_head) is nn.Linear
    assert_same_weights(ours, theirs)
    theirs.train()  # see above
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)  # summed in another order


@pytest.mark.parametrize("fmt", FORMATS)
@nested_or_not
def test_a_saved_base_gives_the_logits_of_quantizing_afresh(
    fmt: str, nested: bool, source: Path, tmp_path: Path
) -> None:
    quant = QuantConfig(format=fmt, block_size=32, double_quant=nested, double_quant_block_size=64)
    fresh = loaded(source, quant)
    save_quantized(fresh, tmp_path / "saved")
    again = loaded(tmp_path / "saved", quant)
    assert torch.equal(logits(again), logits(fresh))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    save_quantized(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_random_model_is_saved_too(tmp_path: Path) -> None:
    from tests.models.loading import architecture, random_config  # the numbers of a llama

    quant = QuantConfig(format="nf3", double_quant=False)
    random = load_model(
        random_config(architecture(vocab_size=384)),
        quant,
        compute_dtype=torch.float32,
        device="cpu",
        cache_dir=tmp_path,
        seed=1,
    )
    save_quantized(random, tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved", quant)), logits(random))


def test_plain_weights_come_in_the_dtype_asked_for(source: Path, tmp_path: Path) -> None:
    wide, half = loaded(source, QuantConfig()), loaded(source, QuantConfig(), torch.bfloat16)
    save_quantized(wide, tmp_path / "wide")
    save_quantized(half, tmp_path / "half")
    again = loaded(tmp_path / "wide", QuantConfig(), torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert_same_weights(again, wide)
    assert torch.equal(logits(loaded(tmp_path / "half", QuantConfig(), torch.bfloat16)), logits(half))


def test_layers_that_bitsandbytes_left_plain_stay_plain(source: Path, tmp_path: Path) -> None:
    theirs = by_bitsandbytes(source, "nf4", False, llm_int8_skip_modules=["lm_head", "down_proj"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs", QuantConfig(double_quant=False))
    assert type(ours.model.layers[0].mlp.down_proj) is nn.Linear
    assert quantized_weights(ours).keys() == quantized_weights(theirs).keys()
    save_quantized(ours, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert quantized_weights(back).keys() == quantized_weights(theirs).keys()


def test_shards_and_a_tokenizer(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(eos_token="<end>", pad_token="<pad>")
    config = ModelConfig(name="tiny", source="folder", path=str(folder), max_length_tokens=128)
    model = loaded(folder, QuantConfig())
    plain_save = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda folder: plain_save(folder, max_shard_size="10KB"))
    save_quantized(model, tmp_path / "saved", load_tokenizer(config, tmp_path))
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert torch.equal(logits(loaded(tmp_path / "saved", QuantConfig())), logits(model))
    config.path = str(tmp_path / "saved")
    assert load_tokenizer(config, tmp_path).eos_token == "<end>"


# refusals


def saved(source: Path, fmt: str = "nf4", **options: Any) -> Path:
    save_quantized(loaded(source, QuantConfig(format=fmt, **options)), source.parent / "saved")
    return source.parent / "saved"


@pytest.mark.parametrize(
    ("fmt", "quant", "message"),
    [
        ("nf4", QuantConfig(format="int4"), r"quant\.format is int4, but .* quantized with nf4; set quant\.format=nf4"),
        ("nf4", QuantConfig("none", double_quant=False), r"quant\.format is none, but .* quantized with nf4"),
        ("int4", QuantConfig(), r"quant\.format is nf4, but .* quantized with int4"),
        ("nf4", QuantConfig(double_quant=False), r"quant\.double_quant is false, but .* with true"),
        ("nf4", QuantConfig(block_size=128), r"quant\.block_size is 128, but .* with 64; set quant\.block_size=64"),
        ("int4", QuantConfig("int4", block_size=128), r"quant\.block_size is 128, but .* with 64"),
        ("nf4", QuantConfig(double_quant_block_size=64), r"quant\.double_quant_block_size is 64, but .* with 256"),
    ],
)
def test_a_checkpoint_that_the_configuration_contradicts_is_refused(
    fmt: str, quant: QuantConfig, message: str, source: Path
) -> None:
    folder = saved(source, fmt)
    with pytest.raises(ModelError, match=message) as refusal:
        loaded(folder, quant)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(f / "model.safetensors"), r"cannot be loaded \(.*not fully covered"),
    "no absmax": (
        lambda f: edit_weights(f, lambda w: w.pop(f"{UP}.absmax")),
        r"model\.layers\.0\.mlp\.up_proj: weight\.absmax is missing",
    ),
    "no codes": (lambda f: edit_weights(f, lambda w: w.pop(UP)), "up_proj: weight is missing"),
    "no layer": (
        lambda f: edit_weights(f, lambda w: [w.pop(key) for key in list(w) if key.startswith(UP)]),
        r"lacks 1 of the model's weights.*\(model\.layers\.0\.mlp\.up_proj\.weight\)",
    ),
    "codes alone": (
        lambda f: edit_weights(f, lambda w: [w.pop(key) for key in list(w) if key.startswith(f"{UP}.")]),
        r"up_proj: a quantized weight needs one weight\.quant_state",
    ),
    "an embedding": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight.absmax": torch.ones(1)})),
        r"model\.norm: it is quantized in the checkpoint, but Qwen2RMSNorm cannot be",
    ),
    "another model": (
        lambda f: edit_config(f, intermediate_size=192),
        r"down_proj: the weight must have shape \(64, 192\); in the checkpoint it has \(64, 128\)",
    ),
    "8 bits": (
        lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "already quantized, by bitsandbytes, and only 4-bit checkpoints",
    ),
    "nothing quantized": (
        lambda f: edit_weights(f, lambda w: [w.pop(k) for k in list(w) if "_proj.weight" in k]),
        "none of its weights is",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_sentence(damage: str, source: Path) -> None:
    folder = saved(source)
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refusal:
        loaded(folder, QuantConfig())
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_cannot_be_saved_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the model is not quantized by qlora_lab"):
        save_quantized(loaded(source, QuantConfig("none", double_quant=False)), tmp_path / "saved")
    model = loaded(source, QuantConfig())
    add_adapters(model, AdapterConfig(), torch.Generator())
    with pytest.raises(ModelError, match="the model has adapters, which are saved apart"):
        save_quantized(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_save_that_fails_leaves_what_was_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(source)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = loaded(source, QuantConfig(format="int8"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir() if file.name.startswith(".")] == []
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(folder)  # still refused
