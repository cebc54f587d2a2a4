"""Packed rows: tiny random models of every architecture give the losses and gradients of rows apart, or refuse."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from qlora_lab.config.families import FAMILIES
from qlora_lab.config.schema import CAUSAL, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.data.batching import collate
from qlora_lab.data.packing import collate_packed, pack
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import ModelError
from qlora_lab.models import attention
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import target_loss
from qlora_lab.models.packing import WITHOUT_POSITIONS, check_packing

CAUSAL_TYPES = [name for name, family in FAMILIES.items() if family.task == CAUSAL]


def built(model_type: str) -> PreTrainedModel:
    heads = 2 if FAMILIES[model_type].grouped_query else 4
    architecture = ArchitectureConfig(
        model_type=model_type,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=heads,
        feed_forward_size=128,
        vocab_size=96,
        head_size=8 if FAMILIES[model_type].grouped_query else None,
        max_position=64,
    )
    config = ModelConfig("tiny", "random", tokenizer="byte_level", architecture=architecture, max_length_tokens=64)
    plain = QuantConfig(format="none", double_quant=False)
    return load_model(config, plain, compute_dtype=torch.float32, device="cpu", cache_dir=Path(), seed=4, labels=[])


def examples() -> list[Example]:
    rng = random.Random(3)
    rows = []
    for number, (source, target) in enumerate([(9, 5), (4, 3), (6, 17), (2, 2), (12, 3)]):
        ids = [rng.randrange(3, 96) for _ in range(source + target)]
        rows.append(Example(ids, source, source if number else 1, f"row {number}", None, 0))  # the first: everything
    return rows


def loss_and_gradient(model: PreTrainedModel, *batches: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    losses = []
    for batch in batches:
        loss, _ = target_loss(model, batch, chunk_tokens=8)
        loss.backward()
        losses.append(loss.detach())
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    return torch.stack(losses).sum(), gradient.clone()


def check_equal(model: PreTrainedModel, tolerance: float = 1e-4) -> None:
    rows = examples()
    packs = pack([row.length for row in rows], 32)
    assert max(len(numbers) for numbers in packs) > 1 and len(packs) > 1
    apart = loss_and_gradient(model, *(collate([row], 0) for row in rows))
    packed = loss_and_gradient(model, collate_packed([[rows[n] for n in numbers] for numbers in packs], 0))
    for expected, actual in zip(apart, packed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model_type", [name for name in CAUSAL_TYPES if name not in WITHOUT_POSITIONS])
def test_packed_rows_lose_what_rows_apart_lose(model_type: str) -> None:
    model = built(model_type)
    check_packing(model)
    check_equal(model)


def test_windows_shorter_than_a_pack_slide_within_each_row() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    check_equal(AutoModelForCausalLM.from_config(config))


def test_attention_of_cpus_that_emulate_bfloat16_keeps_packed_rows_apart() -> None:
    model = built("llama")
    model.set_attn_implementation(attention.NAME)
    check_equal(model)


@pytest.mark.parametrize("model_type", WITHOUT_POSITIONS)
def test_models_that_read_no_positions_are_refused(model_type: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be right .* set data\.packing=false"):
        check_packing(built(model_type))


def test_a_model_whose_packed_rows_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lab.models.packing.MASK_WITHOUT_POSITIONS", ())
    with pytest.raises(ModelError, match="rows that are packed see each other"):
        check_packing(built("opt"))
