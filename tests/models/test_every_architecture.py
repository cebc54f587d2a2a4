"""Every architecture trains with NF4 weights and adapters: tiny random versions of all of them.

The loss goes down, adapters save and load, and PEFT computes the same from what was saved.
"""

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import adapted_layers, add_adapters, trainable_parameters
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.config.architecture import linear_layers
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.placement import match_linears
from qlora_lab.config.schema import CLASSIFICATION, AdapterConfig, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.data.batching import collate
from qlora_lab.data.tokenization import Example
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import check_output_head, row_losses, target_loss
from qlora_lab.quant.linear import QuantizedLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers so
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

PLAIN = QuantConfig(format="none", double_quant=False)
LABELS = ["no", "yes", "maybe"]
VARIANTS = {
    "opt, norms after the blocks": ("opt", {"embedding_size": 32, "norm_first": False, "tie_embeddings": True}),
    "t5, tied": ("t5", {"tie_embeddings": True}),
    "t5, fewer decoder layers": ("t5", {"num_decoder_layers": 1}),
}
ARCHITECTURES = {name: (name, {}) for name in FAMILIES} | VARIANTS


def architecture(name: str) -> ArchitectureConfig:
    model_type, changes = ARCHITECTURES[name]
    own_heads = not FAMILIES[model_type].grouped_query
    numbers = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4 if own_heads else 2,
        "feed_forward_size": 256 if own_heads else 96,
        "vocab_size": 96,
        "head_size": 16 if FAMILIES[model_type].grouped_query or model_type == "t5" else None,
        "tie_embeddings": model_type in ("gemma", "gemma2", "gemma3_text", "roberta"),
        "max_position": 64,
    }
    return ArchitectureConfig(**{**numbers, **changes})


def model_config(name: str) -> ModelConfig:
    task = FAMILIES[ARCHITECTURES[name][0]].task
    return ModelConfig(
        name, "random", task, tokenizer="byte_level", architecture=architecture(name), max_length_tokens=64
    )


def built(name: str, quant: QuantConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(
        model_config(name), quant, compute_dtype=dtype, device="cpu", cache_dir=Path(), seed=4, labels=LABELS
    )


def batch_for(name: str) -> dict[str, Tensor]:
    """Rows of different lengths, so that padding is there."""
    task = FAMILIES[ARCHITECTURES[name][0]].task
    generator = torch.Generator().manual_seed(6)
    rows = []
    for number, (source, target) in enumerate([(9, 5), (4, 3), (6, 7)]):
        ids = torch.randint(3, 96, (source + target,), generator=generator).tolist()
        if task == CLASSIFICATION:
            ids = [*ids[:source], number % len(LABELS)]
        rows.append(Example(ids, source, source, f"row {number}", None, 0, task))
    return collate(rows, pad_id=0)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    config = model.config
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits


def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Put the weights that a quantized model computes with into a plain one."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.dequantize()
    return plain


def train(model: PreTrainedModel, batch: dict[str, Tensor], steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss, tokens = target_loss(model, batch, chunk_tokens=4)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / tokens)
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_saves_loads_and_agrees_with_peft(name: str, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alpha=8)
    batch = batch_for(name)
    model = built(name, QuantConfig())
    names = add_adapters(model, config, torch.Generator().manual_seed(0))
    # every linear layer below the head, and all of them quantized
    assert names == [path for path, *_ in linear_layers(architecture(name)) or []]
    assert all(isinstance(layer.base, QuantizedLinear) for layer in adapted_layers(model).values())
    losses = train(model, batch)
    assert losses[-1] < 0.9 * losses[0]
    untouched = [key for key, parameter in trainable_parameters(model).items() if not parameter.any()]
    assert not untouched  # lora_B starts at zero: a gradient has reached every layer

    save_adapter(model, tmp_path / "adapter", config, "tiny")
    again = built(name, QuantConfig())
    assert load_adapter(again, tmp_path / "adapter") == names
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert list(trainable_parameters(again)) == list(trainable_parameters(model))

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about keys that are missing or left over
        theirs = PeftModel.from_pretrained(
            dequantized(built(name, QuantConfig()), built(name, PLAIN)), tmp_path / "adapter"
        )
    # the same products in another order
    torch.testing.assert_close(logits(theirs.eval(), batch), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_the_model_itself(name: str) -> None:
    """Body and head taken apart give the loss that transformers computes."""
    model, batch = built(name, PLAIN), batch_for(name)
    check_output_head(model, batch["input_ids"][:1])
    labels = batch["labels"]
    task = model_config(name).task
    if task == CLASSIFICATION:
        labels = labels[:, 1]
    elif task == "seq2seq":
        labels = labels[:, 1:].contiguous()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss, tokens = target_loss(model, batch, chunk_tokens=3)
        sums, counts = row_losses(model, batch, chunk_tokens=3)
    torch.testing.assert_close(loss / tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.sum().float(), loss, rtol=1e-4, atol=1e-5)
    assert counts.sum() == tokens == (3 if task == CLASSIFICATION else 15)


@pytest.mark.parametrize("name", ["llama", "t5", "roberta", "bloom"])
def test_it_trains_in_16_bits(name: str, tmp_path: Path) -> None:
    config, batch = AdapterConfig(rank=4, alpha=8), batch_for(name)
    model = built(name, QuantConfig(), torch.bfloat16)
    add_adapters(model, config, torch.Generator().manual_seed(0))
    losses = train(model, batch)
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward", "query_value"),
    [
        ("llama", 8, 6, ["q_proj", "v_proj"]),
        ("opt", 8, 4, ["q_proj", "v_proj"]),
        ("gpt_neox", 4, 4, ["query_key_value"]),
        ("bloom", 4, 4, ["query_key_value"]),
        ("mpt", 4, 4, ["Wqkv"]),
        ("t5", 24, 12, ["q", "v"]),
        ("roberta", 8, 4, ["query", "value"]),
    ],
)
def test_placements_mean_the_right_layers(name: str, attention: int, feed_forward: int, query_value: list[str]) -> None:
    paths = [path for path, *_ in linear_layers(architecture(name)) or []]
    placed = {
        placement: match_linears(paths, placement, None, None)
        for placement in ("attention", "feed_forward", "query_value")
    }
    assert (len(placed["attention"]), len(placed["feed_forward"])) == (attention, feed_forward)
    assert set(placed["attention"]) | set(placed["feed_forward"]) == set(paths)
    assert sorted({path.rpartition(".")[2] for path in placed["query_value"]}) == sorted(query_value)
    # T5's decoder attends twice
    per_layer = {"t5": 3}.get(name, 1) * len(query_value)
    assert len(placed["query_value"]) == 2 * per_layer
