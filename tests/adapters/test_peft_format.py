"""Adapters go to PEFT and come from it with the same logits; foreign and damaged ones are refused in a sentence."""

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_lab.adapters import peft_format
from qlora_lab.adapters.lora import adapted_layers, add_adapters, train_everything, trainable_parameters
from qlora_lab.adapters.peft_format import load_adapter, save_adapter, save_full
from qlora_lab.config.schema import AdapterConfig
from qlora_lab.errors import ModelError
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.quant.quantizer import quantize_model
from qlora_lab.quant.settings import QloraLabConfig
from tests.adapters.conftest import randomize_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers so
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

CONFIGS = {
    "all_linear": AdapterConfig(rank=4, alpha=16),
    "query_value": AdapterConfig(rank=4, alpha=3.5, placement="query_value"),
    "rslora": AdapterConfig(rank=8, alpha=5, rslora=True, placement="attention"),
    "dropout": AdapterConfig(rank=4, dropout=0.3),
    "last_layer": AdapterConfig(rank=4, last_k_layers=1),
    "regex": AdapterConfig(rank=4, placement="regex", target_regex=r".*\.0\..*(k|down)_proj|.*\.1\..*v_proj"),
}


def adapted(base: nn.Module, config: AdapterConfig) -> nn.Module:
    add_adapters(base, config, torch.Generator().manual_seed(0))
    randomize_adapters(base)
    return base


def peft_trained(base: nn.Module, config: AdapterConfig, targets: Any) -> PeftModel:
    """A PEFT model with values as after training."""
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, peft_config)
    randomize_adapters(model)
    return model.eval()


def from_peft(base: nn.Module, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about keys that are missing or left over
        return PeftModel.from_pretrained(base, folder).eval()


def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Put the weights that a quantized model computes with into a plain one."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize()
    return plain


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_what_we_save(name: str, make_llama, ids: Tensor, tmp_path: Path) -> None:
    ours = adapted(make_llama(), CONFIGS[name])
    save_adapter(ours, tmp_path / "adapter", CONFIGS[name], "tiny")
    theirs = from_peft(make_llama(), tmp_path / "adapter")

    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert not torch.allclose(ours(ids).logits, make_llama()(ids).logits, atol=1e-2)  # the adapter does something
    prefix = "base_model.model."
    their_layers = {
        key.split(".lora_")[0].removeprefix(prefix) for key, _ in theirs.named_parameters() if "lora" in key
    }
    assert their_layers == set(adapted_layers(ours))


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_peft_saves(name: str, make_llama, ids: Tensor, tmp_path: Path) -> None:
    config = CONFIGS[name]
    names = add_adapters(make_llama(), config, torch.Generator())
    theirs = peft_trained(make_llama(), config, names)
    theirs.save_pretrained(tmp_path)
    ours = make_llama()

    assert load_adapter(ours, tmp_path) == names
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert list(trainable_parameters(ours)) == [f"{name}.lora_{x}" for name in names for x in "AB"]


def test_dropout_survives_the_trip(make_llama, tmp_path: Path) -> None:
    save_adapter(adapted(make_llama(), CONFIGS["dropout"]), tmp_path / "ours", CONFIGS["dropout"], "tiny")
    loaded = make_llama()
    load_adapter(loaded, tmp_path / "ours")
    assert {layer.dropout for layer in adapted_layers(loaded).values()} == {0.3}
    theirs = from_peft(make_llama(), tmp_path / "ours")
    assert theirs.peft_config["default"].lora_dropout == 0.3


def test_training_with_dropout_agrees_with_peft(make_llama, ids: Tensor) -> None:
    """The same random state drops the same inputs, so that gradients agree too."""
    config = CONFIGS["dropout"]
    ours = adapted(make_llama(), config)
    theirs = peft_trained(make_llama(), config, list(adapted_layers(ours)))
    gradients = []
    for model in (ours, theirs):
        torch.manual_seed(8)
        model.train()(ids, labels=ids).loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora_" in name])
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)  # order of float32 sums


