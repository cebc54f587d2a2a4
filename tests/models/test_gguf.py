"""GGUF conversion on a tiny file written here: values, tokenizer, and what happens when it goes wrong."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from qlora_lab.errors import ModelError
from qlora_lab.models import gguf as conversion
from qlora_lab.models.gguf import convert_gguf, gguf_model, wheel_model
from tests.models.tiny_gguf import LAYERS, POSITIONS, vocabulary, write_gguf

HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind, _ = name.split(".")
        return f"model.layers.{layer}.{HF_NAMES[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("gguf")
    values = write_gguf(folder / "tiny.gguf")
    convert_gguf(folder / "tiny.gguf", folder / "cache" / "tiny")
    return folder / "cache" / "tiny", values


def test_weights_are_bit_for_bit_what_gguf_dequantizes(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, values = converted
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == {hf_name(name) for name in values}  # the head is tied, and written once
    for name, value in values.items():
        assert stored[hf_name(name)].dtype == torch.float32
        assert np.array_equal(stored[hf_name(name)].numpy(), value), name


def test_a_log_gets_no_progress_bars(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    bar = modeling_gguf_pytorch_utils.tqdm
    capfd.readouterr()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "cache" / "tiny")
    assert "it/s" not in capfd.readouterr().err  # of transformers' own bars, and of the one it takes from tqdm itself
    assert modeling_gguf_pytorch_utils.tqdm is bar, "other code's bars are its own affair"


def test_the_model_is_an_ordinary_one(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, _ = converted
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert all(type(model.get_submodule(f"model.layers.{n}.mlp.up_proj")) is torch.nn.Linear for n in range(LAYERS))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.rope_parameters["rope_theta"], model.config.max_position_embeddings) == (10000.0, POSITIONS)


def test_the_tokenizer_keeps_its_tokens_template_and_length(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == POSITIONS
    ids = tokenizer("the cat<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids) == "the cat<|im_end|>" and ids[-1] == tokenizer.eos_token_id
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|im_end|>"


def test_digits_are_split_as_the_original_tokenizer_does(
    converted: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    splitting = AutoTokenizer.from_pretrained(converted[0])
    assert splitting.tokenize("in 12") == ["i", "n", "Ġ", "1", "2"]
    assert splitting.tokenize("in  7") == ["i", "n", "ĠĠ", "7"]  # plain byte level leaves a space to the digit

    write_gguf(tmp_path / "other.gguf", pre_tokenizer="gpt-2")
    convert_gguf(tmp_path / "other.gguf", tmp_path / "other")
    plain = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert plain.tokenize("in 12") == ["i", "n", "Ġ", "12"]
    assert plain.tokenize("in  7") == ["i", "n", "Ġ", "Ġ", "7"]


def test_a_file_is_converted_once_and_a_changed_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_gguf(file)
    first = gguf_model(file, cache)
    assert first.parent == cache / "models"
    assert [path for path in first.parent.iterdir() if path.name.startswith(".scratch")] == []

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", None)
        moved = file.rename(tmp_path / "sub.gguf").rename(file)
        assert gguf_model(moved, cache) == first
    write_gguf(file, seed=1)
    second = gguf_model(file, cache)
    assert second != first and second.is_dir() and first.is_dir()


def convert_and_count(file: Path, folder: Path, counter) -> None:
    inner = conversion._convert

    def counted(path: Path, target: Path) -> None:
        with counter.get_lock():
            counter.value += 1
        inner(path, target)

    conversion._convert = counted
    convert_gguf(file, folder)


def test_two_processes_convert_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0)
    arguments = (tmp_path / "tiny.gguf", tmp_path / "cache" / "tiny", counter)
    processes = [context.Process(target=convert_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert counter.value == 1
    assert load_file(tmp_path / "cache" / "tiny" / "model.safetensors")


def test_a_conversion_that_another_machine_overtook_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a shared disk whose locks do not reach across machines."""
    file, folder = tmp_path / "tiny.gguf", tmp_path / "cache" / "tiny"
    write_gguf(file)
    inner = conversion._convert

    def overtaken(path: Path, target: Path) -> None:
        inner(path, target)
        inner(path, folder)

    monkeypatch.setattr(conversion, "_convert", overtaken)
    convert_gguf(file, folder)
    assert load_file(folder / "model.safetensors")
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def fail(tokenizer: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "_split_digits", fail)
    left, at_work = (tmp_path / "cache" / f".scratch-{name}" for name in ("of_a_dead_process", "of_a_living_one"))
    for folder in (left, at_work):
        folder.mkdir(parents=True)
    os.utime(left, (0, 0))
    with pytest.raises(OSError, match="No space left"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "cache" / "tiny")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [at_work.name, ".tiny.lock"]


@pytest.mark.parametrize("damage", ["cut in the header", "cut in the weights", "another file", "empty"])
def test_damaged_files_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    content = file.read_bytes()
    spoilt = {
        "cut in the header": content[:500],
        "cut in the weights": content[:-5000],
        "another file": b"PK" + content[2:],
        "empty": b"",
    }
    file.write_bytes(spoilt[damage])
    with pytest.raises(ModelError, match=r"tiny\.gguf is damaged, or no GGUF file") as refusal:
        gguf_model(file, tmp_path / "cache")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache" / "models").glob("[!.]*"))


def test_an_architecture_that_transformers_cannot_convert_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.gguf"
    import gguf

    writer = gguf.GGUFWriter(file, "nonsense")
    writer.add_name("odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"cannot convert .*odd\.gguf \(.*nonsense"):
        gguf_model(file, tmp_path / "cache")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path must be a GGUF file; there is no file .*absent\.gguf"):
        gguf_model(tmp_path / "absent.gguf", tmp_path)


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.wheel must be one of smollm2_135m; got 'asdiv'"):
        wheel_model("asdiv", tmp_path)
