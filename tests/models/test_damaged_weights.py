"""Weights that contradict what is known of them: checksums, the model's own config, and what weights are like."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_lab.config.schema import ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.checksums import damage_of_zip, recorded_sha256
from qlora_lab.models.load import load_model
from tests.models.loading import UP

PLAIN = QuantConfig(format="none", double_quant=False)
INDEX = "model.safetensors.index.json"
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


def sharded(folder: Path, dtype: torch.dtype, kind: str = "safetensors") -> Path:
    """Cut the weights of a folder into three files with an index."""
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    where = {}
    for number in range(3):
        stem = "model" if kind == "safetensors" else "pytorch_model"
        file = f"{stem}-{number + 1:05}-of-00003.{kind}"
        part = {name: weights[name] for name in sorted(weights)[number::3]}
        where |= dict.fromkeys(part, file)
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    index = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


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


def test_checksums_of_a_folder_below_are_of_its_files(make_folder) -> None:
    folder = make_folder()
    (folder / "fp16").mkdir()
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  fp16/model.safetensors\n")
    loaded(of_folder(folder))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("model.safetensors.sha256", "{}"),
        ("model.safetensors.sha256", "{}  -"),
        ("SHA256SUMS", "{}  model.safetensors"),
        ("SHA256SUMS", "{}  some/folder/model.safetensors"),
        ("SHA256SUMS", "SHA256 (./model.safetensors) = {}"),
        ("SHA256SUMS", "SHA2-256(model.safetensors)= {}"),
    ],
)
def test_a_flipped_bit_is_found_by_the_checksums_of_a_folder(name: str, line: str, make_folder, tmp_path: Path) -> None:
    folder = make_folder()
    file = folder / "model.safetensors"
    others = f"{'0' * 64} *another.safetensors\n{'0' * 64}  d\xe9j\xe0.bin\n".encode("latin-1")
    checksum = line.format(hashlib.sha256(file.read_bytes()).hexdigest())
    (folder / name).write_bytes(others + f"{checksum}\n".encode())
    loaded(of_folder(folder))
    flip_the_last_bit(file)
    with pytest.raises(ModelError, match=rf"model\.safetensors is damaged: .*{name} says .*copy or save it again"):
        loaded(of_folder(folder), tmp_path, cached=True)
    assert not (tmp_path / "bases").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors.sha256", ("0" * 64).encode("utf-16")),
        ("model.safetensors.sha256", b"0" * 64 + b"  another.safetensors\n"),
        ("SHA256SUMS", b"<html>not found</html>"),
    ],
)
def test_checksums_that_cannot_be_read_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} holds no SHA-256 that can be read.*; write it again") as refusal:
        recorded_sha256(tmp_path / "model.safetensors")
    assert "\n" not in str(refusal.value)


def test_of_files_of_one_name_the_one_in_the_folder_counts(tmp_path: Path) -> None:
    sums = [("a", "other/model.safetensors"), ("b", f"{tmp_path.name}/model.safetensors")]
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digit * 64}  {name}\n" for digit, name in sums))
    assert recorded_sha256(tmp_path / "model.safetensors") == ("b" * 64, "SHA256SUMS says")
    (tmp_path / "SHA256SUMS").write_text(f"{'a' * 64}  x/model.safetensors\n{'b' * 64}  y/model.safetensors\n")
    assert recorded_sha256(tmp_path / "model.safetensors") == (None, "")


HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("quantized", "name", "dtype", "bit", "what"),
    [
        (True, UP, torch.float16, 14, "a value of magnitude"),  # the highest of the exponent
        (True, UP, torch.bfloat16, 14, "a value of magnitude"),
        (False, UP, torch.bfloat16, 14, "a value of magnitude"),
        (True, EMBEDDING, torch.bfloat16, 14, "a value of magnitude"),
        (True, HEAD, torch.float16, None, "NaN or infinite"),
        (False, NORM, torch.float16, None, "NaN or infinite"),
        (False, NORM, torch.float16, 14, "a value of magnitude"),
        (False, NORM, torch.bfloat16, 14, "a value of magnitude"),
    ],
)
def test_absurd_numbers_are_found_and_their_weight_and_file_named(
    quantized: bool, name: str, dtype: torch.dtype, bit: int | None, what: str, make_folder, tmp_path: Path
) -> None:
    folder = sharded(make_folder(), dtype)
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    kept = load_file(folder / file)
    if bit is None:
        kept[name].view(-1)[3] = torch.nan
    else:
        if name == NORM:
            kept[name].fill_(0.75)  # as after some training; of 1.0 the same bit makes infinity
        number = int(kept[name].abs().argmax())
        assert 2**-8 < kept[name].view(-1)[number].abs() < 2
        kept[name].view(-1).view(torch.int16)[number] ^= 1 << bit
    save_file(kept, folder / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name.removesuffix('.weight')}.* in {file}: .*{what}") as refusal:
        loaded(of_folder(folder), tmp_path, cached=quantized)
    assert "\n" not in str(refusal.value) and not (tmp_path / "bases").exists()


def test_outliers_of_a_trained_layer_and_layers_that_are_mostly_dead_are_loaded(make_folder) -> None:
    folder = make_folder()
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[UP][0, 0] = 15.0
    weights["model.layers.1.input_layernorm.weight"].fill_(0.1)[3] = 400.0
    weights["model.layers.1.mlp.up_proj.weight"][4:] = 1e-12
    weights["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(weights, file, metadata={"format": "pt"})
    loaded(of_folder(folder), cached=True)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_cut_short_or_gone_leaves_nothing_behind(
    kind: str, damage: str, make_folder, tmp_path: Path
) -> None:
    folder = sharded(make_folder(), torch.float32, kind)
    expected = loaded(of_folder(folder)).lm_head.weight.clone()
    shard = sorted(folder.glob(f"*.{kind}"))[1]
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    else:
        shard.unlink()
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*copy or save it again") as refusal:
        loaded(of_folder(folder), tmp_path, cached=True)
    assert "\n" not in str(refusal.value) and not list(tmp_path.glob("bases/*"))
    shard.write_bytes(whole)
    assert torch.equal(loaded(of_folder(folder), tmp_path, cached=True).lm_head.weight, expected)
    assert len(list(tmp_path.glob("bases/*/manifest.json"))) == 1


def test_a_checkpoint_of_torch_loads_and_a_cut_one_is_refused(make_folder) -> None:
    folder = make_folder()
    expected = loaded(of_folder(folder)).lm_head.weight.clone()
    file = as_bin(folder)
    assert torch.equal(loaded(of_folder(folder)).lm_head.weight, expected)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*copy or save it again") as refusal:
        loaded(of_folder(folder))
    assert "\n" not in str(refusal.value)


def test_a_flipped_bit_in_a_checkpoint_of_torch_is_found_by_its_own_checksums(make_folder, tmp_path: Path) -> None:
    folder = sharded(make_folder(), torch.float16, "bin")
    loaded(of_folder(folder))
    shard = sorted(folder.glob("*.bin"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ModelError, match=r"00002-of-00003\.bin is damaged: its part .*; copy or save it") as refusal:
        loaded(of_folder(folder), tmp_path, cached=True)
    assert "\n" not in str(refusal.value) and not (tmp_path / "bases").exists()


@pytest.mark.parametrize(
    ("name", "shift", "flip"),
    [("encrypted", 8, 1), ("compressed", 10, 8), ("of a later version", 6, 0x40)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_directory_of_a_checkpoint_of_torch_that_cannot_be_read_is_said(
    name: str, shift: int, flip: int, tmp_path: Path
) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.arange(64.0)}, file)
    assert damage_of_zip(file) is None
    content = bytearray(file.read_bytes())
    content[content.rindex(b"PK\1\2") + shift] ^= flip  # in the entry of its last part
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    damage = damage_of_zip(file)
    assert damage is not None and damage.startswith("its directory of parts cannot be read (") and "\n" not in damage


def test_checksums_of_torch_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.arange(64.0)}, file)
    assert damage_of_zip(file) is None
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda _: "data.pkl")
    assert damage_of_zip(file) is None
    os.utime(file, ns=(0, 0))
    assert damage_of_zip(file) == "its part data.pkl has another CRC-32 than it says"


def test_more_layers_than_the_config_says_are_refused(make_folder) -> None:
    folder = make_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"holds more layers than its config\.json says \(model\.layers\.1\."):
        loaded(of_folder(folder))