@pytest.mark.parametrize("name", ["all_linear", "rslora"])
def test_on_a_quantized_base(name: str, make_llama, ids: Tensor, tmp_path: Path) -> None:
    """PEFT sits on a plain copy of the dequantized weights."""
    config = CONFIGS[name]
    ours = adapted(quantize_model(make_llama(), QloraLabConfig("nf4")), config)
    save_adapter(ours, tmp_path / "ours", config, "tiny")
    theirs = from_peft(
        dequantized(quantize_model(make_llama(), QloraLabConfig("nf4")), make_llama()), tmp_path / "ours"
    )
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)  # order of float32 sums

    theirs.save_pretrained(tmp_path / "theirs")
    back = quantize_model(make_llama(), QloraLabConfig("nf4"))
    load_adapter(back, tmp_path / "theirs")
    assert torch.equal(back(ids).logits, ours(ids).logits)


def test_layers_are_named_shortly_where_that_is_exact(make_llama, tmp_path: Path) -> None:
    targets = {}
    for name, config in CONFIGS.items():
        save_adapter(adapted(make_llama(), config), tmp_path / name, config, "tiny")
        targets[name] = json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]
    assert targets["query_value"] == ["q_proj", "v_proj"]
    assert len(targets["all_linear"]) == 7
    assert targets["regex"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_files_are_pefts(make_llama, tmp_path: Path) -> None:
    config = CONFIGS["query_value"]
    save_adapter(adapted(make_llama(), config), tmp_path / "ours", config, "some/model")
    theirs = peft_trained(make_llama(), config, ["q_proj", "v_proj"])
    theirs.save_pretrained(tmp_path / "theirs")

    ours, expected = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "some/model"
    assert set(settings) <= set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()))


def test_values_go_into_adapters_that_are_there(make_llama, ids: Tensor, tmp_path: Path) -> None:
    config = CONFIGS["query_value"]
    trained = adapted(make_llama(), config)
    save_adapter(trained, tmp_path / "adapter", config, "tiny")
    model = make_llama()
    add_adapters(model, config, torch.Generator())
    parameters = trainable_parameters(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(ids).logits, trained(ids).logits)
    assert all(new is parameters[name] for name, new in trainable_parameters(model).items())  # an optimizer has these


@pytest.mark.parametrize(
    ("saved", "present", "message"),
    [
        ("query_value", "all_linear", "adapts 4 layers and the model 14; only the model adapts 'model.layers.0.mlp"),
        ("all_linear", "query_value", r"only .*adapter adapts 'model\.layers\.0\.mlp\.down_proj'"),
        ("all_linear", "dropout", None),  # dropout is no part of what an adapter is: alpha and rank are equal
    ],
)
def test_adapters_that_differ_from_the_models_are_refused(
    saved: str, present: str, message: str | None, make_llama, tmp_path: Path
) -> None:
    config = AdapterConfig(rank=4, alpha=16, placement=CONFIGS[saved].placement)
    save_adapter(adapted(make_llama(), config), tmp_path / "adapter", config, "tiny")
    model = make_llama()
    add_adapters(model, CONFIGS[present], torch.Generator())
    if message is None:
        load_adapter(model, tmp_path / "adapter")
        return
    with pytest.raises(ModelError, match=message):
        load_adapter(model, tmp_path / "adapter")


def test_another_scaling_or_rank_is_refused(make_llama, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=16)
    save_adapter(adapted(make_llama(), config), tmp_path / "adapter", config, "tiny")
    for other, message in [
        (AdapterConfig(rank=4, alpha=8), "rank 4 and scaling 4, but the model's have rank 4 and scaling 2"),
        (AdapterConfig(rank=8, alpha=32), "rank 4 and scaling 4, but the model's have rank 8 and scaling 4"),
    ]:
        model = make_llama()
        add_adapters(model, other, torch.Generator())
        with pytest.raises(ModelError, match=message):
            load_adapter(model, tmp_path / "adapter")


