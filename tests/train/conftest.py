"""A tiny language model and rows for it."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab.data.tokenization import Example
from tests.tiny_models import LLAMA

VOCAB_SIZE = 61

MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture
def make_model() -> MakeModel:
    """Build a seeded Llama whose trainable parameters are the projections named, all of them for None."""

    def make(trainable: tuple[str, ...] | None = ("q_proj", "down_proj"), **overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(7)
        numbers = LLAMA | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "initializer_range": 0.2}
        model = LlamaForCausalLM(LlamaConfig(**numbers | overrides))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable is None or any(part in name for part in trainable))
        return model.eval()

    return make


@pytest.fixture
def examples() -> list[Example]:
    """Rows of 4 to 15 tokens with targets of 1 to 6."""
    return make_examples(24)


def make_examples(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        source, target = rng.randint(3, 9), rng.randint(1, 6)
        ids = [rng.randrange(1, VOCAB_SIZE) for _ in range(source + target)]
        rows.append(Example(ids, source, source, key=f"row {number}", family=None, target_bytes=3 * target))
    return rows
