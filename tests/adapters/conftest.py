"""Tiny models to adapt."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_models import WIDER_LLAMA

MakeLlama = Callable[[], LlamaForCausalLM]


@pytest.fixture
def make_llama() -> MakeLlama:
    """Build a llama of two layers with weights that are always the same, as the base that several models share."""

    def make() -> LlamaForCausalLM:
        config = LlamaConfig(
            **WIDER_LLAMA | {"vocab_size": 96},
            initializer_range=0.2,  # so that logits differ visibly
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(96, (2, 11), generator=torch.Generator().manual_seed(5))


def randomize_adapters(model: nn.Module, seed: int = 11) -> None:
    """Give every lora_A and lora_B values, as training would; a fresh lora_B is zero and hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
