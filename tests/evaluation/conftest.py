"""A tiny language model, a tokenizer of words, and held-out rows."""

import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_lab.data.tokenization import EvalExample, Example
from tests.tiny_models import LLAMA

WORDS = [f"w{number}" for number in range(40)]
MakeRows = Callable[..., list[EvalExample]]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; pad is the end-of-sequence token, as in the embedded model."""
    vocabulary = {word: number for number, word in enumerate(["<end>", "<unknown>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unknown>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(5)
    numbers = LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer)}, initializer_range=0.3, attention_dropout=0.5)
    return LlamaForCausalLM(numbers).eval()


@pytest.fixture
def make_rows(tokenizer: PreTrainedTokenizerFast) -> MakeRows:
    def make(count: int, seed: int = 0, loss_on: str = "target") -> list[EvalExample]:
        rng = random.Random(seed)
        rows = []
        for number in range(count):
            prompt = " ".join(rng.choices(WORDS, k=rng.randint(2, 12)))
            target = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
            prompt_ids = tokenizer(prompt)["input_ids"]
            ids = [*prompt_ids, *tokenizer(target)["input_ids"], tokenizer.eos_token_id]
            start = len(prompt_ids)
            example = Example(
                ids,
                target_start=start,
                loss_start=start if loss_on == "target" else 1,
                key=f"key {seed} {number}",
                family="even" if number % 2 == 0 else None,
                target_bytes=len(target.encode()),
            )
            rows.append(EvalExample(example, prompt_ids, prompt, target, answer_tokens=len(ids) - start - 1))
        return rows

    return make
