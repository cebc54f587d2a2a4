"""Padding is never eos, and new tokens change nothing that is frozen, unless asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from qlora_lab.adapters.lora import add_adapters, trainable_parameters
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.config.schema import AdapterConfig, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.data.prompts import data_ids
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import target_loss
from qlora_lab.models.special_tokens import fit_vocabulary, settle_special_tokens

WORDS = ["<end>", "<pad>", "<reserved>", "a", "b"]


def tokenizer_with(**special: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", **special)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": "tiny", "source": "hub", "hub_id": "some/model", **changes})


@pytest.mark.parametrize(
    ("special", "asked", "pad"),
    [
        ({"pad_token": "<pad>"}, None, "<pad>"),
        ({"pad_token": "<end>", "unk_token": "a"}, None, "a"),
        ({"pad_token": "<end>", "unk_token": "a", "additional_special_tokens": ["<pad>"]}, None, "<pad>"),
        ({"additional_special_tokens": ["<reserved>"]}, None, "<reserved>"),
        ({"pad_token": "<pad>"}, "b", "b"),
        ({}, "<reserved>", "<reserved>"),
    ],
)
def test_padding_is_not_eos(special: dict[str, Any], asked: str | None, pad: str) -> None:
    tokenizer = tokenizer_with(**special)
    settle_special_tokens(tokenizer, config(pad_token=asked))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, WORDS.index(pad))
    assert tokenizer.eos_token == "<end>" and len(tokenizer) == len(WORDS)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "the tokenizer of tiny has no pad token apart from eos ('<end>'), and no other special token to pad with"),
        ({"pad_token": "<end>"}, "model.pad_token must not be eos, which every target ends with; got '<end>'"),
        ({"pad_token": "<pat>"}, "model.pad_token must be a token of tiny, or one of model.new_tokens; got '<pat>'"),
        ({"new_tokens": ["a"]}, "model.new_tokens must be new; the tokenizer of tiny has 'a' already"),
    ],
)
def test_special_tokens_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError) as refusal:
        settle_special_tokens(tokenizer_with(), config(**changes))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_new_token_may_pad() -> None:
    tokenizer = tokenizer_with()
    settle_special_tokens(tokenizer, config(new_tokens=["<new>"], pad_token="<new>"))
    assert (tokenizer.pad_token_id, tokenizer("<new>")["input_ids"]) == (5, [5])


@pytest.mark.parametrize("byte_level", [False, True])
def test_new_tokens_in_a_data_set_are_one_token_each_and_read_as_themselves(byte_level: bool) -> None:
    tokenizer = ByteLevelTokenizer() if byte_level else tokenizer_with(pad_token="<pad>")
    settle_special_tokens(tokenizer, config(new_tokens=["<x>", "<y>"]))
    (ids,) = data_ids(["b<x></s><y>"], tokenizer)
    new = tokenizer.convert_tokens_to_ids(["<x>", "<y>"])
    assert [number for number in ids if number in new] == new
    assert tokenizer.eos_token_id not in ids  # the name of ByT5's eos: only text
    assert str(tokenizer.decode(new, skip_special_tokens=True)).replace(" ", "") == "<x><y>"


# embeddings


def tiny_model(*, tied: bool, vocab_size: int = 5, quant: bool = True, model_type: str = "llama") -> PreTrainedModel:
    numbers = ArchitectureConfig(model_type, 32, 2, 4, 4, 64, vocab_size, tie_embeddings=tied, max_position=64)
    numbers.head_size = 8
    task = "seq2seq" if model_type == "t5" else "causal"
    model = ModelConfig("t", "random", task, tokenizer="byte_level", architecture=numbers, max_length_tokens=64)
    quantization = QuantConfig() if quant else QuantConfig(format="none", double_quant=False)
    return load_model(model, quantization, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=1)


def grown(tokenizer: PreTrainedTokenizerFast, **model: Any) -> PreTrainedModel:
    loaded = tiny_model(**model)
    fit_vocabulary(loaded, tokenizer, ["<x>", "<y>"])
    return loaded


def with_new_tokens() -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_with(pad_token="<pad>")
    settle_special_tokens(tokenizer, config(new_tokens=["<x>", "<y>"]))
    return tokenizer


def batch_of_new_tokens() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 5, 4, 6, 3, 0]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("vocab_size", [5, 6, 16], ids=["full", "one spare row", "spare rows"])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("t5", True), ("t5", False)])
def test_new_rows_are_the_mean_of_the_old_and_frozen(model_type: str, tied: bool, vocab_size: int) -> None:
    tokenizer, before = with_new_tokens(), tiny_model(tied=tied, vocab_size=vocab_size, model_type=model_type)
    model = grown(tokenizer, tied=tied, vocab_size=vocab_size, model_type=model_type)
    assert model.get_input_embeddings().num_embeddings == max(7, vocab_size)
    for old, new in (
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(new.weight[:5], old.weight[:5])
        torch.testing.assert_close(new.weight[5:7], old.weight[:5].mean(0).expand(2, -1))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    add_adapters(model, AdapterConfig(rank=2), torch.Generator())
    assert all("lora_" in name for name in trainable_parameters(model))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_are_saved_and_peft_has_them(tied: bool, tmp_path: Path) -> None:
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    adapter = AdapterConfig(rank=2, placement="query_value", trained_modules=names)
    tokenizer, batch = with_new_tokens(), batch_of_new_tokens()
    model = grown(tokenizer, tied=tied, quant=False)
    before = model.get_input_embeddings().weight.detach().clone()
    add_adapters(model, adapter, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    for _ in range(2):
        target_loss(model, batch, chunk_tokens=4)[0].backward()
        optimizer.step()
    assert not torch.equal(model.get_input_embeddings().weight[5:7], before[5:7])
    save_adapter(model, tmp_path / "adapter", adapter, "tiny")

    again = grown(tokenizer, tied=tied, quant=False)
    load_adapter(again, tmp_path / "adapter")
    expected = model(batch["input_ids"]).logits
    assert torch.equal(again(batch["input_ids"]).logits, expected)
    theirs = PeftModel.from_pretrained(grown(tokenizer, tied=tied, quant=False), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(batch["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_embeddings_does_not_go_on_a_model_without_the_tokens(tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=2, trained_modules=["embed_tokens"])
    model = grown(with_new_tokens(), tied=True, quant=False)
    add_adapters(model, adapter, torch.Generator())
    save_adapter(model, tmp_path / "adapter", adapter, "tiny")
    other = tiny_model(tied=True, quant=False)
    with pytest.raises(ModelError, match=r"holds 'lm_head\.weight' of shape \(7, 32\), but the model's is \(5, 32\)"):
        load_adapter(other, tmp_path / "adapter")
    assert all("lora_" not in name for name, _ in other.named_parameters())


@pytest.mark.parametrize("trained_now", [True, False], ids=["trained embeddings", "a classifier's head"])
def test_an_adapter_without_what_the_model_trains_besides_is_refused(trained_now: bool, tmp_path: Path) -> None:
    plain = AdapterConfig(rank=2)
    base = tiny_model(tied=True, quant=False)
    add_adapters(base, plain, torch.Generator())
    save_adapter(base, tmp_path / "adapter", plain, "tiny")
    if trained_now:
        model: Any = tiny_model(tied=True, quant=False)
        add_adapters(model, replace(plain, trained_modules=["embed_tokens"]), torch.Generator())
        lacking = "model.embed_tokens.weight"
    else:
        model, lacking = LlamaForSequenceClassification(base.config), "score.weight"
    with pytest.raises(ModelError, match=rf"holds no values of '{lacking}', which the model trains besides"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("embed_token", r"must name modules of the model; got 'embed_token'; did you mean 'embed_tokens'"),
        ("mlp", r"must not name quantized layers, which cannot move; got 'model\.layers\.0\.mlp'"),
        ("act_fn", r"must name modules with parameters; got 'model\.layers\.0\.mlp\.act_fn'"),
    ],
)
def test_modules_that_cannot_be_trained_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        add_adapters(tiny_model(tied=True), AdapterConfig(rank=2, trained_modules=[name]), torch.Generator())


def test_a_tokenizer_that_is_larger_than_the_model_is_refused() -> None:
    tokenizer = tokenizer_with(pad_token="<pad>")
    with pytest.raises(ModelError, match="the tokenizer has 5 tokens, but the model 4"):
        fit_vocabulary(tiny_model(tied=True, vocab_size=4), tokenizer, [])
