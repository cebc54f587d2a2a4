"""Weights that contradict what is known of them: the hub's record of a file, and the model's own config."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import load_model

PLAIN = QuantConfig(format="none", double_quant=False)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def loaded(model: ModelConfig, cache_dir: Path = Path("/nonexistent"), *, cached: bool = False) -> PreTrainedModel:
    quant = QuantConfig() if cached else PLAIN
    arguments = {"compute_dtype": torch.float32, "device": "cpu", "seed": 0, "cache_bases": cached}
    return load_model(model, quant, cache_dir=cache_dir, **arguments)


def of_folder(folder: Path) -> ModelConfig:
    return ModelConfig("m", "folder", path=str(folder), max_length_tokens=64)


def flip_the_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def as_bin(folder: Path) -> Path:
    """Replace the weights of a folder by a checkpoint of torch."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize(("kind", "revision"), [("safetensors", None), ("bin", None), ("safetensors", "tuned")])
def test_a_flipped_bit_in_a_file_of_the_hub_is_found(
    kind: str, revision: str | None, make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = make_folder()
    weights = as_bin(folder) if kind == "bin" else folder / "model.safetensors"
    repository = tmp_path / "hub" / "models--some--model"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / (revision or "main")).write_text(COMMIT)
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()  # as the hub's library lays it out
    (snapshot / weights.name).rename(blob)
    (snapshot / weights.name).symlink_to(blob)
    model = ModelConfig("m", "hub", hub_id="some/model", revision=revision, max_length_tokens=64)
    assert torch.equal(loaded(model).lm_head.weight, loaded(of_folder(folder)).lm_head.weight)
    flip_the_last_bit(blob)
    with pytest.raises(ModelError, match=r"is damaged: its SHA-256 is .*hf download --force-download") as refusal:
        loaded(model, tmp_path, cached=True)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "bases").exists()  # nothing of it is kept


def test_a_flipped_bit_in_a_downloaded_folder_is_found(make_folder) -> None:
    folder = make_folder()
    file = folder / "model.safetensors"
    record = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{COMMIT}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1732190000.0\n")
    loaded(of_folder(folder))
    flip_the_last_bit(file)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: .*copy or save it again"):
        loaded(of_folder(folder))


def test_a_checkpoint_of_torch_loads_and_a_cut_one_is_refused(make_folder) -> None:
    folder = make_folder()
    expected = loaded(of_folder(folder)).lm_head.weight.clone()
    file = as_bin(folder)
    assert torch.equal(loaded(of_folder(folder)).lm_head.weight, expected)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*copy or save it again") as refusal:
        loaded(of_folder(folder))
    assert "\n" not in str(refusal.value)


def test_more_layers_than_the_config_says_are_refused(make_folder) -> None:
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"holds more layers than its config\.json says \(model\.layers\.1\."):
        loaded(of_folder(folder))