def rewrite_settings(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_weights(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def rename_layer(weights: dict[str, Tensor]) -> None:
    for key in [key for key in weights if "layers.1.self_attn.q_proj" in key]:
        weights[key.replace("q_proj", "qq_proj")] = weights.pop(key)


Q_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "it has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "it has no adapter_model.safetensors"),
    "cut settings": (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"), "is damaged"),
    "no rank": (lambda f: rewrite_settings(f, r=None), "must say r as a number; got null"),
    "another kind": (lambda f: rewrite_settings(f, peft_type="IA3"), "peft_type 'LORA'; got"),
    "dora": (lambda f: rewrite_settings(f, use_dora=True), "plain LoRA adapter; got use_dora true"),
    "bias": (lambda f: rewrite_settings(f, bias="all"), 'got bias "all"'),
    "ranks by layer": (lambda f: rewrite_settings(f, rank_pattern={"q_proj": 2}), "got rank_pattern"),
    "pissa": (lambda f: rewrite_settings(f, init_lora_weights="pissa"), "initialised with 'pissa'"),
    "renamed": (lambda f: rewrite_weights(f, rename_layer), "qq_proj', which is no linear layer .* did you mean"),
    "one missing": (lambda f: rewrite_weights(f, lambda w: w.pop(Q_KEY)), "got nothing"),
    "extra": (lambda f: rewrite_weights(f, lambda w: w.update({"a.b": torch.ones(2)})), "got 'a.b'"),
    "wrong shape": (lambda f: rewrite_weights(f, lambda w: w.update({Q_KEY: torch.ones(4, 7)})), r"got \(4, 7\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_adapters_are_refused(damage: str, make_llama, ids: Tensor, tmp_path: Path) -> None:
    config, (spoil, message) = AdapterConfig(rank=4), DAMAGE[damage]
    folder = tmp_path / "adapter"
    save_adapter(adapted(make_llama(), config), folder, config, "tiny")
    spoil(folder)
    model = make_llama()
    with pytest.raises(ModelError, match=message) as refusal:
        load_adapter(model, folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not adapted_layers(model)  # unchanged


def test_adapters_of_the_head_are_refused(make_llama, tmp_path: Path) -> None:
    """Training computes the head in chunks from its weight; an adapter there would be passed over."""
    config = AdapterConfig(rank=4)
    base = make_llama()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    peft_trained(base, config, ["q_proj", "lm_head"]).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ModelError, match=r"adapts 'lm_head'.*heads are not adapted"):
        load_adapter(make_llama(), tmp_path)


def test_a_model_without_adapters_has_none_to_save(make_llama, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no adapters to save"):
        save_adapter(make_llama(), tmp_path / "adapter", AdapterConfig(), "tiny")


def test_the_previous_adapter_survives_a_full_disk(
    make_llama, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdapterConfig(rank=4)
    model = adapted(make_llama(), config)
    save_adapter(model, tmp_path / "adapter", config, "tiny")
    before = model(ids).logits

    def half_written(weights: dict[str, Tensor], file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    randomize_adapters(model, seed=12)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(peft_format, "save_file", half_written)
        save_adapter(model, tmp_path / "adapter", config, "tiny")
    kept = make_llama()
    load_adapter(kept, tmp_path / "adapter")
    assert torch.equal(kept(ids).logits, before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # nothing half written is left

    save_adapter(model, tmp_path / "adapter", config, "tiny")
    load_adapter(kept, tmp_path / "adapter")
    assert torch.equal(kept(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_loads_in_transformers(tied: bool, make_llama, ids: Tensor, tmp_path: Path) -> None:
    model = make_llama()
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone() * 2)
        model.config.tie_word_embeddings = False
    train_everything(model)
    save_full(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    save_full(model, tmp_path / "model")  # again, over the first
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
