"""Checkpoints of encoder-decoders and encoders as the hub has them: a head apart from the embeddings, or none yet."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from qlora_lab.adapters.lora import train_everything
from qlora_lab.adapters.peft_format import save_full
from qlora_lab.config.schema import ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import check_output_head, target_loss
from qlora_lab.quant.linear import QuantizedLinear
from tests.models.loading import PLAIN, edit_weights
from tests.tiny_models import T5

T5_ARCHITECTURE = ArchitectureConfig("t5", 32, 2, 2, 2, 48, 40, max_position=64, num_decoder_layers=1, head_size=8)


def flan(folder: Path, *, own_head: bool = True) -> Path:
    """Save a T5 as the v1.1 and Flan checkpoints are: config.json says untied, and the file has both matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["tie_word_embeddings"] = False
    values.pop("scale_decoder_outputs", None)  # transformers 5 adds it; no file on the hub has it
    (folder / "config.json").write_text(json.dumps(values))
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight", None))
    if own_head:
        head = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
        edit_weights(folder, lambda weights: weights.update({"lm_head.weight": head}))
    return folder


def loaded(folder: Path, quant: QuantConfig = PLAIN, **changes: Any) -> PreTrainedModel:
    values = {"name": "t", "source": "folder", "task": "seq2seq", "path": str(folder), "max_length_tokens": 64}
    given = {"seed": 0, "labels": (), "cache_dir": Path(), "cache_bases": False}
    options = {name: changes.pop(name, default) for name, default in given.items()}
    return load_model(ModelConfig(**{**values, **changes}), quant, compute_dtype=torch.float32, device="cpu", **options)


def batch() -> dict[str, Tensor]:
    ids = torch.tensor([[7, 9, 12, 1], [5, 1, 0, 0]])
    labels = torch.tensor([[-100, 4, 6, 1], [-100, 8, 1, -100]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@pytest.mark.parametrize("quant", [PLAIN, QuantConfig()], ids=["plain", "nf4"])
def test_the_head_of_its_own_is_used(quant: QuantConfig, tmp_path: Path) -> None:
    folder = flan(tmp_path / "flan")
    model = loaded(folder, quant, architecture=T5_ARCHITECTURE)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(model.shared.weight, weights["shared.weight"])
    check_output_head(model, batch()["input_ids"][:1])
    # the states are not scaled before a head of its own, and another head gives another loss
    loss, tokens = target_loss(model, batch(), chunk_tokens=2)
    expected = model(**{**batch(), "labels": batch()["labels"][:, 1:].contiguous()}).loss
    torch.testing.assert_close(loss / tokens, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.shared.weight)
    assert abs(target_loss(model, batch(), chunk_tokens=2)[0] - loss) > 0.1
    quantized = [path for path, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(quantized) == (0 if quant is PLAIN else 2 * 7 + 11) and "lm_head" not in quantized


def test_a_lost_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight, though its config says that the head is not tied"):
        loaded(flan(tmp_path / "flan", own_head=False))


@pytest.mark.parametrize(
    ("number", "value", "has"), [("tie_embeddings", True, False), ("num_decoder_layers", 2, 1), ("head_size", 16, 8)]
)
def test_numbers_that_contradict_the_checkpoint_are_refused(number: str, value: Any, has: Any, tmp_path: Path) -> None:
    numbers = ArchitectureConfig(**{**vars(T5_ARCHITECTURE), number: value})
    with pytest.raises(ModelError, match=rf"model\.architecture\.{number} is {value}, but .* has {has}; correct it"):
        loaded(flan(tmp_path / "flan"), architecture=numbers)


def test_full_fine_tuning_keeps_both_matrices(tmp_path: Path) -> None:
    model = loaded(flan(tmp_path / "flan"))
    train_everything(model)
    assert model.lm_head.weight.requires_grad
    save_full(model, tmp_path / "tuned")
    again = loaded(tmp_path / "tuned", architecture=T5_ARCHITECTURE)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.shared.weight, model.shared.weight)
    torch.testing.assert_close(
        target_loss(again, batch(), chunk_tokens=2)[0], target_loss(model, batch(), chunk_tokens=2)[0]
    )


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A RoBERTa as it was pre-trained: with a head for masked words, and none for classes."""
    config = RobertaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=34,
        type_vocab_size=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        RobertaForMaskedLM(config).save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def test_the_new_head_of_a_classifier_is_drawn_from_the_seed(encoder: Path) -> None:
    def head(seed: int) -> Tensor:
        torch.manual_seed(seed + 17)
        options = {"task": "classification", "labels": ["a", "b", "c"], "max_length_tokens": 32}
        model = loaded(encoder, QuantConfig(), seed=seed, **options)
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert model.classifier.out_proj.weight.shape == (3, 32)
        assert type(model.classifier.dense) is torch.nn.Linear  # only what was pre-trained is quantized
        return torch.cat([model.classifier.dense.weight, model.classifier.out_proj.weight]).detach()

    first, again, other = head(0), head(0), head(1)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_classifiers_share_a_quantized_base_and_no_head(encoder: Path, tmp_path: Path) -> None:
    def model(seed: int, labels: list[str], *, cached: bool = True) -> PreTrainedModel:
        options = {"task": "classification", "labels": labels, "max_length_tokens": 32}
        return loaded(encoder, QuantConfig(), seed=seed, cache_bases=cached, cache_dir=tmp_path / "cache", **options)

    for number, (seed, labels) in enumerate([(0, ["a", "b"]), (0, ["a", "b"]), (1, ["a", "b"]), (0, ["a", "b", "c"])]):
        found, right = model(seed, labels).state_dict(), model(seed, labels, cached=False).state_dict()
        assert found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right), number
    files = list((tmp_path / "cache" / "bases").glob("*/model.safetensors"))
    assert len(files) == 2, "one for each number of classes"
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert not [name for name in file.keys() if name.startswith("classifier")]  # noqa: SIM118  # no mapping


def test_a_classifiers_own_head_is_kept_whoever_filled_the_cache(tmp_path: Path) -> None:
    """A run with another number of classes draws a head, and leaves the checkpoint's own to those whose it is."""
    config = RobertaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "tuned")

    def head(labels: list[str], *, cached: bool) -> Tensor:
        options = {"task": "classification", "labels": labels, "max_length_tokens": 32}
        where = {"cache_bases": cached, "cache_dir": tmp_path / "cache"}
        return loaded(tmp_path / "tuned", QuantConfig(), **where, **options).classifier.out_proj.weight

    own = load_file(tmp_path / "tuned" / "model.safetensors")["classifier.out_proj.weight"]
    for labels in (["a", "b", "c"], ["a", "b"], ["a", "b"], ["a", "b", "c"]):
        assert torch.equal(head(labels, cached=True), head(labels, cached=False))
        assert len(labels) == 3 or torch.equal(head(labels, cached=True), own)


def test_weights_that_an_encoder_lacks_are_not_made_up(encoder: Path) -> None:
    edit_weights(encoder, lambda weights: weights.pop("roberta.encoder.layer.1.attention.self.query.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights.*attention\.self\.query\.weight"):
        loaded(encoder, task="classification", labels=["a", "b"], max_length_tokens=32)


def test_rows_longer_than_an_encoder_numbers_are_refused(encoder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.max_length_tokens must be at most 32, the positions of .*; got 33"):
        loaded(encoder, task="classification", labels=["a", "b"], max_length_tokens=33)
