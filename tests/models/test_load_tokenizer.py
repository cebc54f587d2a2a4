"""Tokenizers from every source, and one sentence for everything that can be wrong with one."""

from pathlib import Path

import pytest

from qlora_lab.config.schema import ModelConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import load_tokenizer
from tests.models.loading import architecture, of_folder, random_config


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
