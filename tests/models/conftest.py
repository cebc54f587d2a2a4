"""A tiny model with its tokenizer, saved as users' models are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import LLAMA

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Save a llama and a tokenizer of four words; `special` are the tokenizer's special tokens."""

    def make(name: str = "model", **special: str) -> Path:
        config = LlamaConfig(**LLAMA, max_position_embeddings=128, initializer_range=0.2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        words = Tokenizer(models.WordLevel({"<end>": 0, "<pad>": 1, "a": 2, "b": 3}, unk_token="a"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
